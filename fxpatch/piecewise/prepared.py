"""A model that has been traced, split and compiled, and its captured sizes: what a call can choose from.

The ladder: a plan of the next larger size is replayed; without one the compiled pieces run as they are, at the caller's
own size. Each way gives the caller's n elements, in the structure that the model returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.piecewise.arguments import Input
from fxpatch.piecewise.build import Built
from fxpatch.piecewise.flow import flow
from fxpatch.piecewise.graph_device import GraphDevice, Pool
from fxpatch.piecewise.plan import Cell, Plan, capture
from fxpatch.piecewise.split import Split
from fxpatch.piecewise.statics import Statics, padded
from fxpatch.piecewise.trace import LEAST, Output, Traced


@dataclass
class Captured:
    """One captured size and what a call does around its replay.

    Args:
        plan: the steps.
        fill: copies a call's tensors into the static buffers.
        write_back: (leaf, its buffer, dynamic dimensions) of inputs that the model writes to and that are copied.
    """

    plan: Plan
    fill: Callable[[Sequence[Any], int], None]
    write_back: list[tuple[int, torch.Tensor, tuple[int, ...]]] = field(default_factory=list)


class Prepared:
    """See the module.

    Args:
        traced, split, built: the model.
        statics: the buffers of copied inputs.
        owned: inputs that are used where the caller has them; a call has to bring the same memory.
        written: leaves that the model writes to.
    """

    def __init__(
        self,
        traced: Traced,
        split: Split,
        built: Sequence[Built],
        statics: Statics,
        owned: Sequence[Input],
        written: set[int],
    ) -> None:
        self.traced, self.split, self.built, self.statics = traced, split, tuple(built), statics
        self.owned, self.written = tuple(owned), written
        self.captured: dict[int, Captured] = {}
        self._bind()
        self._open = [each for each in traced.feed if not isinstance(each, torch.Tensor)]
        self._pointers: dict[int, int] = {}

    @property
    def graph_pieces(self) -> int:
        """How many graphs one size takes."""
        return sum(piece.kind == "graph" for piece in self.split.pieces)

    def capture(self, size: int, leaves: Sequence[Any], n: int, device: GraphDevice, pool: Pool, *, weak: bool) -> None:
        """Captures one size, with the values of an example call of n elements.

        Raises:
            CaptureFailedError: it cannot be captured; nothing of it is left.
        """
        fill = self.statics.filler(size)
        front = [_front(value, dims, min(n, size)) for value, dims in zip(leaves, self._dims(), strict=True)]
        fill(front, min(n, size))
        owned = {each.leaf: _front(leaves[each.leaf], each.dims, size) for each in self.owned}
        feed = [self._static(each, owned, size) for each in self.traced.feed]
        plan = capture(self.split, self.built, feed, size, device, pool, weak=weak)
        back = [
            (each.leaf, self.statics.at(each, size), each.dims)
            for each in self.statics.inputs
            if each.leaf in self.written
        ]
        self.captured[size] = Captured(plan, fill, back)
        self._pointers = {leaf: tensor.data_ptr() for leaf, tensor in owned.items()}

    def moved(self, leaves: Sequence[Any]) -> list[str]:
        """The inputs used in place that are not where they were when captured."""
        return [each.name for each in self.owned if leaves[each.leaf].data_ptr() != self._pointers.get(each.leaf, 0)]

    def replay(self, size: int, leaves: Sequence[Any], n: int) -> Any:
        """Runs a captured size; the results are valid until the next call."""
        found = self.captured[size]
        found.fill(leaves, n)
        for step in found.plan.steps:
            step()
        for leaf, buffer, dims in found.write_back:
            leaves[leaf].copy_(_front(buffer, dims, n))
        return self.returned(found.plan.results, leaves, n, size)

    def flow(self, leaves: Sequence[Any], n: int) -> Any:
        """Runs the compiled pieces without graphs; one element is padded to two."""
        if n >= LEAST:
            return self.returned(self.results(leaves, n), leaves, n, n)
        given = list(leaves)
        for each in self.traced.arguments.inputs:
            given[each.leaf] = padded(each, leaves[each.leaf], n, LEAST)
        results = self.results(given, LEAST)
        for each in self.traced.arguments.inputs:
            if each.leaf in self.written and each.dims:
                leaves[each.leaf].copy_(_front(given[each.leaf], each.dims, n))
        return self.returned(results, leaves, n, LEAST)

    def results(self, leaves: Sequence[Any], n: int) -> list[Any]:
        """The graph's results at exactly n elements, at least two."""
        return self._flow(*[leaves[each.leaf] if isinstance(each, Input) else each(n) for each in self._open])

    def returned(self, results: Sequence[Any], leaves: Sequence[Any], n: int, size: int) -> Any:
        """What the model returns, from the graph's results at `size`, for a call of n elements."""
        return pytree.tree_unflatten(
            [_leaf(each, results, leaves, n, size) for each in self.traced.outputs], self.traced.spec
        )

    def rebind(self, named: Mapping[str, torch.Tensor]) -> None:
        """Takes the tensors that the model has now under the names of those bound when it was traced."""
        now = {id(tensor): named[name] for name, tensor in self.traced.names.items() if name in named}
        self.traced.feed[:] = [now.get(id(each), each) for each in self.traced.feed]
        self.traced.names = {name: named.get(name, tensor) for name, tensor in self.traced.names.items()}
        self._bind()

    def _bind(self) -> None:
        bound = [each if isinstance(each, torch.Tensor) else None for each in self.traced.feed]
        self._flow = flow(self.split, self.built, bound)

    def release(self) -> None:
        """Gives all graphs back."""
        for found in self.captured.values():
            found.plan.release()
        self.captured.clear()

    def _dims(self) -> list[tuple[int, ...]]:
        dims: list[tuple[int, ...]] = [()] * self.traced.arguments.spec.num_leaves
        for each in self.traced.arguments.inputs:
            dims[each.leaf] = each.dims
        return dims

    def _static(self, each: Any, owned: dict[int, torch.Tensor], size: int) -> Any:
        if isinstance(each, torch.Tensor):
            return each
        if isinstance(each, Input):
            return owned[each.leaf] if each.leaf in owned else self.statics.at(each, size)
        return each(size)


def _front(value: Any, dims: Sequence[int], n: int) -> Any:
    for dim in dims:
        value = value.narrow(dim, 0, n)
    return value


def _leaf(output: Output, results: Sequence[Any], leaves: Sequence[Any], n: int, size: int) -> Any:
    if output.kind == "result":
        value = results[output.at]
        if isinstance(value, Cell):
            value = value.value
        if n != size:
            for dim, length in output.sizes.items():
                value = value.narrow(dim, 0, length(n))
        return value
    if output.kind == "number":
        value = results[output.at]
        value = value.value if isinstance(value, Cell) else value
        return value.item() if isinstance(value, torch.Tensor) else value
    if output.kind == "input":
        return leaves[output.at]
    if output.kind == "size":
        return output.sizes[-1](n)
    return output.value
