"""When two results are the same, and where they are not: which element, by how much, in which unit.

A floating point element may be off as `fxpatch.tolerance` says. What else counts:

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

from fxpatch.tolerance import TOLERANCES, Roundings, Tolerance, allowed


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
        return _numbers(where, _scalar(seen), _scalar(expected), allowed(torch.float32, table, roundings))
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
    return _numbers(where, seen, expected, allowed(expected.dtype, table, roundings))


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
    limit = tolerance.rtol * values.abs() + tolerance.scale * rms
    off = distance > limit
    return _worst("numbers", where, one, other, off, distance / limit) if off.any() else None


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
