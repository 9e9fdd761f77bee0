"""Cutting a graph where it cannot be captured: pieces for device graphs, and pieces that run between them.

A rule looks at one node and gives a reason for it to run between the graphs, or None. Neighbours with a reason share a
piece; taking one result out of a tuple stays with what made the tuple; a piece that only makes views is told apart,
because its results have fixed addresses, and it needs no step in a replay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.passes.split_module import split_module

from fxpatch.errors import SplitError
from fxpatch.piecewise.lint import Rule, name_of

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
    count: int = field(default=0)


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
        why = next(filter(None, (rule(node) for rule in rules)), None)
        if part < 0 or inside is not (why is None):
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
        elif node.op == "call_function" and node.target is operator.getitem:
            source, place = node.args
            numbers[node] = len(numbers)
            assert place == len(made[source].outputs), "split_module takes results out in their order"
            made[source].outputs += (numbers[node],)
        elif node.op == "output":
            for each in node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]:
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


# -- what the caller and the profile say -------------------------------------------------------------------------------


def rules_of(given: Iterable[Any], *, operators: Iterable[str] = (), tags: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Rules for splitting operators.

    Args:
        given: the caller's: operators (`torch.ops.ns.op`, an overload, a `torch.library.custom_op`), their names
            (`"ns::op"`, `"ns::op.overload"`), names of functions and methods (`"scaled_dot_product_attention"`), tags
            (`torch.Tag.cudagraph_unsafe`), or functions of a node that return a reason, True, or None.
        operators, tags: the profile's, by name; what is not registered splits nothing.

    Raises:
        SplitError: one of `given` is none of these, or an operator that is not registered.
    """
    names = dict.fromkeys(operators, "splitting operator of the profile")
    wanted_tags = {getattr(torch.Tag, tag) for tag in tags if hasattr(torch.Tag, tag)}
    functions: list[Callable[[torch.fx.Node], Any]] = []
    for each in given:
        if isinstance(each, torch.Tag):
            wanted_tags.add(each)
        elif callable(getattr(each, "_opoverload", None)):
            names[each._opoverload.name()] = "splitting operator"
        elif isinstance(each, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            names[_operator_name(each)] = "splitting operator"
        elif isinstance(each, str):
            names[_known(each)] = "splitting operator"
        elif callable(each):
            functions.append(each)
        else:
            raise _unknown(repr(each))

    def by_name(node: torch.fx.Node) -> str | None:
        return next((names[name] for name in _names(node) if name in names), None)

    def by_tag(node: torch.fx.Node) -> str | None:
        found = wanted_tags & _tags(node)
        return f"tagged {', '.join(sorted(tag.name for tag in found))}" if found else None

    def by_function(node: torch.fx.Node) -> str | None:
        for function in functions:
            why = function(node)
            if why:
                return why if isinstance(why, str) else f"{getattr(function, '__name__', function)} says so"
        return None

    return by_name, by_tag, by_function


def idle(given: Sequence[Any], gm: torch.fx.GraphModule) -> list[str]:
    """What the caller wanted to split at and the graph has not: a name that has changed, more often than not."""
    notes = []
    for each in given:
        rules = rules_of([each])
        if not any(rule(node) for node in gm.graph.nodes for rule in rules):
            notes.append(f"split={each!r} is nowhere in the graph")
    return notes


def _names(node: torch.fx.Node) -> list[str]:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return [target.name(), name, f"{name}.{target._overloadname}"]
    if isinstance(target, torch._ops.OpOverloadPacket):
        name = _operator_name(target)
        return [name, *(f"{name}.{overload}" for overload in _taken(target))]
    return [name_of(node)] if node.op in ("call_function", "call_method") else []


def _taken(packet: Any) -> list[str]:
    """The overloads that a call of a name may take: where there are several, tracing has not said which."""
    return [str(name) for name in packet.overloads()]


def _operator_name(op: Any) -> str:
    return str(op.name()) if isinstance(op, torch._ops.OpOverload) else str(op._qualified_op_name)


def _tags(node: torch.fx.Node) -> set[Any]:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return {tag for name in target.overloads() for tag in getattr(target, name).tags}
    return set(target.tags) if isinstance(target, torch._ops.OpOverload) else set()


def _known(name: str) -> str:
    namespace, colons, rest = name.partition("::")
    if colons:
        operator_name, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator_name, None)
        if packet is None or (overload and overload not in packet.overloads()):
            raise _unknown(repr(name))
    elif not name.isidentifier():
        raise _unknown(repr(name))
    return name


def _unknown(seen: str) -> SplitError:
    return SplitError(
        "This cannot split a graph.",
        seen=seen,
        expected="an operator or its name, the name of a function or method, a torch.Tag, or a function of a node",
        hint="import the library that registers the operator first; torch.ops.<namespace> has its operators",
    )
