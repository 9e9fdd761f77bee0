"""The FX front end: a model that was traced once, split, and compiled piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxpatch.errors import InputError
from fxpatch.native import Decisions
from fxpatch.piecewise.arguments import Input
from fxpatch.piecewise.build import Built
from fxpatch.piecewise.flow import flow
from fxpatch.piecewise.graph_device import GraphDevice, Pool
from fxpatch.piecewise.plan import Plan, capture
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.ranges import in_range, name_of_piece, profiled
from fxpatch.piecewise.report import PieceRow
from fxpatch.piecewise.split import Piece, Split
from fxpatch.piecewise.statics import Statics
from fxpatch.piecewise.trace import Traced


class TracedModel(Prepared):
    """See the module.

    Args:
        traced, split, built: the graph, its pieces, and what each was compiled to.
        statics, owned, written: as of `Prepared`.
        decisions: about the model's native fallbacks.
        exact: size -> what each piece was compiled to for exactly that size.
    """

    def __init__(
        self,
        traced: Traced,
        split: Split,
        built: Sequence[Built],
        statics: Statics,
        owned: Sequence[Input],
        written: set[int],
        decisions: Decisions | None = None,
        exact: Mapping[int, Sequence[Built]] | None = None,
    ) -> None:
        super().__init__(traced.arguments, traced.outputs, traced.spec, statics, owned, written)
        self.traced, self.split, self.built = traced, split, tuple(built)
        self.names = dict(traced.names)
        self.decisions = decisions
        self.exact = dict(exact or {})
        self._forms = {name: _form(tensor) for name, tensor in self.names.items()}
        self._open = [each for each in traced.feed if not isinstance(each, torch.Tensor)]
        self._bind()

    @property
    def graph_pieces(self) -> int:
        return sum(piece.kind == "graph" for piece in self.split.pieces)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(self.split.pieces)

    @property
    def rows(self) -> tuple[PieceRow, ...]:
        return tuple(
            PieceRow(piece.index, piece.kind, built.key, built.seconds, piece.reasons)
            for piece, built in zip(self.split.pieces, self.built, strict=True)
        )

    @property
    def bound(self) -> list[torch.Tensor]:
        return self.traced.bound

    def results(self, leaves: Sequence[Any], n: int) -> list[Any]:
        run = self._exact_flow.get(n, self._flow) if not profiled() else self._flow_in_ranges(n)
        return run(*[leaves[each.leaf] if isinstance(each, Input) else each(n) for each in self._open])

    def record(self, static: Callable[[Input], Any], size: int, device: GraphDevice, pool: Pool, weak: bool) -> Plan:
        feed = [
            each if isinstance(each, torch.Tensor) else static(each) if isinstance(each, Input) else each(size)
            for each in self.traced.feed
        ]
        return capture(self.split, self.exact.get(size, self.built), feed, size, device, pool, weak=weak)

    def rebind(self, named: Mapping[str, torch.Tensor]) -> None:
        now: dict[int, torch.Tensor] = {}
        for name, tensor in self.names.items():
            value = named.get(name, tensor)
            if now.setdefault(id(tensor), value) is not value or _form(value) != self._forms[name]:
                raise InputError(
                    "The model's parameters are not those that it was prepared with.",
                    seen=f"{name}: {', '.join(map(str, _form(value)))}",
                    expected=f"{', '.join(map(str, self._forms[name]))}, and shared by the same names",
                    hint="call prepare() again",
                )
        self.traced.feed[:] = [now.get(id(each), each) for each in self.traced.feed]
        self.names = {name: named.get(name, tensor) for name, tensor in self.names.items()}
        self._bind()

    def _flow_in_ranges(self, n: int) -> Callable[..., list[Any]]:
        built = self.exact.get(n, self.built)
        named = [
            replace(each, call=in_range(name_of_piece(piece), each.call))
            for piece, each in zip(self.split.pieces, built, strict=True)
        ]
        return flow(self.split, named, [each if isinstance(each, torch.Tensor) else None for each in self.traced.feed])

    def _bind(self) -> None:
        bound = [each if isinstance(each, torch.Tensor) else None for each in self.traced.feed]
        self.pointers = {name: tensor.data_ptr() for name, tensor in self.names.items()}
        self._flow = flow(self.split, self.built, bound)
        self._exact_flow = {size: flow(self.split, built, bound) for size, built in self.exact.items()}


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    """What pieces were compiled for."""
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
