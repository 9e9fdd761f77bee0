"""Models that nobody here wrote, through the runner: what eager computes, for every n up to the largest size.

Each is prepared once on the simulated device and once on the CPU, where captures are recordings; then its graphs are
released, and its compiled pieces are compared as well. docs/piecewise_models.md has the table of what a user has to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpatch
from fxpatch.errors import TraceError
from fxpatch.piecewise.runner import PiecewiseRunner

sys.path.append(str(Path(__file__).parent.parent / "models"))
import step
from zoo import MODELS, VOCABULARY, noise

BY_NAME = {model.name: model for model in MODELS}
SIZES = [2, 4, 8]
ORDER = [8, 1, 5, 2, 7, 3, 6, 4, 8]  # larger and smaller in turn: what an earlier call left must not show
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1 / 16}  # of order 1; a padded product may add in another order
ATTENTION = "scaled_dot_product_attention"

Inputs = Mapping[str, torch.Tensor]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(shape[0] * 100 + shape[1]))


def batch(n: int) -> Inputs:
    """n sequences, every second one padded on the left."""
    mask = torch.ones(n, 12, dtype=torch.long)
    mask[::2, :4] = 0
    return {"input_ids": ids(n, 12), "attention_mask": mask}


def tokens(n: int) -> Inputs:
    """Two sequences of n tokens."""
    return {"input_ids": ids(2, n)}


def in_eager_attention(node: torch.fx.Node) -> str | None:
    """A rule for models whose attention is plain torch: what their function of that name does."""
    return "attention" if "in eager_attention_forward" in (node.stack_trace or "") else None


@dataclass(frozen=True)
class Case:
    """A model, which of its dimensions is dynamic, and how it is called.

    Args:
        part: of the model: `"model.encoder"`.
        attention: where it is split, so that attention runs between the graphs.
        constants: flags of the call.
    """

    model: str
    what: str
    inputs: Callable[[int], Inputs]
    dynamic: Mapping[str, int]
    part: str = ""
    dtype: torch.dtype = torch.float32
    attention: Any = ATTENTION
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model}, {self.what}"

    def build(self, device: str) -> torch.nn.Module:
        return step.build(BY_NAME[self.model], device, 2, self.dtype).eval().get_submodule(self.part)

    def on(self, device: str, n: int) -> dict[str, Any]:
        return {**{name: x.to(device) for name, x in self.inputs(n).items()}, **self.constants}


def decoder(model: str, **options: Any) -> list[Case]:
    options["constants"] = {"use_cache": False}  # a cache is no tensor, and no result
    return [
        Case(model, "batch", batch, {"input_ids": 0, "attention_mask": 0}, **options),
        Case(model, "tokens", tokens, {"input_ids": 1}, **options),
    ]


CASES = [
    *decoder("Llama"),
    *decoder("Qwen3"),
    *decoder("Gemma 2", attention=in_eager_attention),
    *decoder("Mixtral", dtype=torch.bfloat16),  # in float32 its experts read on the host; see below
    *decoder("GPT-2"),
    Case("ViT", "batch", lambda n: {"pixel_values": noise(n, 3, 16, 16, seed=n)}, {"pixel_values": 0}),
    Case("Whisper", "batch", lambda n: {"input_features": noise(n, 8, 32, seed=n)}, {"input_features": 0},
         part="model.encoder"),
    Case("T5", "batch", batch, {"input_ids": 0, "attention_mask": 0}, part="encoder"),
]  # fmt: skip
LLAMA = CASES[0]
# Llama, whole and fast, in every run of the tests; the others in those that take their time
EVERY = [pytest.param(case, id=str(case), marks=[] if case is LLAMA else pytest.mark.slow) for case in CASES]


@pytest.fixture(autouse=True)
def installed(musa: str) -> Iterator[None]:
    """fxpatch's repairs, as a user has them; a strict device; Dynamo without the memory of other tests."""
    torch._dynamo.reset()
    fxpatch.simulate(musa, strict=True)
    with fxpatch.install(musa), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # Mixtral asks its torch
        yield
    fxpatch.simulate(musa, strict=False)
    torch._dynamo.reset()


def runner_of(case: Case, net: torch.nn.Module, *, split: bool, **options: Any) -> PiecewiseRunner:
    return PiecewiseRunner(
        net, dynamic=case.dynamic, sizes=SIZES, split=[case.attention] if split else [],
        **{"compiler": "eager", "on_error": "raise", **options},
    )  # fmt: skip


def tensor_of(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def eager(case: Case, net: torch.nn.Module, device: str) -> dict[int, torch.Tensor]:
    """What the model itself returns, for every n."""
    with torch.no_grad():
        return {n: tensor_of(net(**case.on(device, n))) for n in sorted(ORDER)}


def check_every_n(case: Case, wanted: Mapping[int, torch.Tensor], runner: PiecewiseRunner, device: str) -> None:
    with torch.no_grad():
        for n in ORDER:
            got, want = tensor_of(runner(**case.on(device, n))), wanted[n]
            assert 0.01 < want.std() < 100
            torch.testing.assert_close(got, want, atol=TOLERANCE[case.dtype], rtol=0, msg=lambda m, n=n: f"n={n}: {m}")


def check(case: Case, device: str, *, split: bool, **options: Any) -> PiecewiseRunner:
    """Prepared once, compared for every n, in graphs and without."""
    net = case.build(device)
    runner = runner_of(case, net, split=split, **options)
    report = runner.prepare(**case.on(device, 6))
    assert {row.size: row.way for row in report.sizes} == dict.fromkeys(reversed(SIZES), "captured")
    assert [piece.kind for piece in report.pieces].count("split") == (2 if split else 0)
    wanted = eager(case, net, device)
    check_every_n(case, wanted, runner, device)
    assert runner.counts == {"captured": len(ORDER)}
    runner.release()
    check_every_n(case, wanted, runner, device)
    assert runner.counts == {"captured": len(ORDER), "compiled: the graphs have been released": len(ORDER)}
    return runner


@pytest.mark.parametrize("case", EVERY)
def test_on_the_simulated_device(case: Case, musa: str) -> None:
    check(case, musa, split=True)


@pytest.mark.parametrize("case", [case for case in EVERY if "batch" in str(case.id)])
def test_in_one_graph_on_the_simulated_device(case: Case, musa: str) -> None:
    check(case, musa, split=False)


@pytest.mark.parametrize("case", EVERY)
def test_recorded_on_the_cpu(case: Case) -> None:
    check(case, "cpu", split=True, graphs="recorder")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama, tokens", "Gemma 2, batch", "T5, batch"])
def test_through_aot_autograd(name: str, musa: str) -> None:
    (case,) = (case for case in CASES if str(case) == name)
    runner = check(case, musa, split=True, compiler="aot_eager")
    graphs = [piece for piece in runner.report.pieces if piece.kind == "graph"]
    assert len(graphs) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device"), [("Llama, batch", "musa"), ("ViT, batch", "cpu")])
def test_through_inductor(name: str, device: str) -> None:
    (case,) = (case for case in CASES if str(case) == name)
    check(case, device, split=True, compiler="inductor", graphs="device" if device == "musa" else "recorder")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama, batch", "Whisper, batch"])
def test_without_graphs(name: str) -> None:
    (case,) = (case for case in CASES if str(case) == name)
    net = case.build("cpu")
    runner = runner_of(case, net, split=True, graphs="none", compiler="aot_eager")
    runner.prepare(**case.on("cpu", 6))
    check_every_n(case, eager(case, net, "cpu"), runner, "cpu")
    assert runner.counts == {"compiled: the device captures no graphs": len(ORDER)}


# -- what a user has to do, by model: docs/piecewise_models.md --------------------------------------------------------


def test_a_cache_among_the_results_is_refused() -> None:
    net = LLAMA.build("cpu")
    runner = runner_of(LLAMA, net, split=True, graphs="recorder")
    given = {**LLAMA.on("cpu", 4), "use_cache": True}
    with pytest.raises(TraceError, match="a DynamicCache that is neither a result, an input nor a parameter"):
        runner.prepare(**given)


def test_an_operator_that_is_not_there_splits_nothing(musa: str) -> None:
    """Gemma 2 caps its scores, which the fused attention cannot: its attention is plain torch."""
    case = next(case for case in CASES if case.model == "Gemma 2")
    runner = PiecewiseRunner(case.build(musa), dynamic=case.dynamic, sizes=[2], split=[ATTENTION], compiler="eager")
    report = runner.prepare(**case.on(musa, 4))
    assert [piece.kind for piece in report.pieces] == ["graph"]


@pytest.mark.slow
@pytest.mark.parametrize("cure", ["nothing", "batched_mm", "split"])
def test_experts_in_float32(cure: str, musa: str) -> None:
    """torch has a grouped product for bfloat16; in float32 it reads the experts' offsets on the host."""
    case = next(case for case in CASES if case.model == "Mixtral")
    case = Case(**{**vars(case), "dtype": torch.float32})
    net = case.build(musa)
    if cure == "batched_mm":
        net.set_experts_implementation("batched_mm")
    runner = PiecewiseRunner(
        net,
        dynamic=case.dynamic,
        sizes=SIZES,
        compiler="eager",
        split=["transformers::grouped_mm_fallback"] if cure == "split" else [],
    )
    report = runner.prepare(**case.on(musa, 6))
    assert {row.way for row in report.sizes} == {"compiled" if cure == "nothing" else "captured"}
    if cure == "nothing":
        assert "operation not permitted when stream is capturing" in report.sizes[0].reason
    check_every_n(case, eager(case, net, musa), runner, musa)


@pytest.mark.slow
def test_a_loop_over_experts_cannot_be_traced(musa: str) -> None:
    case = next(case for case in CASES if case.model == "Mixtral")
    net = case.build(musa)
    net.set_experts_implementation("eager")
    runner = runner_of(case, net, split=False, on_error="fallback")
    report = runner.prepare(**case.on(musa, 6))
    assert "cannot be traced whole" in report.notes[0]
    check_every_n(case, eager(case, net, musa), runner, musa)
    assert set(runner.counts) == {"original: the model could not be traced, split or compiled"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--layers", "2"), ("--device", "cpu", "--layers", "1")], ids=["simulated", "cpu"])
def test_the_llama_example(options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "examples/piecewise_llama.py", *options],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "23 captured" in done.stdout
    assert "23 compiled: a tensor that is used in place is at another address than when it was captured" in done.stdout
    assert "23 of 23 steps replayed; with another cache 0" in done.stdout
