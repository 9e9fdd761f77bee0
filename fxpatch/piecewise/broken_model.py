"""The run-time front end: a model that is called as it is under capture, and broken where its code is marked.

Nothing is traced, so what its results have to do with n is found by calling it with n elements and with n + 1: a size
that grew is cut, and grows as much with each further element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import TraceError
from fxpatch.piecewise.arguments import Arguments, Input
from fxpatch.piecewise.breaks import record
from fxpatch.piecewise.graph_device import GraphDevice, Pool
from fxpatch.piecewise.outputs import Output
from fxpatch.piecewise.plan import Plan
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.report import PieceRow
from fxpatch.piecewise.statics import Statics, padded


class BrokenModel(Prepared):
    """See the module.

    Args:
        function: the model.
        arguments: the form of a call.
        args, kwargs, leaves, n: an example call; what the model writes to is written to.
        statics, owned, written: as of `Prepared`.

    Raises:
        TraceError: the model returns what cannot be cut to a call's n.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Arguments,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        leaves: Sequence[Any],
        n: int,
        statics: Statics,
        owned: Sequence[Input],
        written: set[int],
    ) -> None:
        self._function, self._form = function, arguments
        given = arguments.signature.bind(*args, **kwargs).arguments
        self._named, self._left_out = set(kwargs), set(arguments.signature.parameters) - set(given)
        short, spec = pytree.tree_flatten(self._call(leaves))
        inputs = {each.leaf: each for each in arguments.inputs}
        longer = [padded(inputs[i], leaf, n, n + 1) if i in inputs else leaf for i, leaf in enumerate(leaves)]
        long, form = pytree.tree_flatten(self._call(longer))
        if form != spec:
            raise _cannot_tell("its structure depends on n")
        outputs = [_output(i, one, other, n) for i, (one, other) in enumerate(zip(short, long, strict=True))]
        super().__init__(arguments, outputs, spec, statics, owned, written)
        self._graphs = 1

    @property
    def graph_pieces(self) -> int:
        return self._graphs

    @property
    def rows(self) -> tuple[PieceRow, ...]:
        return ()

    def results(self, leaves: Sequence[Any], n: int) -> list[Any]:
        return pytree.tree_leaves(self._call(leaves))

    def record(self, static: Callable[[Input], Any], size: int, device: GraphDevice, pool: Pool, weak: bool) -> Plan:
        values: list[Any] = [self._form.constants.get(leaf) for leaf in range(self._form.spec.num_leaves)]
        for each in self._form.inputs:
            values[each.leaf] = static(each)
        self._call(values)  # warm
        kept = [value for value in values if isinstance(value, torch.Tensor)]

        def call() -> list[Any]:
            return pytree.tree_leaves(self._call(values))

        if not device.captures:  # what runs again runs whole
            again = device.capture(call, pool)
            return Plan(size, (again.replay,), again.result, [again.release], kept, ("graph",))
        plan = record(call, size, device, pool, kept)
        self._graphs = plan.graphs
        return plan

    def rebind(self, named: Mapping[str, torch.Tensor]) -> None:
        """Nothing is bound: the next capture reads what the model has then."""

    def _call(self, leaves: Sequence[Any]) -> Any:
        values = pytree.tree_unflatten(list(leaves), self._form.spec)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in self._form.signature.parameters.items():
            if name in self._left_out:
                continue  # a decorator may put another value there than the default
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += values[name]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(values[name])
            elif name in self._named:
                kwargs[name] = values[name]
            else:
                args.append(values[name])
        return self._function(*args, **kwargs)


def _output(number: int, one: Any, other: Any, n: int) -> Output:
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.dim() != other.dim():
            raise _cannot_tell(f"result {number} changes its rank with n")
        grown = {d: long - short for d, (short, long) in enumerate(zip(one.shape, other.shape, strict=True))}
        return Output("result", number, {d: _line(one.shape[d], by, n) for d, by in grown.items() if by})
    if type(one) is int and type(other) is int and one != other:
        return Output("size", number, {-1: _line(one, other - one, n)})
    if isinstance(one, _PLAIN) and type(one) is type(other) and one == other:
        return Output("constant", value=one)
    raise _cannot_tell(f"result {number} is a {type(one).__name__} that is neither a tensor nor always the same")


_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def _line(at_n: int, by: int, n: int) -> Callable[[int], int]:
    return lambda m: at_n + by * (m - n)


def _cannot_tell(seen: str) -> TraceError:
    return TraceError(
        "What the model returns cannot be cut to the size of a call.",
        seen=seen,
        expected="a tree of tensors whose sizes grow evenly with n, and of plain values",
        hint="return tensors only, or use the FX front end",
    )
