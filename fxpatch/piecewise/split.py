"""Cutting a graph where it cannot be captured: pieces for device graphs, and pieces that run between them.

A rule looks at one node and gives a reason for it to run between the graphs, or None. Neighbours with a reason share a
piece; taking one result out of a tuple stays with what made the tuple; a piece that only makes views is told apart,
because its results have fixed addresses, and it needs no step in a replay.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.passes.split_module import split_module

from fxpatch.piecewise.lint import Rule, name_of, reason

_VIEWS = {
    *("view", "view_as", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "narrow", "select"),
    *(
        "split",
        "chunk",
        "unbind",
        "t",
        "movedim",
        "swapaxes",
        "unflatten",
        "detach",
        "diagonal",
        "size",
        "dim",
        "numel",
    ),
    *("getitem", "getattr", "add", "sub", "mul", "floordiv", "mod", "neg", "sym_sum", "sym_max", "sym_min"),
}
_ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "neg", "sym_sum", "sym_max", "sym_min"}


@dataclass(frozen=True)
class Value:
    """A value between pieces, by its number."""

    number: int


@dataclass
class Piece:
    """Part of the graph, with a module of its own that returns a tuple.

    Args:
        kind: `"graph"` (to be captured), `"split"` (runs between) or `"views"`.
        gm: the module.
        inputs, outputs: numbers of values.
        reasons: why its nodes run between the graphs: `"ns::op: splitting operator"`.
    """

    index: int
    kind: str
    gm: torch.fx.GraphModule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    reasons: tuple[str, ...] = ()


@dataclass
class Split:
    """A graph in pieces.

    Args:
        pieces: in order.
        feed: for each placeholder of the graph the number of its value.
        results: the graph's results: `Value`s, and constants.
        count: how many values there are.
    """

    pieces: list[Piece]
    feed: list[int]
    results: list[Any]
    count: int


def split(gm: torch.fx.GraphModule, rules: Sequence[Rule]) -> Split:
    """Cuts `gm` wherever one of `rules` gives a reason."""
    parts: dict[torch.fx.Node, int] = {}
    reasons: dict[int, list[str]] = {}
    part, inside = -1, None
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        producer = node.args[0] if node.target is operator.getitem else None
        if isinstance(producer, torch.fx.Node) and parts.get(producer) in reasons and _is_tuple(producer):
            parts[node] = parts[producer]
            continue
        why = reason(node, rules)
        if inside is not (why is None):
            part, inside = part + 1, why is None
        parts[node] = part
        if why is not None:
            reasons.setdefault(part, []).append(f"{name_of(node)}: {why}")
    outer = split_module(gm, gm, lambda node: parts[node], keep_original_order=True, tuple_return=True)
    return _pieces(outer, {f"submod_{number}": tuple(why) for number, why in reasons.items()})


def _pieces(outer: torch.fx.GraphModule, reasons: dict[str, tuple[str, ...]]) -> Split:
    numbers: dict[torch.fx.Node, int] = {}
    made: dict[torch.fx.Node, Piece] = {}
    pieces: list[Piece] = []
    feed: list[int] = []
    results: list[Any] = []
    for node in outer.graph.nodes:
        if node.op == "placeholder":
            numbers[node] = len(numbers)
            feed.append(numbers[node])
        elif node.op == "call_module":
            gm = getattr(outer, node.target)
            why = reasons.get(node.target, ())
            kind = "split" if why else "views" if only_views(gm) else "graph"
            inputs = tuple(numbers[each] for each in node.args)
            made[node] = Piece(len(pieces), kind, gm, inputs, (), why)
            pieces.append(made[node])
        elif node.target is operator.getitem:
            source, place = node.args
            numbers[node] = len(numbers)
            assert place == len(made[source].outputs), "split_module takes results out in their order"
            made[source].outputs += (numbers[node],)
        elif node.op == "output":
            (given,) = node.args
            for each in given if isinstance(given, (tuple, list)) else [given]:
                results.append(Value(numbers[each]) if isinstance(each, torch.fx.Node) else each)
        else:
            raise AssertionError(f"split_module left {node.format_node()} outside of the pieces")
    return Split(pieces, feed, results, len(numbers))


def only_views(gm: torch.fx.GraphModule) -> bool:
    """Whether a piece makes nothing but views and sizes."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name = name_of(node)
        value = node.meta.get("example_value")
        if name not in _VIEWS or (name in _ARITHMETIC and isinstance(value, torch.Tensor)):
            return False
        if name == "getitem" and isinstance(value, torch.Tensor) and not _basic(node.args[1]):
            return False
    return True


def _basic(index: Any) -> bool:
    """Whether indexing gives a view: no tensor among the indices."""
    each = index if isinstance(index, tuple) else (index,)
    return all(
        not isinstance(i, torch.fx.Node) or not isinstance(i.meta.get("example_value"), torch.Tensor) for i in each
    ) and not any(isinstance(i, (list, bool)) for i in each)


def _is_tuple(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))
