"""A ragged batch of texts with images through Qwen2-VL's language model: padded, packed, and one by one.

    python examples/vlm_masks.py                      on a simulated `npu`: no hardware needed
    python examples/vlm_masks.py --simulate musa      on a simulated `musa`, whose models get another mask
    python examples/vlm_masks.py --device npu         on real hardware (cuda, npu, musa, xpu), or on the cpu
    options: --layers N, --sequences N, --repeats N

The model is transformers' own with random weights; images are embedded by its vision tower, and placed by its own
three-dimensional positions. A trainer has its batch as nested tensors. `fxpatch.layers.vlm_masks` pads or packs it,
aligned for tensor and context parallelism, gives the model what the device's attention takes, and turns what the model
returns into a nested tensor again. Each way is compared with every sequence computed alone, on the CPU. The last row
packs sequences and does not keep them apart: it has to be wrong, or the comparison would see nothing. The exit status
is 1 if anything else is wrong, or that is not.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

import fxpatch
from fxpatch.layers.masks import decoder_mask
from fxpatch.layers.vlm_masks import EngineBatch, alignment, postprocess, preprocess

VENDOR_PACKAGES = {"npu": "torch_npu", "musa": "torch_musa"}
TOLERANCE = 2e-4  # fp32 hidden states of order 1: padded, a matrix product may add in another order
IMAGE, PAD = 5, 0  # tokens; the pad token is an ordinary token of the texts, too
GRID = torch.tensor([[1, 4, 6]])  # an image's patches in time, height and width; the tower merges 2 by 2
TP, CP = 2, 2


def build(layers: int) -> Qwen2VLModel:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
            "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLModel(config).eval()


@dataclass(frozen=True)
class Ragged:
    """A batch on the CPU: of each sequence its embeddings `[n, hidden]` and positions `[n, 3]`."""

    embeddings: list[Tensor]
    positions: list[Tensor]

    def nested(self, device: torch.device) -> tuple[Tensor, Tensor]:
        embeddings, positions = (
            torch.nested.nested_tensor([each.to(device) for each in rows], layout=torch.jagged, device=device)
            for rows in (self.embeddings, self.positions)
        )
        return embeddings, positions


def ragged_batch(model: Qwen2VLModel, sequences: int) -> Ragged:
    """Texts of several lengths, every second one with an image, the shortest of one token."""
    random = torch.Generator().manual_seed(1)
    embeddings, positions = [], []
    for number in range(sequences):
        length = int(torch.randint(2, 40, (), generator=random)) if number else 1
        ids = torch.randint(0, 64, (length,), generator=random)
        ids[ids == IMAGE] = PAD
        if number % 2:
            at = length // 2
            ids = torch.cat([ids[:at], torch.full((int(GRID.prod()) // 4,), IMAGE), ids[at:]])
        is_image = ids == IMAGE
        embedded = model.language_model.embed_tokens(ids)
        if is_image.any():
            pixels = torch.randn(int(GRID.prod()), 3 * 2 * 4 * 4, generator=random)
            embedded[is_image] = model.get_image_features(pixels, GRID).pooler_output[0]
        grid = GRID if is_image.any() else None
        place, _ = model.get_rope_index(ids[None], is_image.int()[None], grid)
        embeddings.append(embedded)
        positions.append(place[:, 0].T.contiguous())
    return Ragged(embeddings, positions)


class Model:
    """Qwen2-VL's language model: embeddings `[B, S, hidden]` and positions `[B, S, 3]` to hidden states."""

    def __init__(self, model: Qwen2VLModel) -> None:
        self.language = model.language_model

    def __call__(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | None = None, in_sequence: Tensor | None = None
    ) -> Tensor:
        """`in_sequence`: positions in the text, where sequences are packed: where they restart, one begins."""
        places = positions.movedim(-1, 0)
        if in_sequence is not None:
            places = torch.cat([in_sequence[None], places])
        return self.language(
            inputs_embeds=embeddings, position_ids=places, attention_mask=mask, use_cache=False
        ).last_hidden_state


def one_by_one(model: Model, batch: Ragged, device: torch.device) -> list[Tensor]:
    rows = zip(batch.embeddings, batch.positions, strict=True)
    return [model(each[None].to(device), places[None].to(device))[0] for each, places in rows]


@dataclass(frozen=True)
class Ran:
    """One run of one way: how the batch went in, with which mask, and the model's output `[B, S, hidden]`."""

    batch: EngineBatch
    mask: Tensor | None
    output: Tensor

    def ragged(self) -> list[Tensor]:
        return list(postprocess(self.output, self.batch).unbind())


Way = Callable[[Model, Tensor, Tensor], Ran]


def padded(align: int, full_mask: bool) -> Way:
    def run(model: Model, embeddings: Tensor, positions: Tensor) -> Ran:
        batch = preprocess(embeddings, align=align)
        mask = batch.attention_mask  # none on npu, 2-D elsewhere
        if full_mask:
            mask = decoder_mask(batch.max_length, padding=batch.real_tokens)
        return Ran(batch, mask, model(batch.input_ids, preprocess(positions, align=align).input_ids, mask))

    return run


def packed(align: int, keep_apart: str) -> Way:
    def run(model: Model, embeddings: Tensor, positions: Tensor) -> Ran:
        batch = preprocess(embeddings, layout="thd", align=align, mask="4d" if keep_apart == "mask" else "auto")
        in_sequence = batch.position_ids if keep_apart == "positions" else None
        places = preprocess(positions, layout="thd", align=align).input_ids
        mask = batch.attention_mask
        return Ran(batch, mask, model(batch.input_ids, places, mask, in_sequence))

    return run


def ways() -> dict[str, Way]:
    align = alignment(TP, CP)
    return {
        "padded, the device's mask": padded(1, False),
        f"padded to {align}, the device's mask": padded(align, False),
        f"padded to {align}, [B, 1, S, S]": padded(align, True),
        "packed, positions": packed(1, "positions"),
        f"packed, each to {align}, positions": packed(align, "positions"),
        f"packed, each to {align}, [1, 1, T, T]": packed(align, "mask"),
        "packed, not kept apart (wrong)": packed(1, "nothing"),
    }


def prepare_device(wanted: str, simulate: str) -> torch.device:
    if wanted == "simulated":
        fxpatch.simulate(simulate, strict=True)
        return torch.device(simulate)
    if wanted in VENDOR_PACKAGES:
        importlib.import_module(VENDOR_PACKAGES[wanted])
    return torch.device(wanted, 0) if wanted != "cpu" else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The fastest of some runs, in ms."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def shown(mask: Tensor | None) -> str:
    return "none" if mask is None else f"{str(mask.dtype)[6:]} {list(mask.shape)}"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated", choices=["simulated", "cpu", "cuda", "npu", "musa", "xpu"])
    parser.add_argument("--simulate", default="npu", choices=["npu", "musa"], help="what --device simulated is called")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if min(options.layers, options.repeats) < 1 or options.sequences < 2:
        parser.error("at least one layer and repeat, and two sequences")

    device = prepare_device(options.device, options.simulate)
    handle = fxpatch.install(device.type) if device.type != "cpu" else None
    whole = build(options.layers)
    ragged = ragged_batch(whole, options.sequences)
    want = one_by_one(Model(whole), ragged, torch.device("cpu"))
    model = Model(whole.to(device))
    embeddings, positions = ragged.nested(device)
    tokens = sum(len(each) for each in want)

    table = Table(title=f"Qwen2-VL's language model on {device.type}: {len(want)} sequences, {tokens} tokens")
    for name in ("way", "the model's mask", "tokens computed", "ms", "max |error|", ""):
        table.add_column(name, justify="left" if name in ("way", "the model's mask") else "right")
    right = True

    def check(name: str, mask: str, computed: int, ms: float, got: list[Tensor]) -> None:
        nonlocal right
        same = [a.shape for a in got] == [b.shape for b in want]
        error = max(float((a.cpu() - b).abs().max()) for a, b in zip(got, want, strict=True)) if same else float("inf")
        fine = (error <= TOLERANCE) != name.endswith("(wrong)")  # nan is not fine, and no proof either
        fine = fine and error == error
        right = right and fine
        table.add_row(name, mask, str(computed), f"{ms:.1f}", f"{error:.1e}", "ok" if fine else "NOT AS EXPECTED")

    console = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("running", total=1 + len(ways()))
        got = one_by_one(model, ragged, device)
        ms = timed(lambda: one_by_one(model, ragged, device), options.repeats, device)
        check("one by one", "none", tokens, ms, got)
        progress.advance(task)
        for name, run in ways().items():
            progress.update(task, description=name)
            ran = run(model, embeddings, positions)
            ms = timed(lambda run=run: run(model, embeddings, positions).ragged(), options.repeats, device)
            check(name, shown(ran.mask), ran.output.shape[0] * ran.output.shape[1], ms, ran.ragged())
            progress.advance(task)
    console.print(table)
    console.print(f"{'OK' if right else 'WRONG'}: hidden states within {TOLERANCE:.0e} of the CPU's, one by one")
    if handle is not None:
        handle.uninstall()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
