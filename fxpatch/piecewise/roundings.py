"""How many roundings there are on the longest way through a graph: what `tolerance.Tolerance.after` takes.

An operation rounds its result once; a sum of n terms in float32 or wider rounds n times. Half types are summed in
float32 (`at::acc_type`) and rounded once.

A rounding counts by its variance: one to float32 is next to nothing for a result in bfloat16 (a norm that sums 4096
terms in float32 would otherwise make 4096 roundings of 0.8% of it, and anything would be allowed). One to bfloat16 is a
large one for a result in float32, unless a reference decides what more than the result's own roundings has made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxpatch.piecewise.lint import name_of
from fxpatch.tolerance import TOLERANCES

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_HALF = (torch.float16, torch.bfloat16)


def roundings(graphs: Iterable[GraphModule], *, backward: bool, decided: bool = True) -> Mapping[torch.dtype, int]:
    """Of all graphs, one behind the other, by the dtype of the result. A backward pass goes back the same way, and sums
    over the rows besides.

    Args:
        decided: by a reference, where a result is off by more than roundings to its own dtype explain.
    """
    made = [_Ways(gm) for gm in graphs]
    found = {}
    for dtype in TOLERANCES:
        eps = torch.finfo(dtype).eps
        total = sum(each.longest(eps, decided) for each in made)
        rows = max((each.rows(eps, decided) for each in made), default=0.0)
        found[dtype] = max(1, round(2 * total + rows if backward else total))
    return found


class _Ways:
    """One graph: each node's roundings and their unit, and what it reads."""

    def __init__(self, gm: GraphModule) -> None:
        self._nodes = [
            (node, *(_own(node) if node.op in ("call_function", "call_method") else (0, 0.0)), node.all_input_nodes)
            for node in gm.graph.nodes
        ]
        self._rows = _rows(gm)

    def longest(self, eps: float, decided: bool) -> float:
        """The roundings on the longest way, in roundings to `eps`."""
        longest: dict[Node, float] = {}
        for node, many, unit, read in self._nodes:
            before = max((longest[each] for each in read), default=0.0)
            longest[node] = before + many * _weight(unit, eps, decided)
        return max(longest.values(), default=0.0)

    def rows(self, eps: float, decided: bool) -> float:
        """The roundings of a sum over the rows, in the widest type that any of them has."""
        return max((many * _weight(unit, eps, decided) for unit, many in self._rows.items()), default=0.0)


def _weight(unit: float, eps: float, decided: bool) -> float:
    weight = (unit / eps) ** 2
    return min(1.0, weight) if decided else weight


def _own(node: Node) -> tuple[int, float]:
    """How often a node rounds, and to which unit."""
    results = [each for each in _tensors(node) if each.is_floating_point() or each.is_complex()]
    operands = [each for arg in node.all_input_nodes for each in _tensors(arg)]
    if not results or not operands:
        return 0, 0.0
    unit = torch.finfo(results[0].dtype).eps
    if results[0].dtype in _HALF:
        return 1, unit
    if name_of(node).split(".")[0] in _PRODUCTS and operands[0].dim():
        return 1 + _size(operands[0].shape[-1]), unit
    return max(1, max(_numel(each) for each in operands) // max(1, _numel(results[0]))), unit


def _rows(gm: GraphModule) -> Mapping[float, int]:
    """The largest number of rows that any value has, by the unit of its sums: what the gradient of a weight is summed
    over."""
    found: dict[float, int] = {}
    for node in gm.graph.nodes:
        for each in _tensors(node) if node.op != "placeholder" else ():
            if not each.dim():
                continue
            floating = (each.is_floating_point() or each.is_complex()) and each.dtype not in _HALF
            unit = torch.finfo(each.dtype if floating else torch.float32).eps
            found[unit] = max(found.get(unit, 0), _numel(each) // max(1, _size(each.shape[-1])))
    return found


def _tensors(node: Node) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(map(_size, tensor.shape))


def _size(side: Any) -> int:
    """A size that tracing left open counts as its example."""
    if isinstance(side, int):
        return side
    if side.node.is_nested_int():  # the sides of the parts of a nested tensor
        return 1
    hint = side.node.hint
    return int(hint) if hint is not None else 1
