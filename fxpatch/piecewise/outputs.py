"""What a model returns, in terms of the results of its graph.

Outputs are found by identity: the model runs once through Dynamo, and each tensor in what it returns is looked up among
the graph's results, its inputs and the bound tensors. Numbers have no identity: the graph's are replaced by ones that
are found again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import TraceError
from fxpatch.piecewise.arguments import Arguments
from fxpatch.piecewise.buckets import LEAST
from fxpatch.piecewise.lint import unbacked
from fxpatch.piecewise.of_n import of_n
from fxpatch.piecewise.statics import front, padded


@dataclass(frozen=True)
class Output:
    """One leaf of what the model returns.

    Args:
        kind: `"result"` (number `at` of the graph's results), `"number"` (the same as a number: it depends on data),
            `"input"` (leaf `at` of the caller's arguments), `"size"` (a number that depends on n: `sizes[-1](n)`),
            `"shape"` (a `torch.Size`: `value` has an `Output` for each side), or `"constant"` (`value`; also a bound
            tensor).
        sizes: of a result: dimension -> how many of its elements are the caller's, as a function of n.
        open: whether its shape depends on data, so that nobody knows which of its elements padding made.
    """

    kind: str
    at: int = 0
    sizes: Mapping[int, Callable[[int], Any]] = field(default_factory=dict)
    value: Any = None
    open: bool = False


_SENTINEL = 1 << 50  # and the numbers after it; a float holds them exactly. The one before is n itself


def sentinel(number: int, node: Any, value: Any) -> Any:
    """A result as the code around the graph gets it: numbers are replaced by ones that are found again, by value, in
    what the model returns, wherever that code has put them (into a `torch.Size`, say)."""
    if isinstance(value, int):  # also True and False
        return _SENTINEL + number
    if _is_float(node):
        return torch.tensor(float(_SENTINEL + number), dtype=torch.float64)
    return value


def _is_float(node: Any) -> bool:
    """Whether a result is a float, which graphs return in a tensor; the code around takes it out."""
    return isinstance(node, torch.fx.Node) and node.target is torch.scalar_tensor


def with_another_n(arguments: Arguments, leaves: Sequence[Any], call: Any) -> tuple[int, Any]:
    """An example with one element less, or more, and its n."""
    n = arguments.size(leaves)
    other = n - 1 if n > LEAST else n + 1
    made = {}
    for each in arguments.inputs:
        value = leaves[each.leaf]
        made[id(value)] = padded(each, value, n, other) if other > n else front(value, each.dims, other).contiguous()
    return other, pytree.tree_map_only(torch.Tensor, lambda tensor: made.get(id(tensor), tensor), call)


def sizes_of(returned: Any, n: int, again: Any, other: int) -> Any:
    """What the model returned, with a size where it is n once and `other` the other time: the code around the graph has
    read it from an input's shape."""

    def found(one: Any, two: Any) -> Any:
        if isinstance(one, torch.Size):
            return torch.Size(map(found, one, two))
        return _SENTINEL - 1 if type(one) is int and one == n and two == other else one

    first, spec = flat(returned)
    return pytree.tree_unflatten(list(map(found, first, flat(again)[0])), spec)


def flat(returned: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of what a model returns. A `torch.Size` is one: put together again, pytree makes it a tuple."""
    return pytree.tree_flatten(returned, is_leaf=lambda each: isinstance(each, torch.Size))


class Finder:
    """Where a leaf of what the model returns comes from."""

    def __init__(
        self,
        results: list[Any],
        nodes: Sequence[Any],
        arguments: Arguments,
        leaves: Sequence[Any],
        feed: Sequence[Any],
    ) -> None:
        self.results, self.nodes, self.feed = results, nodes, feed
        self.callers = {id(leaves[each.leaf]): each.leaf for each in arguments.inputs}

    def __call__(self, leaf: Any) -> Output:
        if isinstance(leaf, torch.Size):
            return Output("shape", value=tuple(map(self, leaf)))
        if id(leaf) in self.callers:
            return Output("input", self.callers[id(leaf)])
        if type(leaf) is int and leaf == _SENTINEL - 1:
            return Output("size", sizes={-1: int})
        if type(leaf) in (int, float) and _SENTINEL <= leaf < _SENTINEL + len(self.results):
            return self._number(int(leaf) - _SENTINEL, float(leaf) if isinstance(leaf, float) else None)
        for number, result in enumerate(self.results):
            if leaf is result and isinstance(leaf, torch.Tensor):
                sides = dict(enumerate(_known(self.nodes[number]).shape))
                sizes = {d: of_n(side) for d, side in sides.items() if _symbolic(side)}
                return Output("result", number, sizes, open=any(map(unbacked, sides.values())))
        if isinstance(leaf, torch.Tensor) and any(leaf is each for each in self.feed):
            return Output("constant", value=leaf)
        if isinstance(leaf, torch.Tensor) or not isinstance(leaf, _PLAIN):
            raise TraceError(
                "What the model returns cannot be told from its graph.",
                seen=f"a {type(leaf).__name__} that is neither a result, an input nor a parameter",
                expected="a tree (dict, list, tuple, registered class) of tensors and plain values",
                hint="register the class with torch.utils._pytree.register_dataclass, or return a dict",
            )
        return Output("constant", value=leaf)

    def _number(self, number: int, given: float | None) -> Output:
        node = self.nodes[number]
        size = _known(node if given is None else node.args[0])
        if unbacked(size):
            return Output("number", number)
        return Output("size", number, {-1: of_n(size, float) if given is not None else of_n(size)})


_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _symbolic(side: Any) -> bool:
    return isinstance(side, torch.SymInt) and not side.node.expr.is_number and not unbacked(side)


def result_nodes(gm: torch.fx.GraphModule) -> list[Any]:
    """The graph's results: nodes, and constants."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return list(output.args[0])


def _known(node: Any) -> Any:
    """What tracing knows of a result: a fake tensor, a symbolic size."""
    return node.meta["example_value"] if isinstance(node, torch.fx.Node) else node
