"""What the codegen rewrite costs: `GraphModule.recompile()` without it, with it, and with one `re.sub` over all source.

Bounds: with the patch at most 1.02x where no custom device occurs, at most 1.05x where every tenth node has one,
cheaper than the whole-source substitution, and linear in nodes. The three ways take turns within each round, in
rotating order; a ratio is the median over rounds of that round's ratio, so that what slows the machine slows both.

    python benchmarks/codegen.py [--json FILE] [--rounds 1.0]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from interleaved import milliseconds, ratio, summary, take_turns
from torch.fx.graph import CodeGen, Graph
from torch.fx.graph_module import GraphModule, _loader

from fxpatch.codegen import PATCH, rewrite
from fxpatch.patching import Edits

ROUNDS = {100: 400, 1_000: 100, 10_000: 20}
WHOLE_SOURCE = re.compile(r"\bdevice\(type='([^']+)'(?:,\s*index=(\d+))?\)")


def build(nodes: int, device: torch.device) -> GraphModule:
    """A chain of additions in which every tenth node names `device`."""
    graph = Graph()
    x = graph.placeholder("x")
    for i in range(nodes):
        if i % 10 == 0:
            like = graph.call_function(torch.ops.aten.zeros.default, ([3],), {"device": device})
        else:
            x = graph.call_function(torch.ops.aten.add.Tensor, (x, like))
    graph.output(x)
    return GraphModule({}, graph)


def substitute(src: str) -> str:
    """The rewrite as one substitution over the whole source."""
    return WHOLE_SOURCE.sub(
        lambda m: f"torch.device('{m[1]}')" if m[2] is None else f"torch.device('{m[1]}:{m[2]}')", src
    )


@contextmanager
def stock() -> Any:
    yield


@contextmanager
def patched() -> Any:
    edits = Edits()
    PATCH.apply("musa", False, edits)
    try:
        yield
    finally:
        edits.undo()


@contextmanager
def substituted() -> Any:
    original = CodeGen._gen_python_code

    def wrapper(self: Any, nodes: Any, root_module: Any, namespace: Any, **kwargs: Any) -> Any:
        result = original(self, nodes, root_module, namespace, **kwargs)
        return dataclasses.replace(result, src=substitute(result.src))

    CodeGen._gen_python_code = wrapper  # type: ignore[method-assign]
    try:
        yield
    finally:
        CodeGen._gen_python_code = original  # type: ignore[method-assign]


def recompile(module: GraphModule, way: Callable[[], Any]) -> float:
    with way():
        _loader.eval_cache.clear()  # every recompile() leaves its source there
        gc.collect()
        gc.disable()
        try:
            return milliseconds(module.recompile)
        finally:
            gc.enable()


def measure(nodes: int, device: torch.device, rounds: int) -> dict[str, Any]:
    module = build(nodes, device)
    ways = {"stock": stock, "patched": patched, "substituted": substituted}
    whole = take_turns({name: lambda way=way: recompile(module, way) for name, way in ways.items()}, rounds)
    code = module.graph.python_code("self")
    alone = take_turns(
        {
            "rewrite": lambda: milliseconds(lambda: rewrite(code.src, code.globals, "musa")),
            "substitute": lambda: milliseconds(lambda: substitute(code.src)),
        },
        rounds * 3,
    )
    return {
        "nodes": nodes,
        "device": device.type,
        "characters": len(code.src),
        "recompile": {name: summary(times) for name, times in whole.items()},
        "ratio": {name: ratio(whole[name], whole["stock"]) for name in ("patched", "substituted")},
        "alone": {name: summary(times) for name, times in alone.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the measurements there as well")
    parser.add_argument("--rounds", type=float, default=1.0, help="multiply the number of rounds")
    options = parser.parse_args()
    if torch._C._get_privateuse1_backend_name() != "musa":
        torch.utils.rename_privateuse1_backend("musa")

    print(f"torch {torch.__version__}; recompile() in ms, median (interquartile range); every tenth node has a device")
    print(f"{'nodes':>7} {'device':>7} {'stock':>16} {'patched':>16} {'ratio':>7} {'re.sub':>16} {'ratio':>7}", end="")
    print(f" | alone: {'rewrite':>16} {'re.sub':>16}")
    results = []
    for device in (torch.device("cpu"), torch.device("musa", 0)):
        for nodes, rounds in ROUNDS.items():
            result = measure(nodes, device, max(4, int(rounds * options.rounds)))
            results.append(result)
            cell = lambda s: f"{s['median_ms']:8.3f} ({s['iqr_ms']:.3f})"  # noqa: E731
            times, ratios, alone = result["recompile"], result["ratio"], result["alone"]
            print(
                f"{nodes:>7} {device.type:>7} {cell(times['stock']):>16} {cell(times['patched']):>16}"
                f" {ratios['patched']:>7.3f} {cell(times['substituted']):>16} {ratios['substituted']:>7.3f}"
                f" |        {cell(alone['rewrite']):>16} {cell(alone['substitute']):>16}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
