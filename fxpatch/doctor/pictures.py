"""What the page's pictures show, measured: a small model run in pieces on the device.

Three blocks (linear, GELU, GLU, linear) with a softmax between them, which is where the model is split: so a replay is
graph, softmax, graph, softmax, graph. It runs in a process of its own, after `fxpatch.install()`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.nn import functional as F

from fxpatch.doctor.probe import NotApplicable, Subject
from fxpatch.piecewise.graph_device import GraphDevice, Pool, frozen_gc
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.progress import Step
from fxpatch.piecewise.runner import PiecewiseRunner

WIDTH, BLOCKS = 256, 3
SIZES = (2048, 512, 128)
REPLAYS = 15


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, WIDTH]` float32 in and out."""
        y: torch.Tensor = x + self.narrow(F.glu(F.gelu(self.wide(x))))
        return y


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(_Block() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, WIDTH]` float32 in and out."""
        for index, block in enumerate(self.blocks):
            x = torch.softmax(x, -1) if index else x
            x = block(x)
        return x


def measure(subject: Subject) -> dict[str, Any]:
    """Both pictures' data, or why there is none.

    Returns:
        `pieces`: `size`, `graph_class`, `rows`: `kind` ("graph" or "split"), `label`, `us`: median of `REPLAYS`
        replays, in microseconds, the device waited for before and after each piece, in order;
        `memory`: `rows`: for each captured size `size`, `alone` (bytes reserved for its graphs in a pool of their own),
        `added` (bytes by which it made the shared pool grow, captured in this order), or `why_not`.

    Raises:
        NotApplicable: the device has no graphs.
        FxPatchError: the model cannot be prepared there.
    """
    with torch.device(subject.device):
        model, example = _Model().eval(), torch.randn(SIZES[0], WIDTH)
    steps: list[Step] = []
    runner = PiecewiseRunner(
        model,
        dynamic={"x": 0},
        split=["softmax"],
        sizes=list(SIZES),
        compiler="eager",
        native="keep",
        on_error="raise",
        progress=steps.append,
    )
    report = runner.prepare(x=example)
    begun, prepared = runner._made.start, runner._made.prepared
    assert begun is not None
    assert prepared is not None
    if not begun.graphs:
        raise NotApplicable(f"{subject.device} captures no graphs: {begun.device.reason}")
    size = SIZES[len(SIZES) // 2]
    labels = [
        ("split", row.reasons[0].partition(":")[0]) if row.kind == "split" else ("graph", f"graph {row.index}")
        for row in report.pieces
        if row.kind != "views"
    ]
    durations = _durations(prepared, size, begun.device)
    rows = [{"kind": kind, "label": label, "us": us} for (kind, label), us in zip(labels, durations, strict=True)]
    return {
        "pieces": {"size": size, "graph_class": begun.device.reason, "rows": rows},
        "memory": _memory(prepared, begun.device, example, steps),
    }


def _durations(prepared: Prepared, size: int, device: GraphDevice) -> list[float]:
    """Microseconds of each step of a replay."""
    steps = prepared.captured[size].plan.steps
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(REPLAYS):
        for place, step in enumerate(steps):
            device.synchronize()
            begun = time.perf_counter_ns()
            step()
            device.synchronize()
            taken[place].append((time.perf_counter_ns() - begun) / 1000)
    return [round(statistics.median(each), 1) for each in taken]


def _memory(prepared: Prepared, device: GraphDevice, example: torch.Tensor, steps: list[Step]) -> dict[str, Any]:
    """Bytes for each size; `steps` say what was reserved before each capture and after the last."""
    reserved = [step.reserved for step in steps]
    if None in reserved:
        return {"why_not": f"nobody counts it: torch.{device.type}.memory_reserved() is missing, or refuses"}
    added = {
        step.size: after - before
        for step, before, after in zip(steps, reserved, reserved[1:], strict=False)
        if before is not None and after is not None
    }
    prepared.release()
    alone = {size: _alone(prepared, size, device, example) for size in added}
    return {"rows": [{"size": size, "alone": alone[size], "added": added[size]} for size in added]}


def _alone(prepared: Prepared, size: int, device: GraphDevice, example: torch.Tensor) -> int:
    """Bytes that are reserved for the graphs of one size in a pool that no other has used."""
    _empty_cache(device)
    before = _reserved(device)
    with torch.no_grad(), device.side_stream(), frozen_gc():
        prepared.capture(size, [example], len(example), device, Pool(), weak=True)
    _empty_cache(device)  # what the warm-up has left outside of the pool
    taken = _reserved(device) - before
    prepared.release()
    return taken


def _reserved(device: GraphDevice) -> int:
    counted = device.memory()
    assert counted is not None
    return counted["reserved"]


def _empty_cache(device: GraphDevice) -> None:
    device.synchronize()
    empty = getattr(getattr(torch, device.type), "empty_cache", None)
    if empty is not None:
        empty()
