"""What a node of Dynamo's graph is called, where it comes from, what it writes to, and the graph up to it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxpatch.piecewise.lint import name_of, writes


def operator_name(node: Node) -> str:
    """What a node calls: `"aten::add"`, `"mylib::attention"`, `"softmax"`."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return name_of(node)


def prefix(gm: GraphModule, last: Node, *, live: bool = False) -> GraphModule:
    """The graph up to a node.

    Args:
        gm: a graph.
        last: its value is the result; where that is no tensor (an operator that only writes), what it was given is.
        live: with all values that nodes behind it read.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    nodes = list(gm.graph.nodes)
    end = nodes.index(last) + 1
    for node in nodes[:end]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = [last] if _is_tensor(last) else [each for each in last.all_input_nodes if _is_tensor(each)]
    if live:
        behind = set(nodes[end:])
        results += [
            each for each in nodes[:end] if each.op != "placeholder" and _is_tensor(each) and behind & set(each.users)
        ]
    graph.output(tuple(copies[each] for each in dict.fromkeys(results)))
    return GraphModule(gm, graph)


def writes_in_place(node: Node) -> bool:
    """Whether an operation does write to an argument; those that can are asked whether they are told to."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    by_place = ("relu", "dropout", "silu", "hardtanh", "elu", "selu", "celu", "leaky_relu", "threshold")
    return writes(node) and (operator_name(node) not in by_place or any(arg is True for arg in node.args))


def is_in(node: Node, layer: str) -> bool:
    """Whether a node belongs to a layer, or to one inside of it."""
    places = [str(place) for place, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return any(place.endswith(f".{layer}") for place in places)


def _is_tensor(node: Node) -> bool:
    """Whether a node's value is a tensor, or has some."""
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def line_of(node: Node) -> str:
    """The innermost line of source that a node comes from: `file:12: y = x + 1`."""
    lines = (node.meta.get("stack_trace") or node.stack_trace or "").strip().splitlines()
    at = [i for i, line in enumerate(lines) if line.strip().startswith("File ") and "<fxpatch verify" not in line]
    if not at:
        return ""
    place = lines[at[-1]].strip().removeprefix("File ").replace('"', "").replace(", line ", ":").split(", in ")[0]
    code = lines[at[-1] + 1].strip() if len(lines) > at[-1] + 1 else ""
    return f"{place}: {code if len(code) <= 120 else code[:117] + '...'}"


def named(node: Node) -> str:
    line = line_of(node)
    return f"{operator_name(node)} ({node.name})" + (f" at {line}" if line else "")


def shapes_of(node: Node) -> str:
    def shape(value: Any) -> str:
        found = [each for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]
        return ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in found)

    given = ", ".join(filter(None, (shape(each.meta.get("example_value")) for each in node.all_input_nodes)))
    returned = shape(node.meta.get("example_value"))
    return f"{given or '()'} -> {returned or '()'}"
