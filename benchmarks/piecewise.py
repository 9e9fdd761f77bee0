"""What the piecewise runner costs and saves, against torch.compile, the engines' design and the limit.

    python benchmarks/piecewise.py [--json FILE] [--depths 4 16 64] [--parts host start throughput memory]

host: one step of 33 graph pieces and 32 splitting operators that do nothing, with graphs whose replay does nothing: the
runner, a bare loop over the same calls, and an FX module of wrapped callables, which is how engines do it. start: cold
start by depth, against torch.compile. throughput: a decoder on the CPU, compiled pieces against torch.compile.
memory: what captured sizes hold on the simulated device, weakly and strongly held. Everything on this machine's CPU; a
device's own replay time is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import milliseconds, ratio, summary, take_turns
from torch import nn

import fxpatch
from fxpatch.piecewise import start as start_module
from fxpatch.piecewise.graph_device import Captured
from fxpatch.piecewise.graph_recorder import Recorder

LIBRARY = torch.library.Library("bench_piecewise", "FRAGMENT")
LIBRARY.define("nothing(Tensor q, Tensor(a!) out) -> ()")
LIBRARY.impl("nothing", lambda q, out: None, "CompositeExplicitAutograd")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out) -> ()")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    shape = (1, q.shape[0], -1, 64)
    heads = [each.view(shape).transpose(1, 2) for each in (q, k, v)]
    found = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    out.copy_(found.transpose(1, 2).reshape(q.shape))


LIBRARY.impl("attention", attend, "CompositeExplicitAutograd")


class Instant(Recorder):
    """Graphs whose replay does nothing, so that what is left is the runner."""

    captures = True

    def capture(self, call: Callable[[], Any], pool: Any = None) -> Captured[Any]:
        return Captured(call(), [].clear, lambda: None)


class Empty(nn.Module):
    """A graph piece and a splitting operator that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.linear(x)
        out = torch.empty_like(q)
        torch.ops.bench_piecewise.nothing.default(q, out)
        return x + out


class Decoder(nn.Module):
    """A pre-norm decoder layer on tokens `[n, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        seen = torch.empty_like(q)
        torch.ops.bench_piecewise.attention.default(q, k, v, seen)
        x = x + self.out(seen)
        gate, up = self.up(self.second(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Wrapped(nn.Module):
    """One piece in the engines' way: a module around a callable, entered through `nn.Module.__call__`."""

    def __init__(self, step: Callable[[], object]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step()
        return x


def wrapped(steps: tuple[Callable[[], object], ...]) -> torch.fx.GraphModule:
    root = nn.Module()
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for number, step in enumerate(steps):
        root.add_module(f"piece{number}", Wrapped(step))
        value = graph.call_module(f"piece{number}", (value,))
    graph.output(value)
    return torch.fx.GraphModule(root, graph)


def host(rounds: int) -> dict[str, Any]:
    """Microseconds per step."""
    found = start_module.graph_device
    start_module.graph_device = lambda where, profile: Instant(where, "does nothing")  # type: ignore[assignment]
    try:
        model = nn.Sequential(*[Empty() for _ in range(32)])
        runner = fxpatch.PiecewiseRunner(
            model, dynamic={"input": 0}, split=["bench_piecewise::nothing"], sizes=[2, 8], compiler="eager"
        )
        x = torch.randn(8, 16)
        runner.prepare(x)
    finally:
        start_module.graph_device = found
    assert runner._made.prepared is not None
    steps = runner._made.prepared.captured[8].plan.steps
    engine = wrapped(steps)

    def bare() -> None:
        for step in steps:
            step()

    def often(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: milliseconds(lambda: [call() for _ in range(200)]) / 200 * 1e3

    times = take_turns(
        {"bare": often(bare), "runner": often(lambda: runner(x)), "fx": often(lambda: engine(x))}, rounds
    )
    return {
        "steps": len(steps),
        **{f"{name}_us": summary(each)["median_ms"] for name, each in times.items()},
        "runner_to_bare": ratio(times["runner"], times["bare"]),
        "runner_to_fx": ratio(times["runner"], times["fx"]),
    }


def start(depths: list[int], width: int) -> dict[str, Any]:
    """Seconds from nothing to the first result, caches off."""
    rows: dict[str, Any] = {}
    for depth in depths:
        model = nn.Sequential(*[Decoder(width) for _ in range(depth)]).eval()
        x = torch.randn(32, width)
        row: dict[str, float] = {}
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            torch._dynamo.reset()
            before = time.perf_counter()
            runner = fxpatch.PiecewiseRunner(
                model, dynamic={"input": 0}, split=["bench_piecewise::attention"], sizes=[64], compiler="inductor"
            )
            report = runner.prepare(x)
            runner(x)
            row["runner_s"] = time.perf_counter() - before
            row["runner_inductor_s"] = sum(piece.seconds for piece in report.pieces)
            torch._dynamo.reset()
            before = time.perf_counter()
            torch.compile(model, dynamic=True)(x)
            row["torch_compile_s"] = time.perf_counter() - before
        row["ratio"] = row["runner_s"] / row["torch_compile_s"]
        rows[str(depth)] = row
    return rows


def throughput(depths: list[int], width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per call of 64 tokens; compiled pieces without graphs, against torch.compile."""
    rows: dict[str, Any] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for depth in depths:
            torch._dynamo.reset()
            model = nn.Sequential(*[Decoder(width) for _ in range(depth)]).eval()
            x = torch.randn(64, width)
            runner = fxpatch.PiecewiseRunner(
                model, dynamic={"input": 0}, split=["bench_piecewise::attention"], sizes=[128], compiler="inductor"
            )
            runner.prepare(x)
            whole = torch.compile(model, dynamic=True)
            with torch.no_grad():
                ways = {
                    "runner": lambda r=runner, x=x: milliseconds(lambda: r(x)),
                    "torch": lambda w=whole, x=x: milliseconds(lambda: w(x)),
                }
                times = take_turns(ways, rounds)
            rows[f"{depth} layers, {threads} threads"] = {
                "runner_ms": summary(times["runner"]),
                "torch_compile_ms": summary(times["torch"]),
                "throughput_ratio": ratio(times["torch"], times["runner"]),
            }
    return rows


def memory(depth: int, width: int) -> dict[str, Any]:
    """Bytes that captured sizes reserve on the simulated device."""
    fxpatch.simulate("musa")
    model = nn.Sequential(*[Decoder(width) for _ in range(depth)]).to("musa").eval()
    x = torch.randn(64, width, device="musa")
    rows = {}
    for weak in (True, False):
        torch.musa.empty_cache()
        before = torch.musa.memory_reserved()
        runner = fxpatch.PiecewiseRunner(
            model,
            dynamic={"input": 0},
            split=["bench_piecewise::attention"],
            sizes=[64, 128, 256],
            compiler="eager",
            weak=weak,
        )
        runner.prepare(x)
        rows["weak" if weak else "strong"] = torch.musa.memory_reserved() - before
        runner.release()
        del runner
    return {**rows, "weak_to_strong": rows["weak"] / rows["strong"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="+", default=["host", "memory", "throughput", "start"])
    args = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "host": lambda: host(args.rounds),
        "start": lambda: start(args.depths, args.width),
        "throughput": lambda: throughput([d for d in args.depths if d > 4], args.width, args.rounds),
        "memory": lambda: memory(16, args.width),
    }
    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.cuda.is_available()}
    if not torch.cuda.is_available():
        print("no CUDA device: replay and capture times of a device are not measured", file=sys.stderr)
    for name in args.parts:
        result[name] = parts[name]()
        print(json.dumps({name: result[name]}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
