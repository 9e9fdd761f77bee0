"""Does generated FX code give the device that the graph says? The oracle is `fx.Interpreter`, which generates none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter

from fxpatch.doctor.probe import Probe, Subject
from fxpatch.doctor.probes.checks import Differs, run_all
from fxpatch.repair.device_class import REAL


def echo(*args: Any, **kwargs: Any) -> Any:
    """What it is given: any change on the way shows."""
    return args, kwargs


def _text(device: Any) -> str:
    """A string in a graph that reads like generated code."""
    return f"want {device!r} or 'device'"


def _default(g: Graph, x: Any, d: Any) -> Any:
    return x, g.create_node("placeholder", "where", (d,))


POSITIONS: dict[str, Callable[[Graph, Any, Any], Any]] = {
    "argument": lambda g, x, d: g.call_function(echo, (x, d)),
    "keyword": lambda g, x, d: g.call_function(echo, (x,), {"device": d, "type": d}),
    "method argument": lambda g, x, d: g.call_method("format", ("{} {}", d, x)),
    "nested in lists": lambda g, x, d: g.call_function(echo, ([d, [d, (x, d)]], (d,))),
    "slice": lambda g, x, d: g.call_function(echo, (slice(d, x, d),)),
    "dict value": lambda g, x, d: g.call_function(echo, ({"a": d, "b": {"c": (d, [d])}},)),
    "dict key": lambda g, x, d: g.call_function(echo, ({d: x},)),
    "placeholder's default": lambda g, x, d: g.call_function(echo, _default(g, x, d)),
    "output": lambda g, x, d: (x, d, {"k": [d]}),
    "receiver": lambda g, x, d: g.call_method("__str__", (d,)),
    "text that looks like one": lambda g, x, d: g.call_function(echo, (_text(d), {_text(d): d})),
}
"""Where a device can stand in a graph: out-of-tree catalogue 2.1."""


def literals(device: str) -> tuple[Any, ...]:
    """The device with an index and without, and devices that a shim may map but a graph must keep."""
    return REAL(device, 0), REAL(device), REAL("cuda", 1), REAL("cpu"), REAL("meta")


def graph_module(position: str, device: Any, name: str) -> GraphModule:
    """A graph with one placeholder, called `name`, and `device` in that position."""
    graph = Graph()
    x = graph.placeholder(name)
    graph.output(POSITIONS[position](graph, x, device))
    return GraphModule({}, graph)


def expect_as_interpreted(gm: GraphModule) -> None:
    """Raises:
    Differs: the generated code gives something else than `Interpreter`.
    """
    want, got = repr(Interpreter(gm).run("x")), repr(gm("x"))
    if got != want:
        raise Differs(f"generated code gives {got}, and the graph says {want}")


def _over_positions(subject: Subject, name: str) -> str:
    def check(position: str) -> None:
        for device in literals(subject.device):
            expect_as_interpreted(graph_module(position, device, name))

    run_all({position: partial(check, position) for position in POSITIONS})
    return f"{len(POSITIONS)} positions, {len(literals(subject.device))} devices: as fx.Interpreter runs them"


def _placeholder_called_device(subject: Subject) -> str:
    def check() -> None:
        device = REAL(subject.device, 0) if subject.device != "cpu" else REAL("cpu")
        expect_as_interpreted(graph_module("argument", device, "device"))

    return run_all({"a placeholder called `device` beside a literal": check})


def _copies(subject: Subject) -> str:
    ways: dict[str, Callable[[GraphModule], GraphModule]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),  # our own bytes
        "Transformer": lambda gm: torch.fx.Transformer(gm).transform(),
    }

    def check(way: Callable[[GraphModule], GraphModule]) -> None:
        for device in literals(subject.device):
            gm = graph_module("keyword", device, "x")
            want, got = repr(Interpreter(gm).run("x")), repr(way(gm)("x"))
            if got != want:
                raise Differs(f"gives {got}, and the graph says {want}")

    return run_all({name: partial(check, way) for name, way in ways.items()})


PROBES = (
    Probe(
        name="fx-literals",
        stage="fx",
        title="device literals in FX code",
        run=lambda subject: _over_positions(subject, "x"),
        why="under a replaced torch.device generated code raises NameError: name 'device' is not defined, or runs "
        "cuda:1 as another device; a regex over the source changes strings (out-of-tree catalogue A1, S5, S8)",
        todo="fxpatch.install() before torch.compile or torch.fx",
    ),
    Probe(
        name="fx-placeholder-device",
        stage="fx",
        title="an input called `device`",
        run=_placeholder_called_device,
        why="an input called `device` hides the name that generated code calls: TypeError: 'str' object is not "
        "callable, on plain CPU torch too (out-of-tree catalogue B9)",
        todo="fxpatch.install() writes literals of custom devices out; elsewhere give the input another name",
    ),
    Probe(
        name="fx-copies",
        stage="fx",
        title="copies and pickles of graphs",
        run=_copies,
        why="a GraphModule generates its code anew when it is copied, unpickled or transformed, and its pickle says "
        "what to import (out-of-tree catalogue A1)",
        todo="fxpatch.install() before the graph is pickled; one written under a shim stays broken elsewhere",
    ),
)
