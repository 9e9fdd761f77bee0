"""`examples/sana.py`: equal to the CPU on two simulated devices, and an exit status of 1 for whatever is not.

The pictures are read back and compared here, too; and each planted mistake is one that somebody has made.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = ("--steps", "2", "--height", "32", "--layers")


def levels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path)).astype(int)


def check_pictures(folder: Path, device: str) -> list[numpy.ndarray]:
    """Three pictures and one, in a row: equal to the CPU's by at most one level, none flat, none like the last one."""
    ours, reference = levels(folder / f"sana_{device}.png"), levels(folder / "sana_reference.png")
    assert ours.shape == reference.shape == (32, 4 * 32, 3)
    assert abs(ours - reference).max() <= 1
    pictures = numpy.split(reference, 4, axis=1)
    assert min(picture.std() for picture in pictures) > 10
    assert all(abs(one - next_one).mean() > 10 for one, next_one in itertools.pairwise(pictures))
    return pictures


@pytest.mark.slow
def test_the_example_on_an_npu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/sana.py", "--out", str(tmp_path), *TINY, "2"],
        cwd=ROOT,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simulated-npu: decoder" in done.stdout, "the bar"
    assert "28/28" in done.stdout
    lines = re.findall(r"│ (\w[\w ]*) (\d) *│ *[\d.]+ │ *[\d.]+ │ *([\de.+-]+) │ *([\d.]+) │ (\w+) │", done.stdout)
    stages = ["text encoder", "text encoder", *["transformer", "scheduler"] * 2, "decoder"]
    assert [stage for stage, *_ in lines] == stages * 2
    assert all(float(far) <= 1e-4 * float(largest) and word == "equal" for _, _, far, largest, word in lines)
    assert len(re.findall(r"pictures: [31], 8 bit .* equal", done.stdout)) == 2
    assert "OK: 4 pictures; 4 of 4 transformer calls replayed; kernels: 16 npu::npu_geglu, 68 npu" in done.stdout
    assert "text encoder: platform operators for npu: 21 replaced, 0 left" in done.stdout
    assert "pieces: 5, of these 3 graphs, 3 distinct" in done.stdout
    assert "size 8: captured, 3 graphs" in done.stdout
    assert "size 2: captured, 3 graphs" in done.stdout
    assert "masks: torch.bool;" in done.stdout
    first, _, _, alone = check_pictures(tmp_path, "simulated-npu")
    assert abs(first - alone).max() <= 1, "from the same noise, in a batch of another size"


PLANTED = """
    import sys
    sys.path.insert(0, {examples!r})
    import fxpatch, sana, sana_parts, torch

    options = ["--device", "simulated-musa", "--algorithm", "sde-dpmsolver++", "--compiler", "eager", *{tiny!r}]

    def outcome(name, spoil=None, attention="eager"):
        def build(*args):
            built.append(sana_parts.build_pipeline(*args))
            if spoil is not None and len(built) == 2:  # the first one is the reference
                spoil(built[-1])
            return built[-1]

        built, sana.build_pipeline = [], build
        status = sana.main([*options, "--attention", attention, "--out", {folder!r} + "/" + name])
        print("outcome of", name, status, flush=True)

    def without_names(pipeline):
        # as the engine's was: a pipeline that looks for a `generator` in the signature finds none, and gives none
        step = pipeline.scheduler.step
        pipeline.scheduler.step = lambda model_output, timestep, sample, **kwargs: step(
            model_output, timestep, sample, **kwargs
        )

    def other_weight(pipeline):
        with torch.no_grad():
            pipeline.transformer.transformer_blocks[0].attn1.to_v.weight.mul_(1.01)

    def kernels_taken_back(model, device):
        with optimize(model, device) as optimized:
            return optimized

    def whole_window(pipeline):
        for layer in pipeline.text_encoder.layers:  # the seed's window masks nothing
            layer.self_attn.sliding_window = None
        pipeline.text_encoder.config.sliding_window = 1000

    outcome("nothing")
    try:
        outcome("refused", without_names)
    except fxpatch.FxPatchError as error:
        print("outcome of refused 1", error, flush=True)
    sana.explicit_step = lambda scheduler: None
    outcome("without_names", without_names)
    outcome("other_weight", other_weight)
    outcome("whole_window", whole_window)
    sana_parts.AttentionMaskInterface.register("boolean_mask", sana_parts.ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    outcome("float_masks", attention="boolean")
    optimize, sana.optimize = sana.optimize, kernels_taken_back
    outcome("kernels_unused")
    sana.optimize, sana.SIZES = optimize, [2]
    outcome("not_replayed")
"""


@pytest.mark.slow
def test_planted_mistakes_on_a_musa(tmp_path: Path, fresh: Callable[..., str]) -> None:
    """The first run is right, with noise from the generator at each step; then one thing is wrong at a time."""
    told = fresh(PLANTED.format(examples=str(EXAMPLES), tiny=(*TINY, "1"), folder=str(tmp_path)))
    parts = re.split(r"outcome of (\w+) (\d)", told)
    output, status = dict(zip(parts[1::3], parts[::3], strict=False)), dict(zip(parts[1::3], parts[2::3], strict=True))
    assert status.pop("nothing") == "0", output["nothing"]
    check_pictures(tmp_path / "nothing", "simulated-musa")
    assert set(status.values()) == {"1"}, status

    assert "The step of DPMSolverMultistepScheduler does not say what it takes." in told

    def wrong(name: str) -> list[str]:
        return re.findall(r"│ (\w[\w ]*\d|pictures)\b[^\n]* WRONG │", output[name])

    assert wrong("without_names")[:2] == ["scheduler 1", "transformer 2"]  # the first is fed with the right ones
    assert wrong("other_weight")[0] == "transformer 1"
    assert wrong("whole_window")[0] == "text encoder 1"
    assert wrong("float_masks") == wrong("kernels_unused") == wrong("not_replayed") == []
    assert "kernels: 68 aten::_fused_rmsnorm_forward" in output["nothing"]
    assert "kernels: not counted" in output["kernels_unused"]
    assert "4 of 4 transformer calls replayed" in output["float_masks"]
    assert "masks: torch.float32" in output["float_masks"]
    assert "2 of 4 transformer calls replayed" in output["not_replayed"]
    assert "2 compiled: n is above the largest size" in output["not_replayed"]


@pytest.fixture
def sana(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import sana

    return sana


def compared(sana: ModuleType, output: torch.Tensor, picture: numpy.ndarray, stage: str = "decoder") -> bool:
    """The verdict on one call and one picture, beside a call that returned 0, 1, ... 99 and a picture of 100s."""
    cpu = sana.Run([[sana.Call("decoder", torch.arange(100.0), 0.1)]], [[numpy.full((10, 10, 3), 100, numpy.uint8)]])
    ours = sana.Run([[sana.Call(stage, output, 0.1)]], [[picture]])
    table = sana.Table(*["column"] * 6)
    good = sana.compare(sana.PICTURES[0], ours, cpu, table)
    assert table.row_count == (2 if stage == "decoder" else 1)
    return good


def test_what_counts_as_equal(sana: ModuleType) -> None:
    right, picture = torch.arange(100.0), numpy.full((10, 10, 3), 100, numpy.uint8)
    assert compared(sana, right, picture)
    assert compared(sana, right + 0.009, picture)
    assert not compared(sana, right + 0.011, picture)
    assert not compared(sana, right, picture, stage="scheduler")
    assert not compared(sana, right.double(), picture)
    assert not compared(sana, right[:-1], picture)
    one_nan = right.clone()
    one_nan[5] = torch.nan
    assert not compared(sana, one_nan, picture)

    few, many, far = picture.copy(), picture.copy(), picture.copy()
    few[0, 0, :] -= 1  # 3 of 300
    many[0, :2, :2] -= 1  # 4 of 300
    far[0, 0, 0] = 255
    assert compared(sana, right, few)
    assert not compared(sana, right, many)
    assert not compared(sana, right, far)


def test_options_that_make_no_sense(sana: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in {
        ("--height", "48"): "--height is 48, and has to be a multiple of 32",
        ("--height", "0"): "--height is 0, and has to be a multiple of 32",
        ("--steps", "0"): "--steps and --layers have to be at least 1",
        ("--device", "xyz"): "invalid choice: 'xyz'",
    }.items():
        with pytest.raises(SystemExit):
            sana.read_options(list(wrong))
        assert said in capsys.readouterr().err


def test_attention_refuses_a_soft_cap(sana: ModuleType, musa: str) -> None:
    """torch's operator has none: to leave it out would be another model."""
    import sana_parts

    encoder = sana_parts.build_text_encoder("boolean").to(musa)
    ids, mask = torch.tensor([[1, 4, 5, 0]], device=musa), torch.tensor([[1, 1, 1, 0]], device=musa)
    with torch.no_grad():
        encoder(ids, attention_mask=mask)
        encoder.config.attn_logit_softcapping = 50.0
        for layer in encoder.layers:
            layer.self_attn.attn_logit_softcapping = 50.0
        with pytest.raises(ValueError, match="does not support `softcap`"):
            encoder(ids, attention_mask=mask)


def test_boolean_masks_give_what_float_masks_give(sana: ModuleType, musa: str) -> None:
    """Beside transformers' eager attention, which adds float masks, on the CPU and without a soft cap."""
    import sana_parts

    def built(attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        encoder = sana_parts.build_text_encoder(attention)
        for layer in encoder.layers:
            layer.self_attn.attn_logit_softcapping = None
        return encoder

    ids = torch.tensor([[1, 4, 5, 6, 7, 8, 9, 10, 11], [1, 4, 5, 0, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        want = built("eager")(ids, attention_mask=mask)[0]
        sana_parts.MASKS_SEEN.clear()
        got = built("boolean").to(musa)(ids.to(musa), attention_mask=mask.to(musa))[0].cpu()
        unmasked = built("boolean").to(musa)(ids.to(musa))[0].cpu()
    assert {(musa, torch.bool)} == sana_parts.MASKS_SEEN
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)
    assert (unmasked[1, 3:] - want[1, 3:]).abs().max() > 0.1, "a mask that changes something"
