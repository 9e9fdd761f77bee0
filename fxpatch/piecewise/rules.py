"""Where a graph is cut, in the words of a caller or a profile: operators, names, tags, functions of a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fxpatch.errors import SplitError
from fxpatch.piecewise.lint import Rule, name_of


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
