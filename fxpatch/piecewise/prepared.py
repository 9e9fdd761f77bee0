"""A model made ready, and its captured sizes: what a call can choose from.

The ladder: a plan of the next larger size is replayed; without one the model's pieces run as they are, at the caller's
own size. Each way gives the caller's n elements, in the structure that the model returns. How sizes are captured and
what the pieces are is the front ends' business: `traced_model` (FX) and `broken_model` (run-time breaks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.native import Decisions
from fxpatch.piecewise.arguments import Arguments, Input
from fxpatch.piecewise.graph_device import GraphDevice, Pool
from fxpatch.piecewise.outputs import Output
from fxpatch.piecewise.plan import Cell, Plan
from fxpatch.piecewise.ranges import profiled, range_of
from fxpatch.piecewise.report import PieceRow
from fxpatch.piecewise.split import Piece
from fxpatch.piecewise.statics import Statics, front, padded


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

    def replay_in_ranges(self, leaves: Sequence[Any], n: int) -> None:
        """Copies in and replays, each in a range that a profiler sees."""
        with range_of(f"replay size={self.plan.size} n={n}"):
            with range_of("copy_in"):
                self.fill(leaves, n)
            for step in self.plan.in_ranges():
                step()


class Prepared:
    """What both front ends have in common: static buffers, captured sizes, and the way back to the caller's structure.

    Args:
        arguments: the form of a call.
        outputs, spec: what the model returns, in terms of its results.
        statics: the buffers of copied inputs.
        owned: inputs that are used where the caller has them; a call has to bring the same memory.
        written: leaves that the model writes to.

    Attributes:
        decisions: what was decided about native fallbacks; None where there are none.
        names: the parameters and buffers that are bound, by their names in the model.
        pointers: where they are; a parameter's `data` may be exchanged.
        notes: how it was made, for the report.
    """

    def __init__(
        self,
        arguments: Arguments,
        outputs: Sequence[Output],
        spec: pytree.TreeSpec,
        statics: Statics,
        owned: Sequence[Input],
        written: set[int],
    ) -> None:
        self.arguments, self.outputs, self.spec = arguments, tuple(outputs), spec
        self.statics, self.owned, self.written = statics, tuple(owned), written
        self.captured: dict[int, Captured] = {}
        self.names: dict[str, torch.Tensor] = {}
        self.pointers: dict[str, int] = {}
        self.notes: list[str] = []
        self.decisions: Decisions | None = None
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}

    # -- what the front ends do ---------------------------------------------------------------------------------------

    @property
    def graph_pieces(self) -> int:
        """How many graphs one size takes."""
        raise NotImplementedError

    @property
    def rows(self) -> tuple[PieceRow, ...]:
        """The pieces, for the report."""
        raise NotImplementedError

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces themselves, where a graph was split."""
        return ()

    @property
    def bound(self) -> list[torch.Tensor]:
        """The tensors that the model reads or writes and no caller passes, as far as that is known."""
        return []

    def results(self, leaves: Sequence[Any], n: int) -> Sequence[Any]:
        """The model's results at exactly n elements, at least two, without graphs."""
        raise NotImplementedError

    def record(self, static: Callable[[Input], Any], size: int, device: GraphDevice, pool: Pool, weak: bool) -> Plan:
        """Captures one size on static inputs."""
        raise NotImplementedError

    def rebind(self, named: Mapping[str, torch.Tensor]) -> None:
        """Takes the tensors that the model has now under the names of those that are bound."""
        raise NotImplementedError

    # -- what is the same ---------------------------------------------------------------------------------------------

    def capture(self, size: int, leaves: Sequence[Any], n: int, device: GraphDevice, pool: Pool, *, weak: bool) -> None:
        """Captures one size, with the values of an example call of n elements.

        Raises:
            CaptureFailedError: it cannot be captured; nothing of it is left.
        """
        fill = self.statics.filler(size)
        fill([front(value, dims, min(n, size)) for value, dims in zip(leaves, self._dims(), strict=True)], min(n, size))
        owned = {each.leaf: front(leaves[each.leaf], each.dims, size) for each in self.owned}

        def static(each: Input) -> torch.Tensor:
            return owned[each.leaf] if each.leaf in owned else self.statics.at(each, size)

        plan = self.record(static, size, device, pool, weak)
        back = [
            (each.leaf, self.statics.at(each, size), each.dims)
            for each in self.statics.inputs
            if each.leaf in self.written
        ]
        self.captured[size] = Captured(plan, fill, back)
        self._places = {leaf: (tensor.data_ptr(), tensor.stride()) for leaf, tensor in owned.items()}

    def moved(self, leaves: Sequence[Any]) -> list[str]:
        """The inputs used in place that are not where they were when captured."""
        found = []
        for each in self.owned:
            value = leaves[each.leaf]
            if self._places.get(each.leaf) != (value.data_ptr(), value.stride()):
                found.append(each.name)
        return found

    def replay(self, size: int, leaves: Sequence[Any], n: int) -> Any:
        """Runs a captured size; the results are valid until the next call."""
        found = self.captured[size]
        if profiled():
            found.replay_in_ranges(leaves, n)
        else:
            found.fill(leaves, n)
            for step in found.plan.steps:
                step()
        for leaf, buffer, dims in found.write_back:
            leaves[leaf].copy_(front(buffer, dims, n))
        return self.returned(found.plan.results, leaves, n, size)

    def flow(self, leaves: Sequence[Any], n: int, size: int) -> Any:
        """Runs the compiled pieces without graphs, on the caller's elements padded to `size`; at least two."""
        with range_of(f"compiled n={n}") if profiled() else nullcontext():
            return self._run(leaves, n, size)

    def _run(self, leaves: Sequence[Any], n: int, size: int) -> Any:
        if n == size:
            return self.returned(self.results(leaves, n), leaves, n, n)
        given = list(leaves)
        for each in self.arguments.inputs:
            given[each.leaf] = padded(each, leaves[each.leaf], n, size)
        results = self.results(given, size)
        for each in self.arguments.inputs:
            if each.leaf in self.written and each.dims:
                leaves[each.leaf].copy_(front(given[each.leaf], each.dims, n))
        return self.returned(results, leaves, n, size)

    def returned(self, results: Sequence[Any], leaves: Sequence[Any], n: int, size: int) -> Any:
        """What the model returns, from the graph's results at `size`, for a call of n elements."""
        return pytree.tree_unflatten([_leaf(each, results, leaves, n, size) for each in self.outputs], self.spec)

    def release(self) -> None:
        """Gives all graphs back."""
        for found in self.captured.values():
            found.plan.release()
        self.captured.clear()

    def _dims(self) -> list[tuple[int, ...]]:
        dims: list[tuple[int, ...]] = [()] * self.arguments.spec.num_leaves
        for each in self.arguments.inputs:
            dims[each.leaf] = each.dims
        return dims


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
    if output.kind == "shape":
        return torch.Size(_leaf(side, results, leaves, n, size) for side in output.value)
    if output.kind == "size":
        return output.sizes[-1](n)
    return output.value
