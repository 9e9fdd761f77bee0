"""What the piecewise runner costs and saves, against torch.compile, the engines' design and the limit.

    python benchmarks/piecewise.py [--json FILE] [--plot FILE] [--parts host start warm throughput memory device]

host: one step of 33 graph pieces and 32 splitting operators that do nothing, with graphs whose replay does nothing: the
runner, a bare loop over the same calls, and an FX module of wrapped callables, which is how engines do it.
start: from nothing to the first result by depth, against torch.compile; Inductor is imported, its caches are off.
warm: the same with `cache=`, each in a process of its own: the first, and one that finds what the first has saved.
throughput: decoders and a diffusion transformer on the CPU, compiled pieces against torch.compile and eager.
memory: what captured sizes hold on the simulated device, weakly and strongly held.
device: replay, capture and pool memory for 1, 8 and 32 sizes on CUDA, or where there is none on the simulated device,
whose kernels are the CPU's: what is measured there is not a device's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import milliseconds, ratio, summary, take_turns
from layers_of import SPLIT, Empty, decoder, diffusion_transformer
from torch import nn

import fxpatch
from fxpatch.piecewise import start as start_module
from fxpatch.piecewise.graph_device import Captured
from fxpatch.piecewise.graph_recorder import Recorder


class Instant(Recorder):
    """Graphs whose replay does nothing, so that what is left is the runner."""

    captures = True

    def capture(self, call: Callable[[], Any], pool: Any = None) -> Captured[Any]:
        return Captured(call(), [].clear, lambda: None)


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
        runner = fxpatch.PiecewiseRunner(model, dynamic={"input": 0}, split=SPLIT, sizes=[2, 8], compiler="eager")
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


def start(depths: list[int], width: int, rounds: int) -> dict[str, Any]:
    """Seconds from nothing to the first result, Inductor's caches off."""
    x = torch.randn(32, width)

    def runner(depth: int) -> tuple[float, float]:
        model = decoder(depth, width)
        torch._dynamo.reset()
        before = time.perf_counter()
        made = fxpatch.PiecewiseRunner(model, dynamic={"input": 0}, split=SPLIT, sizes=[64], compiler="inductor")
        report = made.prepare(x)
        made(x)
        return time.perf_counter() - before, sum(piece.seconds for piece in report.pieces)

    def compiled(depth: int) -> float:
        model = decoder(depth, width)
        torch._dynamo.reset()
        return milliseconds(lambda: torch.compile(model, dynamic=True)(x)) / 1e3

    rows: dict[str, Any] = {}
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        runner(2)
        compiled(2)  # Inductor's own imports
        for depth in depths:
            ours, theirs = zip(*[(runner(depth), compiled(depth)) for _ in range(rounds)], strict=True)
            seconds = [each for each, _ in ours]
            rows[str(depth)] = {
                "runner_s": statistics.median(seconds),
                "runner_all_s": seconds,
                "runner_inductor_s": statistics.median(each for _, each in ours),
                "torch_compile_s": statistics.median(theirs),
                "torch_compile_all_s": theirs,
                "ratio": ratio(seconds, list(theirs)),
            }
    return rows


def prepare_once(depth: int, width: int, cache: str) -> None:
    """What a process of `warm` does."""
    model, x = decoder(depth, width), torch.randn(32, width)
    before = time.perf_counter()
    made = fxpatch.PiecewiseRunner(
        model, dynamic={"input": 0}, split=SPLIT, sizes=[64], compiler="inductor", cache=cache
    )
    notes = made.prepare(x).notes
    print(json.dumps({"seconds": time.perf_counter() - before, "note": notes[0].split(" ")[0]}))


def warm(depths: list[int], width: int, rounds: int) -> dict[str, Any]:
    """Seconds of `prepare()` in a fresh process, with an empty cache and with what that has saved in it; Inductor's own
    cache directory is empty both times."""

    def process(depth: int, cache: str, expected: str) -> float:
        with tempfile.TemporaryDirectory() as inductor:
            done = subprocess.run(
                [sys.executable, __file__, "--prepare-once", str(depth), str(width), cache],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": inductor},
                capture_output=True,
                text=True,
                check=True,
            )
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["note"] == expected, told
        return float(told["seconds"])

    rows = {}
    for depth in depths:
        cold, warmed = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as cache:
                cold.append(process(depth, cache, "saved"))
                warmed.append(process(depth, cache, "loaded"))
        rows[str(depth)] = {
            "cold_s": statistics.median(cold),
            "cold_all_s": cold,
            "warm_s": statistics.median(warmed),
            "warm_all_s": warmed,
            "ratio": ratio(warmed, cold),
        }
    return rows


def throughput(depths: list[int], width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per call; compiled pieces without graphs, against torch.compile's default and eager."""
    rows: dict[str, Any] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for depth in depths:
            tokens = {"input": torch.randn(64, width)}
            rows[f"decoder, {depth} layers, {threads} threads"] = _speed(
                decoder(depth, width), tokens, ["input"], SPLIT, rounds
            )
        model, example = diffusion_transformer(8)
        rows[f"diffusion transformer, 8 layers, {threads} threads"] = _speed(
            model, example, list(example), ["scaled_dot_product_attention"], rounds
        )
    return rows


def _speed(
    model: nn.Module, example: dict[str, torch.Tensor], dynamic: list[str], split: list[str], rounds: int
) -> dict[str, Any]:
    torch._dynamo.reset()
    n = next(iter(example.values())).shape[0]
    runner = fxpatch.PiecewiseRunner(
        model, dynamic=dict.fromkeys(dynamic, 0), split=split, sizes=[2 * n], compiler="inductor", on_error="raise"
    )
    runner.prepare(**example)
    whole = torch.compile(model, dynamic=True)
    with torch.no_grad():
        ways = {
            "runner": lambda: milliseconds(lambda: runner(**example)),
            "torch": lambda: milliseconds(lambda: whole(**example)),
            "eager": lambda: milliseconds(lambda: model(**example)),
        }
        times = take_turns(ways, rounds, warm_up=4)
    return {
        "runner_ms": summary(times["runner"]),
        "torch_compile_ms": summary(times["torch"]),
        "eager_ms": summary(times["eager"]),
        "throughput_ratio": ratio(times["torch"], times["runner"]),
    }


def memory(depth: int, width: int) -> dict[str, Any]:
    """Bytes that captured sizes reserve on the simulated device."""
    fxpatch.simulate("musa")
    model = decoder(depth, width).to("musa")
    x = torch.randn(64, width, device="musa")
    rows = {}
    for weak in (True, False):
        torch.musa.empty_cache()  # type: ignore[attr-defined]
        before = torch.musa.memory_reserved()  # type: ignore[attr-defined]
        runner = fxpatch.PiecewiseRunner(
            model, dynamic={"input": 0}, split=SPLIT, sizes=[64, 128, 256], compiler="eager", weak=weak
        )
        runner.prepare(x)
        rows["weak" if weak else "strong"] = torch.musa.memory_reserved() - before  # type: ignore[attr-defined]
        runner.release()
        del runner
    return {**rows, "weak_to_strong": rows["weak"] / rows["strong"]}


def device(depth: int, width: int, rounds: int) -> dict[str, Any]:
    """Replay, capture and pool of 1, 8 and 32 sizes, on CUDA or the simulated device."""
    real = torch.cuda.is_available()
    if not real:
        fxpatch.simulate("musa")
    where, compiler = ("cuda", "inductor") if real else ("musa", "eager")
    module = torch.get_device_module(where)
    model = decoder(depth, width).to(where)
    rows: dict[str, Any] = {"device": where, "a device's speed": real}

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: milliseconds(lambda: (call(), module.synchronize()))

    for count in (1, 8, 32):
        sizes = [8 * (number + 1) for number in range(count)]
        x = torch.randn(sizes[-1], width, device=where)
        module.empty_cache()
        before = module.memory_reserved()
        runner = fxpatch.PiecewiseRunner(model, dynamic={"input": 0}, split=SPLIT, sizes=sizes, compiler=compiler)
        report = runner.prepare(x)
        row = rows[f"{count} sizes"] = {
            "captured": sum(size.way == "captured" for size in report.sizes),
            "capture_s": sum(size.seconds for size in report.sizes),
            "reserved_bytes": module.memory_reserved() - before,
        }
        if count == 1:
            ways = {"runner": lambda r=runner, x=x: r(x), "eager": lambda x=x: model(x)}
            if real:
                trees = torch.compile(model, mode="reduce-overhead")
                ways["reduce-overhead"] = lambda trees=trees, x=x: trees(x)
            with torch.no_grad():
                times = take_turns({name: timed(call) for name, call in ways.items()}, rounds, warm_up=4)
            row["step_ms"] = {name: summary(each) for name, each in times.items()}
        runner.release()
        del runner
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Time to the first result by depth, and what it is made of."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    rows = result["start"]
    depths = [int(depth) for depth in rows]
    for key, label in (
        ("torch_compile_s", "torch.compile"),
        ("runner_s", "PiecewiseRunner"),
        ("runner_inductor_s", "of which Inductor"),
    ):
        axes.plot(depths, [rows[str(depth)][key] for depth in depths], marker="o", label=label)
    axes.set(xlabel="equal layers", ylabel="seconds to the first result", xticks=depths, ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an image of the part `start`; needs matplotlib")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15, help="of calls")
    parser.add_argument("--starts", type=int, default=3, help="rounds of the parts start and warm")
    parser.add_argument("--prepare-once", nargs=3, help=argparse.SUPPRESS)
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "host": lambda args: host(args.rounds),
        "memory": lambda args: memory(16, args.width),
        "device": lambda args: device(16, args.width, args.rounds),
        "throughput": lambda args: throughput([d for d in args.depths if d > 4], args.width, args.rounds),
        "start": lambda args: start(args.depths, args.width, args.starts),
        "warm": lambda args: warm([args.depths[0], args.depths[-1]], args.width, args.starts),
    }
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    args = parser.parse_args()
    if args.prepare_once:
        prepare_once(int(args.prepare_once[0]), int(args.prepare_once[1]), args.prepare_once[2])
        return 0
    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.cuda.is_available()}
    if not torch.cuda.is_available():
        print("no CUDA device: replay and capture times of a device are not measured", file=sys.stderr)
    for name in args.parts:
        result[name] = parts[name](args)
        print(json.dumps({name: result[name]}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
