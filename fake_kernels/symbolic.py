"""A fake kernel under symbolic sizes: traced at the sizes of one call, then read at the sizes of another.

This finds what no single call can: a size computed for the sizes at hand, a guard that the kernel does not demand (it
fails for another call that the kernel accepts, so the graph would be compiled again), and float arithmetic in a size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fake_kernels.adapter import size_expression
from fake_kernels.kernel import Call, FakeKernel, parse, type_of

_FLOAT_ARITHMETIC = ("IntTrueDiv", "FloatTrueDiv", "FloorToInt", "CeilToInt", "TruncToInt", "RoundToInt", "ToFloat")


@dataclass
class Traced:
    """A fake kernel's results with sizes as expressions, and what was assumed about them."""

    symbols: list[list[Any]]
    results: list[Any]
    guards: list[Any]

    def disagreements(self, call: Call, results: Any) -> list[str]:
        """What does not hold at another call, in words.

        Args:
            call: its arguments; of the same ranks, dtypes and constants.
            results: what the reference gives for it.
        """
        sizes = self._sizes_at(call)
        wrong = [
            f"assumes {guard}, which does not hold for another valid call"
            for guard in self.guards
            if not _holds(guard, sizes)
        ]
        reals = pytree.tree_leaves(results)
        for number, (told, found) in enumerate(zip(self.results, reals, strict=True)):
            if not isinstance(found, torch.Tensor):
                continue
            for what, expressions, values in (
                ("shape", told.shape, found.shape),
                ("strides", told.stride(), found.stride()),
            ):
                means = [what == "shape" or (found.numel() > 0 and side != 1) for side in found.shape]
                at = tuple(_value(each, sizes) for each in expressions)
                if not all(a == v or not m for a, v, m in zip(at, values, means, strict=True)):
                    wrong.append(
                        f"result {number}: {what} is {tuple(values)}, and the symbolic {tuple(expressions)} gives {at}"
                    )
                floats = [e for e in expressions if any(name in str(size_expression(e)) for name in _FLOAT_ARITHMETIC)]
                wrong += [f"result {number}: {what} is computed with floats: {each}" for each in floats]
        return wrong

    def _sizes_at(self, call: Call) -> dict[Any, int]:
        """A number for each symbol. One symbol may stand in several places, a size and a stride that were the same
        number; what it is called after is the size."""
        found = [
            (place, symbol, value)
            for symbols, given in zip(self.symbols, pytree.tree_leaves(call), strict=True)
            for place, symbol, value in zip(_places(given), symbols, _numbers(given), strict=True)
            if getattr(symbol, "is_Symbol", False)
        ]
        return {symbol: value for _, symbol, value in sorted(found, key=lambda each: each[0], reverse=True)}


def trace(kernel: FakeKernel, call: Call) -> Traced:
    """Runs the fake kernel with every size of every tensor a symbol, and every `SymInt` of the schema too."""
    environment = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=environment)
    count = 0

    def symbols(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim(), constraint_sizes=[None] * tensor.dim()
        )
        return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input{count}"))

    def convert(value: Any, symbolic: bool) -> Any:
        if isinstance(value, torch.Tensor):
            return symbols(value)
        if symbolic and isinstance(value, (list, tuple)):
            return [convert(each, True) for each in value]
        if symbolic and type(value) is int and value > 1:
            return symbols(torch.empty(value)).shape[0]
        return pytree.tree_map_only(torch.Tensor, symbols, value)

    args, kwargs = call
    schema = parse(kernel.schema)
    symbolic = {a.name: "SymInt" in type_of(a.real_type) for a in schema.arguments}
    names = [a.name for a in schema.arguments]
    fake_args = tuple(convert(value, symbolic[name]) for name, value in zip(names, args, strict=False))
    fake_kwargs = {name: convert(value, symbolic[name]) for name, value in kwargs.items()}
    named = [_symbols(leaf) for leaf in pytree.tree_leaves((fake_args, fake_kwargs))]  # before anything is assumed
    with mode:
        results = kernel.fn(*fake_args, **fake_kwargs)
    guards = [guard.expr for guard in environment.guards]
    return Traced(named, pytree.tree_leaves(results), guards)


def _numbers(given: Any) -> list[Any]:
    """All that may be a symbol in an argument."""
    return [*given.shape, *given.stride(), given.storage_offset()] if isinstance(given, torch.Tensor) else [given]


def _places(given: Any) -> list[int]:
    """For each of these numbers, what it is: 0 a size, 1 a stride, 2 an offset."""
    return [*[0] * given.dim(), *[1] * given.dim(), 2] if isinstance(given, torch.Tensor) else [0]


def _symbols(given: Any) -> list[Any]:
    return [size_expression(number) for number in _numbers(given)]


def _value(size: Any, sizes: dict[Any, int]) -> Any:
    return int(size_expression(size).subs(sizes)) if isinstance(size, torch.SymInt) else size


def _holds(guard: Any, sizes: dict[Any, int]) -> bool:
    return bool(guard.subs(sizes))
