"""That the native path is gone, asserted on the graph itself. The problem: an optimized forward may call the native
one (for a shape, or "while tracing"), a cache may hand out an older trace, a pass may have traced too early; the
decision table would still say "optimized". The rule: each node that came from a promoted operator's native forward is
found and named; a graph of which that cannot be told is refused as well.

What tells: the frames of a node's `stack_trace`. Those of `Decisions.apply()` carry the operator's name in their file
name; those of `forward_native` are known by file, function and lines, and their instance by `nn_module_stack`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fxpatch.errors import FxPatchError
from fxpatch.native.decisions import Decisions
from fxpatch.native.forwards import NATIVE, OPTIMIZED, marker
from fxpatch.native.operators import NativeOperator

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_COMPUTES = ("call_function", "call_method", "call_module")


class NativePathError(FxPatchError):
    """The native forward of a promoted operator is in a graph, or it cannot be told that it is not."""


@dataclass(frozen=True)
class _Source:
    """How an operator shows in stack traces. `lines` None: its native forward is not Python, only its marker tells."""

    op: NativeOperator
    file: str = ""
    function: str = ""
    lines: range | None = None

    def has(self, frame: re.Match[str]) -> bool:
        return (
            self.lines is not None
            and frame["file"] == self.file
            and frame["function"].strip() == self.function
            and int(frame["line"]) in self.lines
        )


def assert_native_absent(graph_module: torch.fx.GraphModule, decisions: Decisions) -> int:
    """Asserts that no node of the graph, or of a graph within it, comes from a promoted operator's native forward.

    Args:
        graph_module: as Dynamo made it, or later, as long as its nodes have their stack traces.
        decisions: those that it was traced under.

    Returns:
        The number of nodes that were looked at.

    Raises:
        NativePathError: names the operators and nodes.
    """
    nodes = [node for gm in _graphs(graph_module) for node in gm.graph.nodes if node.op in _COMPUTES]
    told = [node for node in nodes if node.meta.get("stack_trace")]
    if nodes and not told and decisions.promoted:
        raise NativePathError(
            "It cannot be told whether the native forwards are in the graph.",
            seen=f"{len(nodes)} nodes, none with a stack trace",
            expected="node.meta['stack_trace'], which Dynamo writes",
            hint="check the graph before the pass that drops it, or make the pass keep node.meta",
        )
    present: dict[str, list[str]] = {}
    for node in told:
        for name in native_owners(node, list(decisions.operators.values())):
            if name in decisions.promoted:
                present.setdefault(name, []).append(node.name)
    if present:
        raise NativePathError(
            "The native forward of a promoted operator is in the graph.",
            seen="; ".join(f"{name}: {_some(nodes)}" for name, nodes in present.items()),
            expected=f"nodes of {', '.join(decisions[name].optimized for name in present)} only",
            hint="trace within `with decisions.apply():`; demote it if its optimized forward calls forward_native",
        )
    return len(told)


def native_owners(node: torch.fx.Node, operators: list[NativeOperator]) -> list[str]:
    """The operators whose `forward_native` a node came from, outermost first.

    Where a frame could be that of several instances, and neither a marker nor `nn_module_stack` says whose it is,
    all of them are named.
    """
    sources = [_source(op) for op in operators]
    markers = {marker(kind, op.name): (op, kind) for op in operators for kind in (NATIVE, OPTIMIZED)}
    within = list(node.meta.get("nn_module_stack") or {})  # str(id(module)), outermost first (torch 2.13)
    owners: list[str] = []
    current: NativeOperator | None = None
    for frame in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if frame["file"] in markers:
            current, kind = markers[frame["file"]]
            if kind == NATIVE:
                owners.append(current.name)
            continue
        could = [source.op for source in sources if source.has(frame)]
        if current is not None and current in could:
            could = [current]
        elif could:
            known = [op for key in reversed(within) for op in could if _is(op, key)]
            could = known[:1] or could
        owners += [op.name for op in could]
    return list(dict.fromkeys(owners))


def _source(op: NativeOperator) -> _Source:
    code = op.native_code()
    if code is None:
        return _Source(op)
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return _Source(op, code.co_filename, code.co_name, range(min(lines), max(lines) + 1))


def _is(op: NativeOperator, key: str) -> bool:
    return key == str(id(op.module)) or key.startswith(f"{id(op.module)}@")


def _graphs(gm: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield module


def _some(nodes: list[str]) -> str:
    return f"{', '.join(nodes[:6])}{f' and {len(nodes) - 6} more' if len(nodes) > 6 else ''}"
