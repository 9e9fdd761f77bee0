"""What `PiecewiseRunner(shadow=N)` costs a step once its N calls are over, and what a shadowed call costs.

    python benchmarks/shadow.py [--json FILE]

One step of 33 graph pieces and 32 splitting operators that do nothing, with graphs whose replay does nothing, so that
what is left is the runner: never shadowed, shadowed and over, and shadowed at every call. Two runners that were never
shadowed show the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import milliseconds, ratio, summary, take_turns
from piecewise import Instant
from torch import nn

import fxpatch
from fxpatch.piecewise import start as start_module

STEPS = 200


@torch.library.custom_op("shadow_benchmark::write", mutates_args=("out",))
def write(x: torch.Tensor, out: torch.Tensor) -> None:
    """Between graphs; does nothing."""


class Layer(nn.Module):
    """A graph piece, and an operator between graphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch.ops.shadow_benchmark.write(x, y)
        return y


def prepared(x: torch.Tensor, **options: Any) -> fxpatch.PiecewiseRunner:
    """A runner over layers that do nothing."""
    found = start_module.graph_device
    start_module.graph_device = lambda where, profile: Instant(where, "does nothing")  # type: ignore[assignment]
    try:
        model = nn.Sequential(*[Layer() for _ in range(32)])
        made = fxpatch.PiecewiseRunner(
            model, dynamic={"input": 0}, split=["shadow_benchmark::write"], sizes=[2, 8], compiler="eager", **options
        )
        made.prepare(x)
    finally:
        start_module.graph_device = found
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    x = torch.randn(8, 16)
    plain, same, over, always = prepared(x), prepared(x), prepared(x, shadow=1), prepared(x, shadow=10**9)
    over(x)

    def often(runner: fxpatch.PiecewiseRunner, steps: int = STEPS) -> Callable[[], float]:
        return lambda: milliseconds(lambda: [runner(x) for _ in range(steps)]) / steps * 1e3

    ways = {"plain": often(plain), "again": often(same), "over": often(over), "shadowed": often(always, 20)}
    times = take_turns(ways, args.rounds)
    result = {f"{name}_us": summary(each)["median_ms"] for name, each in times.items()}
    result |= {f"{name}_to_plain": ratio(times[name], times["plain"]) for name in ("again", "over", "shadowed")}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
