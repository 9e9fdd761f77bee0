"""The steps that random FX graphs are made of: each appends one operator to a graph, or the few that it takes to make
one that is valid for whatever values there are. `fx_graphs` says why it is done like this.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

_LARGEST = 512  # elements: what would make a bigger value is left out
_BOUND = 8


@dataclass(frozen=True)
class Value:
    """A node, and a meta tensor with the geometry and dtype that its value will have."""

    node: Node
    meta: torch.Tensor


@dataclass
class Builder:
    device: torch.device
    graph: Graph = field(default_factory=Graph)
    values: list[Value] = field(default_factory=list)

    def add(self, node: Node, meta: torch.Tensor) -> Value:
        value = Value(node, meta)
        if meta.dtype is not torch.bool:  # half of all operators refuse those: they are used where they are made
            self.values.append(value)
        return value

    def pick(self, number: int) -> Value:
        return self.values[number % len(self.values)]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Value:
        """Appends a call; a string is a method. `self.device` among the arguments is the device literal."""
        meta = self._run(target, args, kwargs)
        return self.add(self._node(target, args, kwargs), meta)

    def call_for(self, wanted: tuple[int, ...], target: Any, *args: Any, **kwargs: Any) -> list[Value]:
        """Appends a call with several results; hands those at `wanted` over without adding them to the values."""
        metas = self._run(target, args, kwargs)
        results = self._node(target, args, kwargs)
        return [Value(self.graph.call_function(operator.getitem, (results, n)), metas[n]) for n in wanted]

    def module(self, name: str, like: Value) -> Value:
        return self.add(self.graph.call_module(name, (like.node,)), like.meta.clone())

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        nodes = _replaced(lambda x: x.node if isinstance(x, Value) else x, (args, kwargs))
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        return make(target, nodes[0], nodes[1])

    def _run(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def as_meta(x: Any) -> Any:
            return x.meta if isinstance(x, Value) else torch.device("meta") if isinstance(x, torch.device) else x

        args, kwargs = _replaced(as_meta, (args, kwargs))
        return getattr(args[0], target)(*args[1:]) if isinstance(target, str) else target(*args, **kwargs)


def _replaced(leaf: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)(_replaced(leaf, item) for item in tree)
    if isinstance(tree, dict):
        return {key: _replaced(leaf, item) for key, item in tree.items()}
    return leaf(tree)


# -- the kinds of step ---------------------------------------------------------------------------------------------
# Each takes two values and a number, and appends what makes sense for them.


def _dim(a: Value, number: int) -> int:
    return number % a.meta.dim()


def _with_a_dimension(b: Builder, a: Value) -> Value:
    return a if a.meta.dim() else b.call(torch.unsqueeze, a, 0)


def _may_double(a: Value) -> bool:
    return a.meta.numel() * 2 <= _LARGEST


def _bounded(b: Builder, a: Value) -> Value:
    """`a`, clamped; `a` itself, which may be anything, is not to be picked."""
    b.values = [value for value in b.values if value is not a]
    return b.call(torch.clamp, a, -_BOUND, _BOUND)


def _partner(b: Builder, a: Value, other: Value) -> Value:
    """`other`, or its sum where the two do not broadcast to something small."""
    try:
        shape = torch.broadcast_shapes(a.meta.shape, other.meta.shape)
    except RuntimeError:
        return _sum(b, other)
    return other if shape.numel() <= _LARGEST else _sum(b, other)


def _sum(b: Builder, a: Value) -> Value:
    return _bounded(b, b.call(torch.sum, a))


def _pointwise(b: Builder, a: Value, other: Value, number: int) -> None:
    target = (torch.add, operator.sub, torch.mul, torch.maximum)[number % 4]
    _bounded(b, b.call(target, a, _partner(b, a, other)))


def _unary(b: Builder, a: Value, _: Value, number: int) -> None:
    b.call((torch.neg, "abs", torch.sign, "clone")[number % 4], a)


def _submodule(b: Builder, a: Value, _: Value, number: int) -> None:
    b.module("relu", a)


def _where(b: Builder, a: Value, other: Value, number: int) -> None:
    b.call(torch.where, b.call(operator.gt, a, number), a, _partner(b, a, other))


def _reduce(b: Builder, a: Value, _: Value, number: int) -> None:
    a = _with_a_dimension(b, a)
    _bounded(b, b.call(torch.sum, a, _dim(a, number), bool(number % 2)))


def _matmul(b: Builder, a: Value, _: Value, number: int) -> None:
    rows = b.call("flatten", _with_a_dimension(b, a), 1) if a.meta.dim() > 1 else b.call("reshape", a, 1, -1)
    if rows.meta.shape[0] ** 2 <= _LARGEST:
        _bounded(b, b.call(operator.matmul, rows, b.call("t", rows)))


def _view(b: Builder, a: Value, _: Value, number: int) -> None:
    a = _with_a_dimension(b, a)
    dim = _dim(a, number)
    kind = number % 6
    if kind == 0:
        b.call("transpose", a, dim, -1)
    elif kind == 1:
        b.call(torch.unsqueeze, a, dim)
    elif kind == 2:
        b.call(operator.getitem, a, (Ellipsis, slice(None, None, 2)))
    elif kind == 3:
        b.call("select", a, dim, a.meta.shape[dim] - 1)
    elif kind == 4:
        b.call("narrow", a, dim, 0, (a.meta.shape[dim] + 1) // 2)
    elif _may_double(a):
        b.call("expand", a, 2, *a.meta.shape)


def _in_place(b: Builder, a: Value, other: Value, number: int) -> None:
    if any(side > 1 and step == 0 for side, step in zip(a.meta.shape, a.meta.stride(), strict=True)):
        a = b.call("contiguous", a)
    kind = number % 5
    if kind == 0:
        b.call("add_", a, number % 3)
    elif kind == 1:
        b.call(operator.iadd, a, 1)
    elif kind == 2:
        b.call("clamp_", a, -2, 2)
    elif kind == 3:
        b.call("fill_", a, number % 3)
    else:
        b.call("copy_", a, _sum(b, other))


def _literal(b: Builder, a: Value, _: Value, number: int) -> None:
    """Where a device stands in the code: the reason for the whole exercise."""
    kind = number % 5
    if kind == 0:
        b.call(torch.zeros, list(a.meta.shape), dtype=a.meta.dtype, device=b.device)
    elif kind == 1:
        b.call(torch.full_like, a, number % _BOUND, device=b.device)
    elif kind == 2:
        b.call(torch.arange, 1 + number % 4, device=b.device)
    elif kind == 3:
        b.call("to", a, b.device)
    else:
        b.call(torch.tensor, [number % 3, 2], dtype=a.meta.dtype, device=b.device)


def _index(b: Builder, a: Value, _: Value, number: int) -> None:
    a = _with_a_dimension(b, a)
    dim = _dim(a, number)
    b.call(torch.index_select, a, dim, b.call(torch.arange, (a.meta.shape[dim] + 1) // 2, device=b.device))


def _several(b: Builder, a: Value, _: Value, number: int) -> None:
    a = _with_a_dimension(b, a)
    dim = _dim(a, number)
    kind = number % 3
    if kind == 0:
        b.values += b.call_for((0, a.meta.shape[dim] - 1), "unbind", a, dim)
    elif kind == 1:
        b.values += b.call_for((0,), torch.chunk, a, 2, dim)
    else:
        ascending, indices = b.call_for((0, 1), torch.sort, a, stable=True, dim=dim)
        b.values.append(ascending)
        _bounded(b, indices)


def _join(b: Builder, a: Value, _: Value, number: int) -> None:
    a = _with_a_dimension(b, a)
    if _may_double(a):
        b.call((torch.cat, torch.stack)[number % 2], [a, a], _dim(a, number))


def _cast(b: Builder, a: Value, _: Value, number: int) -> None:
    b.call("to", a, (torch.float32, torch.int64, torch.bfloat16)[number % 3])


KINDS: dict[str, Callable[[Builder, Value, Value, int], None]] = {
    "literal": _literal,
    "pointwise": _pointwise,
    "unary": _unary,
    "module": _submodule,
    "where": _where,
    "reduce": _reduce,
    "matmul": _matmul,
    "view": _view,
    "in-place": _in_place,
    "index": _index,
    "several": _several,
    "join": _join,
    "cast": _cast,
}
