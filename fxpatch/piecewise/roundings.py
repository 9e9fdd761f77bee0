"""How many roundings there are on the longest way through a graph: what `tolerance.Tolerance.after` takes.

An operation rounds its result once; a sum of n terms in float32 or wider rounds n times. Half types are summed in
float32 (`at::acc_type`) and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxpatch.piecewise.lint import name_of

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_HALF = (torch.float16, torch.bfloat16)


def roundings(graphs: Iterable[GraphModule], *, backward: bool) -> int:
    """Of all graphs, one behind the other. A backward pass goes back the same way, and sums over the rows besides."""
    total = sum(map(_longest, graphs))
    return max(1, 2 * total + max((_rows(gm) for gm in graphs), default=0) if backward else total)


def _longest(gm: GraphModule) -> int:
    longest: dict[Node, int] = {}
    for node in gm.graph.nodes:
        before = max((longest[each] for each in node.all_input_nodes), default=0)
        longest[node] = before + (_own(node) if node.op in ("call_function", "call_method") else 0)
    return max(longest.values(), default=0)


def _own(node: Node) -> int:
    results = [each for each in _tensors(node) if each.is_floating_point() or each.is_complex()]
    operands = [each for arg in node.all_input_nodes for each in _tensors(arg)]
    if not results or not operands:
        return 0
    if results[0].dtype in _HALF:
        return 1
    if name_of(node).split(".")[0] in _PRODUCTS and operands[0].dim():
        return 1 + _size(operands[0].shape[-1])
    return max(1, max(_numel(each) for each in operands) // max(1, _numel(results[0])))


def _rows(gm: GraphModule) -> int:
    """The largest number of rows that any value has: what the gradient of a weight is summed over."""
    values = [each for node in gm.graph.nodes if node.op != "placeholder" for each in _tensors(node)]
    return max((_numel(each) // max(1, _size(each.shape[-1])) for each in values if each.dim()), default=0)


def _tensors(node: Node) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(map(_size, tensor.shape))


def _size(side: Any) -> int:
    """A size that tracing left open counts as its example."""
    if isinstance(side, int):
        return side
    hint = side.node.hint
    return int(hint) if hint is not None else 1
