"""When two results are the same, and where they are not: which element, by how much, in which unit.

The rule for a floating point element: `|seen - expected| <= rtol * |expected| + scale * rms(expected)`. The second term
is `torch.testing`'s `atol` for values around 1, made to fit values of any size: a fixed 1e-5 lets a wrong gradient of
1e-6 pass, and rejects a right sum of 1e6. An element near zero that came from a cancellation has the rounding errors of
what was cancelled, and that is as large as the tensor, not as the element.

What else counts:

- integers, booleans and what is no tensor are equal, or they differ; so are indices (they are integers). A Python float
  is what `.item()` makes of a float32, and may be off as that may;
- NaN is where NaN is expected; an infinity is there too, with the same sign; -0.0 equals 0.0, as IEEE 754 has it: what
  a sign of zero leads to (an infinity's sign) counts;
- shape, dtype and device are the same, and strides too (where a dimension has more than one element).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Tolerance:
    """How far an element may be off.

    Args:
        rtol: relative to the element.
        scale: relative to the root mean square of the expected tensor.
    """

    rtol: float
    scale: float

    def after(self, roundings: int, eps: float) -> Tolerance:
        """The same, for results with that many roundings to `eps` on the way to them, each of a value as large as they.

        Rounding errors are as good as independent, so that they add up to sqrt(roundings) of one (Higham and Mary 2019,
        A New Approach to Probabilistic Rounding Error Analysis). One has a standard deviation of 0.29 eps (uniform
        within half a unit); two computations differ by sqrt(2) of that, and of a million elements none is off by more
        than 5 standard deviations: 2 eps. A sum of n terms has n roundings of this kind: relative to the result's
        magnitude its error is n**0.5, whether its terms cancel or not.
        """
        return Tolerance(self.rtol, max(self.scale, 2 * eps * math.sqrt(roundings)))


# rtol: torch.testing's default_tolerances (torch/testing/_comparison.py, _DTYPE_PRECISIONS), which stand for tests of
# single operators. scale: its atol where that is more than a few units in the last place (float32: 1e-5 = 84 eps, which
# by `after` is right for sums of 1700 terms); half types sum in float32 and round once, so it is 4 eps there, where
# atol is 1e-5 because values are around 1. float8, which torch.testing compares exactly, is what results are stored in:
# one unit in the last place, of what was computed in bfloat16 or better.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-7, 1e-7),
    torch.float32: Tolerance(1.3e-6, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 3.2e-2),
    torch.float16: Tolerance(1e-3, 4e-3),
    torch.complex128: Tolerance(1e-7, 1e-7),
    torch.complex64: Tolerance(1.3e-6, 1e-5),
    torch.complex32: Tolerance(1e-3, 4e-3),
    **{
        dtype: Tolerance(torch.finfo(dtype).eps, 3.2e-2)
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
        if (dtype := getattr(torch, name, None)) is not None
    },
}
EXACT = Tolerance(0.0, 0.0)
Roundings = int | Mapping[torch.dtype, int]  # on the way to a result, to its dtype; one number for all, or by dtype


@dataclass(frozen=True)
class Difference:
    """The first thing in which two results differ that matters most.

    Args:
        kind: `"structure"`, `"value"` (no tensor), `"device"`, `"dtype"`, `"shape"`, `"strides"`, `"memory"`
            (whose it lies in), `"nan"`, `"inf"` or `"numbers"`.
        where: the place in the tree: `"[0]['logits']"`; empty for a bare tensor.
        index: of the element that is furthest outside of what is allowed; None where it is not about one.
        seen, expected: that element, or the dtype, shape, ...
        absolute: how far that element is off, in its own unit.
        relative: the same, relative to the expected element; inf where that is zero.
        times: the same, in multiples of what is allowed; inf where nothing is.
        elements, of: how many elements are outside, and how many there are.
    """

    kind: str
    where: str
    seen: str
    expected: str
    index: tuple[int, ...] | None = None
    absolute: float = 0.0
    relative: float = 0.0
    times: float = math.inf
    elements: int = 0
    of: int = 0

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        if self.kind not in ("numbers", "nan", "inf"):
            return f"{place}{self.kind} {self.seen}, expected {self.expected}"
        at = f" at {list(self.index)}" if self.index is not None else ""
        many = f"{self.elements} of {self.of} elements"
        if self.kind != "numbers":
            return f"{place}{many} are {self.kind} in one only:{at} {self.seen}, expected {self.expected}"
        relative = "" if math.isinf(self.relative) else f", {self.relative:.2g} of it"
        times = "where they have to be equal" if math.isinf(self.times) else f"{self.times:.3g} times what is allowed"
        return (
            f"{place}{many} differ,{at} {self.seen}, expected {self.expected}: {self.absolute:.3g}{relative}, {times}"
        )


def compare(
    seen: Any,
    expected: Any,
    tolerances: Mapping[torch.dtype, Tolerance] = TOLERANCES,
    *,
    strides: bool = True,
    roundings: Roundings = 1,
) -> Difference | None:
    """The worst difference of two results; None where they are the same.

    Args:
        seen, expected: tensors, or trees of tensors and other things. What is in the place of a tensor that was not
            computed (None) has to be None in both.
        tolerances: by dtype; a floating dtype that is not there has to be equal.
        strides: whether strides count.
        roundings: how many roundings to the dtype there are on the way to the result (`Tolerance.after`); by dtype, or
            one for all.
    """
    left, right = _flat(seen), _flat(expected)
    if left[1] != right[1]:
        return Difference("structure", "", _short(left[1]), _short(right[1]))
    found = []
    for (path, one), (_, other) in zip(left[0], right[0], strict=True):
        difference = _leaf(pytree.keystr(path), one, other, tolerances, strides, roundings)
        if difference is not None:
            found.append(difference)
    return max(found, key=lambda each: (each.kind not in ("strides", "numbers"), each.times), default=None)


def _flat(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return pytree.tree_flatten_with_path(tree)


def _leaf(
    where: str,
    seen: Any,
    expected: Any,
    table: Mapping[torch.dtype, Tolerance],
    strides: bool,
    roundings: Roundings,
) -> Difference | None:
    if type(seen) is float and type(expected) is float and math.isfinite(seen) and math.isfinite(expected):
        return _numbers(where, _scalar(seen), _scalar(expected), _allowed(torch.float32, table, roundings))
    if not isinstance(seen, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return None if _equal(seen, expected) else Difference("value", where, _typed(seen), _typed(expected))
    if seen.layout is torch.jagged and expected.layout is torch.jagged:  # its shape has a name of its own for each
        parts = [
            (f"{where}.{name}()", getattr(seen, name)(), getattr(expected, name)()) for name in ("values", "offsets")
        ]
        found = (_leaf(*part, table, strides, roundings) for part in parts)
        return next((each for each in found if each is not None), None)
    for kind in ("device", "dtype", "shape"):
        if getattr(seen, kind) != getattr(expected, kind):
            return Difference(kind, where, _short(getattr(seen, kind)), _short(getattr(expected, kind)))
    if seen.layout != expected.layout:
        return Difference("strides", where, str(seen.layout), str(expected.layout))
    if strides and seen.layout is torch.strided and _strides(seen) != _strides(expected):
        return Difference("strides", where, _short(seen.stride()), _short(expected.stride()))
    return _numbers(where, seen, expected, _allowed(expected.dtype, table, roundings))


def _allowed(dtype: torch.dtype, table: Mapping[torch.dtype, Tolerance], roundings: Roundings) -> Tolerance:
    tolerance = table.get(dtype, EXACT)
    if tolerance == EXACT or dtype not in TOLERANCES or torch.finfo(dtype).bits <= 8:
        return tolerance
    many = roundings if isinstance(roundings, int) else roundings.get(dtype, 1)
    return tolerance.after(many, torch.finfo(dtype).eps)


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _numbers(where: str, seen: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Difference | None:
    one, other = _on_host(seen), _on_host(expected)
    if not one.numel():
        return None
    if not (expected.is_floating_point() or expected.is_complex()):
        off = one != other
        return _worst("numbers", where, one, other, off, torch.where(off, math.inf, 0.0)) if off.any() else None
    for kind, is_kind in (("nan", torch.isnan), ("inf", torch.isinf)):
        here, there = is_kind(one), is_kind(other)
        off = here != there
        if kind == "inf":
            off = off | (here & there & (one != other))
        if off.any():
            return _worst(kind, where, one, other, off, off.double())
    finite = other.isfinite()
    values = torch.where(finite, other, 0.0)
    rms = float(values.square().sum().div(max(int(finite.sum()), 1)).sqrt())
    distance = (torch.where(finite, one, 0.0) - values).abs()
    allowed = tolerance.rtol * values.abs() + tolerance.scale * rms
    off = distance > allowed
    return _worst("numbers", where, one, other, off, distance / allowed) if off.any() else None


def _worst(
    kind: str, where: str, one: torch.Tensor, other: torch.Tensor, off: torch.Tensor, times: torch.Tensor
) -> Difference:
    times = torch.where(off, times, -1.0)
    place = torch.unravel_index(times.argmax(), times.shape)
    index = tuple(int(each) for each in place)
    seen, expected = one[place].item(), other[place].item()
    absolute = float(abs(seen - expected)) if kind == "numbers" else math.inf
    return Difference(
        kind=kind,
        where=where,
        index=index,
        seen=f"{seen:.9g}" if isinstance(seen, float) else str(seen),
        expected=f"{expected:.9g}" if isinstance(expected, float) else str(expected),
        absolute=absolute,
        relative=absolute / abs(expected) if expected and math.isfinite(expected) else math.inf,
        times=float(times[place]) if kind == "numbers" else math.inf,
        elements=int(off.sum()),
        of=off.numel(),
    )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype in which differences are exact; complex numbers as pairs, one dimension more."""
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128))
    return tensor.double() if tensor.is_floating_point() else tensor


def _strides(tensor: torch.Tensor) -> list[int]:
    if not tensor.numel():
        return []
    return [stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if side > 1]


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # what cannot be compared is not known to be the same
        return False


def _typed(value: Any) -> str:
    return f"a {type(value).__name__}: {_short(value)}" if not isinstance(value, torch.Tensor) else "a tensor"


def _short(value: Any) -> str:
    text = str(list(value)) if isinstance(value, (torch.Size, tuple)) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
