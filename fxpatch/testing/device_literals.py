"""Every place in which a device can stand in an FX graph, and the oracle for it: `fx.Interpreter`, which runs a graph
without generating code. The functions that the graphs call hand back what they are given, so that any change shows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Interpreter

from fxpatch.privateuse1 import private_type


class Pair(NamedTuple):
    device: Any
    other: Any


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


class Echo(torch.nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def _text(d: torch.device) -> str:
    """A string that holds what generated code holds for `d`, and for the device that codegen rewrites."""
    return f"{d!r} {torch._C.device(private_type(), 0)!r}"


def _inplace(g: Graph, x: Any, d: torch.device) -> Any:
    started = g.call_function(echo, (x,))
    return g.call_function(operator.iadd, (started, (d, _text(d))))


# each adds to a graph what uses the device `d`, and text that looks like it, and an input `x`
POSITIONS: dict[str, Callable[[Any, Any, torch.device], Any]] = {
    "positional": lambda g, x, d: g.call_function(echo, (x, d)),
    "keyword": lambda g, x, d: g.call_function(echo, (x,), {"device": d, "torch": d, "type": "musa"}),
    "method argument": lambda g, x, d: g.call_method("__eq__", (x, d)),
    "method keyword": lambda g, x, d: g.call_method("format", ("{d} {s}",), {"d": d, "s": _text(d)}),
    "module argument": lambda g, x, d: g.call_module("echo", (x, d), {"device": d}),
    "list, tuple": lambda g, x, d: g.call_function(echo, ([d, [d, x]], (d,), (d, (x, d)), [])),
    "slice": lambda g, x, d: g.call_function(echo, (slice(d, x, d), slice(None, d))),
    "dict value": lambda g, x, d: g.call_function(echo, ({"a": d, "b": {"c": (d, [d])}},)),
    "dict key": lambda g, x, d: g.call_function(echo, ({d: _text(d), _text(d): d},)),
    "frozenset": lambda g, x, d: g.call_function(echo, (frozenset([d]),)),
    "NamedTuple": lambda g, x, d: g.call_function(echo, (Pair(d, x), [Pair(d, _text(d))])),
    "output": lambda g, x, d: (x, d, {"k": d, _text(d): [d]}),
    "output alone": lambda g, x, d: d,
    "operator": lambda g, x, d: g.call_function(operator.eq, (x, d)),
    "reflected operator": lambda g, x, d: g.call_function(operator.ne, (d, d)),
    "in-place operator": _inplace,
    "getitem": lambda g, x, d: g.call_function(operator.getitem, ({d: 5, "x": _text(d)}, d)),
    "getattr": lambda g, x, d: g.call_function(getattr, (d, "type")),
    "receiver": lambda g, x, d: g.call_method("__str__", (d,)),
    "string": lambda g, x, d: (_text(d), f"want {_text(d)}", f"'{_text(d)}'", f'"{_text(d)}"', d),
    "escapes": lambda g, x, d: (f"\\'{_text(d)}", f"\n{_text(d)}\r", f"# {_text(d)}", f"'''{_text(d)}", d),
    "triple quotes": lambda g, x, d: ('"""', d, "'''", d, f'"""{_text(d)}"""', d, f"'{_text(d)}\"\"\"'"),
    "bytes": lambda g, x, d: (_text(d).encode(), {_text(d).encode(): d}),
    "string keyword": lambda g, x, d: g.call_function(echo, (), {"s": _text(d), "d": d}),
}  # fmt: skip


def graph_module(position: str, device: torch.device, *names: str) -> GraphModule:
    """A graph with placeholders called `names`, and `device` in that position."""
    graph = Graph()
    nodes = [graph.placeholder(name) for name in names]
    graph.output(POSITIONS[position](graph, nodes[0], device))
    return GraphModule({"echo": Echo()}, graph)


def constant(value: Any) -> Any:
    """A value free of `fx`'s immutable containers, as text: `==` does not tell a device from a device of a subclass,
    nor `1` from `True`."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(map(constant, value))})"
    if isinstance(value, (list, tuple)):
        return f"{'list' if isinstance(value, list) else 'tuple'}({', '.join(map(constant, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{constant(k)}: {constant(v)}' for k, v in value.items())})"
    if isinstance(value, slice):
        return f"slice({constant(value.start)}, {constant(value.stop)}, {constant(value.step)})"
    return repr(value)


def assert_runs_as_interpreted(gm: GraphModule, *args: Any, boxed: bool = False) -> None:
    """The generated code gives what `Interpreter`, which uses no codegen, gives."""
    generated = gm([*args]) if boxed else gm(*args)
    assert constant(generated) == constant(Interpreter(gm).run(*args)), gm.code
