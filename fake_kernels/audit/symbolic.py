"""Symbolic sizes: does a result's formula stay in integers, and is every guard one that the kernel demands?

An accepted call is repeated with one symbol for each distinct size. Then other sizes are tried: where the fake kernel
accepts them with plain numbers, and gives just what the traced formula says, a guard that forbids them was surplus.
That is exact: a branch that changes the formula, or a check that refuses the sizes, needs its guard and is not
reported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from fake_kernels.audit.adapter import (
    Symbols,
    data_dependent_errors,
    expression,
    fake_mode,
    fake_tensor,
    traced_device,
    tracing,
)
from fake_kernels.audit.attempt import attempt
from fake_kernels.audit.findings import Finding, stable
from fake_kernels.audit.samples import Sample, Spec, bind, resized, tensors
from fake_kernels.audit.target import Target, result_tensors

_FLOAT = frozenset(
    {
        "FloorToInt",
        "CeilToInt",
        "RoundToInt",
        "TruncToInt",
        "IntTrueDiv",
        "FloatTrueDiv",
        "ToFloat",
        "FloatPow",
        "TruncToFloat",
    }
)


def probe_symbolic(target: Target, sample: Sample) -> Iterator[Finding]:
    """Findings of the rules float-size, surplus-guard, specialised-size and dynamic-shapes-fail."""
    plain = attempt(target.overload, sample, target.kernel)
    for tensor in result_tensors(target.schema, plain.result):
        if tensor.is_quantized or tensor.layout != torch.strided:
            return  # torch itself has no symbolic sizes for them
    symbols = Symbols()
    mode, device = fake_mode(symbols.env), traced_device()

    def make(spec: Spec) -> Any:
        shape = [symbols.of(size) for size in spec.shape]
        return fake_tensor(mode, shape, spec.strides(symbols.of), spec.dtype, device)

    args, kwargs = bind(target.schema, sample, make)
    if not symbols.expressions():
        return
    before = len(symbols.guards())
    try:
        with tracing(mode):
            result = target.overload(*args, **kwargs)
    except data_dependent_errors():
        return  # reported by the probe of effects, which sees it without symbols too
    except Exception as error:
        yield target.finding("dynamic-shapes-fail", f"{type(error).__name__}: {stable(str(error))}", sample)
        return
    shapes = [[expression(size) for size in tensor.shape] for tensor in result_tensors(target.schema, result)]
    guards = symbols.guards()[before:]
    readable = {symbol: _named(symbol, size) for size, symbol in symbols.expressions().items()}
    for index, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            floats = sorted({type(node).__name__ for node in _nodes(size)} & _FLOAT)
            if floats:
                text = str(size.xreplace(readable))
                yield target.finding(
                    "float-size", f"size {axis} of result {index} is {text} ({', '.join(floats)})", sample
                )
    yield from _surplus(target, sample, symbols, shapes, guards, readable)


def _surplus(
    target: Target,
    sample: Sample,
    symbols: Symbols,
    shapes: list[list[Any]],
    guards: list[Any],
    readable: dict[Any, Any],
) -> Iterator[Finding]:
    constant = symbols.specialised()
    specialised: dict[int, int] = {}
    agreed: dict[Any, list[str]] = {}
    disagreed: set[Any] = set()
    frozen: dict[tuple[str, int], set[int]] = {}
    for changed in _other_sizes(sorted(symbols.expressions())):
        values = {symbol: changed.get(size, size) for size, symbol in symbols.expressions().items()}
        broken = [guard for guard in guards if not _holds(guard, values)]
        fixed = [size for size in changed if size in constant]
        if not broken and not fixed:
            continue
        tried = attempt(target.overload, resized(sample, changed), target.kernel)
        if tried.error is not None:
            continue
        if fixed:
            specialised.update({size: changed[size] for size in fixed if size not in specialised})
            continue
        actual = [list(tensor.shape) for tensor in result_tensors(target.schema, tried.result)]
        if [[_value(size, values) for size in shape] for shape in shapes] == actual:
            for guard in broken:
                agreed.setdefault(guard, []).append(", ".join(f"n{old}={new}" for old, new in changed.items()))
        else:
            disagreed.update(broken)
            for place, size, was in _moved(shapes, actual):
                frozen.setdefault((place, size), set()).add(was)
    for size, other in specialised.items():
        text = f"the size {size} is traced as the constant {constant[size]}; the kernel accepts {other} too"
        yield target.finding("specialised-size", text, sample)
    for (place, size), others in frozen.items():
        if len(others) >= 2:
            seen = ", ".join(map(str, sorted(others)))
            text = f"{place} is traced as the constant {size}; with other inputs it is {seen}"
            yield target.finding("specialised-size", text, sample)
    for guard, sizes in agreed.items():
        if guard not in disagreed and len(sizes) >= 2:  # a single one may be where two branches meet
            text = (
                f"{guard.xreplace(readable)} is assumed; {sizes[0]} and {sizes[1]} are accepted with the same formula"
            )
            yield target.finding("surplus-guard", text, sample)


def _moved(shapes: list[list[Any]], actual: list[list[int]]) -> Iterator[tuple[str, int, int]]:
    """Sizes that are plain numbers in the trace, and another number in a plain call: where, traced as, actual."""
    for index, (traced, plain) in enumerate(zip(shapes, actual, strict=False)):
        for axis, (size, other) in enumerate(zip(traced, plain, strict=False)):
            if not _is_symbolic(size) and int(size) != other:
                yield f"size {axis} of result {index}", int(size), other


def _is_symbolic(size: Any) -> bool:
    return bool(getattr(size, "free_symbols", ()))


def _other_sizes(sizes: list[int]) -> Iterator[dict[int, int]]:
    taken = set(sizes)
    for size in sizes:
        for other in (size * 2, size * 3, size + 2, size + 1, size * 16, size // 2, size * 5):
            if other not in taken and other >= 2:
                yield {size: other}
    for factor in (2, 3, 64):
        yield {size: size * factor for size in sizes}


def _holds(guard: Any, values: dict[Any, int]) -> bool:
    return bool(guard.xreplace({symbol: _integer(value) for symbol, value in values.items()}))


def _value(size: Any, values: dict[Any, int]) -> int:
    return int(size if isinstance(size, int) else size.xreplace({symbol: _integer(v) for symbol, v in values.items()}))


def _integer(value: int) -> Any:
    return _sympy().Integer(value)


def _named(symbol: Any, size: int) -> Any:
    return _sympy().Symbol(f"n{size}", integer=True, positive=True)


def _nodes(size: Any) -> Iterator[Any]:
    if isinstance(size, _sympy().Basic):
        yield from _sympy().preorder_traversal(size)


def _sympy() -> Any:
    return importlib.import_module("sympy")  # here, and so late: it is slow to import, and has no types


def has_tensors(sample: Sample) -> bool:
    """Whether there is anything to make symbolic."""
    return any(True for _ in tensors(sample))
