"""When two results are the same. The problem: a kernel adds in another order, or keeps more digits than plain torch
does, so its results differ a little and rightly; a kernel that is wrong by a constant factor also differs only a
little. The rule: per element the difference stays within the rounding of the dtype, and over the whole tensor no share
of it is systematic. What is not floating point is equal, or it differs.

For a floating result `b` of the optimized forward against `a` of the native one:

- each element: `|b - a| <= rtol * |a| + scale * rms(a)`. Near a zero that came from cancellation the scale of the
  tensor counts, not the element.
- the whole: the gain `sum(a * b) / sum(a * a)` is 1 within `gain + eps / sqrt(numel)`. Rounding does not move it, a
  wrong factor does: a bfloat16 result wrong by 1.5 % passes the first test and fails this one.
- infinities and NaN are where the native forward has them.

`fxpatch.tolerance` has the rule for stages of one computation, which round at the same places; it has no gain.

Shape, dtype and device are the same; strides are, or the optimized result is contiguous; what is no tensor has the same
type and is equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be off: relative to the element, to the tensor's root mean square, and as a factor."""

    rtol: float
    scale: float
    gain: float


# rtol: about 4 units in the last place, as for one rounding more on the way (float64, float32: some hundred, for long
# sums in another order). gain: half a unit, what truncating instead of rounding can do at most; more where exponentials
# and square roots of a device are approximations. These are this project's choice, not a vendor's promise.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-11, 1e-10),
    torch.float32: Tolerance(2e-5, 1e-5, 2e-5),
    torch.float16: Tolerance(4e-3, 1e-3, 1e-3),
    torch.bfloat16: Tolerance(3e-2, 8e-3, 4e-3),
    torch.float8_e4m3fn: Tolerance(0.13, 0.02, 2e-2),
    torch.float8_e5m2: Tolerance(0.26, 0.04, 4e-2),
}
EXACT = Tolerance(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Deviation:
    """The largest difference: absolute, and relative to `|a| + rms(a)` of the native result."""

    absolute: float = 0.0
    relative: float = 0.0

    def __or__(self, other: Deviation) -> Deviation:
        return Deviation(max(self.absolute, other.absolute), max(self.relative, other.relative))


def compare(native: Any, optimized: Any, table: Mapping[torch.dtype, Tolerance]) -> tuple[Deviation, str | None]:
    """The difference of two leaves, and what is wrong with it in words; None where it is within the table."""
    if not isinstance(native, torch.Tensor) or not isinstance(optimized, torch.Tensor):
        return Deviation(), _compare_values(native, optimized)
    for what in ("shape", "dtype", "device"):
        theirs, ours = getattr(native, what), getattr(optimized, what)
        if theirs != ours:
            return Deviation(), f"{what} {_short(ours)}, native {_short(theirs)}"
    if native.layout is torch.strided and not optimized.is_contiguous() and native.stride() != optimized.stride():
        return Deviation(), f"strides {optimized.stride()}, native {native.stride()}"
    a, b = _numbers(native), _numbers(optimized)
    if not (native.is_floating_point() or native.is_complex()):
        return _compare_exact(a, b, table.get(native.dtype, EXACT))
    return _compare_floats(a, b, table.get(native.dtype, EXACT), _eps(native.dtype))


def _compare_floats(a: torch.Tensor, b: torch.Tensor, limit: Tolerance, eps: float) -> tuple[Deviation, str | None]:
    finite = torch.isfinite(a)
    elsewhere = ~finite
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(
        torch.nan_to_num(a[elsewhere], nan=0.0), torch.nan_to_num(b[elsewhere], nan=0.0)
    ):
        here = int((finite & ~torch.isfinite(b)).sum())
        return Deviation(math.inf, math.inf), f"inf or nan in other places than native ({here} where native is finite)"
    a, b = a[finite], b[finite]
    if not a.numel():
        return Deviation(), None
    rms = float(a.square().mean().sqrt())
    difference = (b - a).abs()
    absolute = float(difference.max())
    relative = float((difference / (a.abs() + rms).clamp_min(torch.finfo(torch.float64).tiny)).max())
    deviation = Deviation(absolute, relative)
    off = difference > limit.rtol * a.abs() + limit.scale * rms
    if off.any():
        seen = f"{int(off.sum())} of {a.numel()} elements off, by up to {absolute:.3g} ({relative:.2g} relative)"
        return deviation, seen
    power = float(a.square().sum())
    if power > 0:
        gain = float((a * b).sum()) / power - 1
        if abs(gain) > limit.gain + eps / math.sqrt(a.numel()):
            return deviation, f"all of it off by a factor of {1 + gain:.6g}, each element within its rounding"
    return deviation, None


def _compare_exact(a: torch.Tensor, b: torch.Tensor, limit: Tolerance) -> tuple[Deviation, str | None]:
    """Integers, booleans: equal, unless the caller's table has a tolerance for the dtype (`scale` then is absolute)."""
    difference = (b - a).abs()
    absolute = float(difference.max()) if difference.numel() else 0.0
    deviation = Deviation(absolute, float(absolute > 0))
    off = difference > limit.rtol * a.abs() + limit.scale
    return deviation, f"{int(off.sum())} of {a.numel()} integers differ, by up to {absolute:g}" if off.any() else None


def _compare_values(native: object, optimized: object) -> str | None:
    if native is optimized:
        return None
    if type(native) is not type(optimized):
        return f"{_short(optimized)} of type {type(optimized).__name__}, native {type(native).__name__}"
    if isinstance(native, float) and isinstance(optimized, float) and math.isnan(native) and math.isnan(optimized):
        return None
    try:
        equal = bool(native == optimized)
    except Exception as error:
        return f"a {type(native).__name__} that cannot be compared ({type(error).__name__})"
    return None if equal else f"{_short(optimized)}, native {_short(native)}"


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, in a dtype in which differences are exact: float64, or int64 for integers (uint64 as it wraps)."""
    tensor = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if tensor.is_complex():
        return torch.view_as_real(tensor).double()
    return tensor.double() if tensor.is_floating_point() else tensor.to(torch.int64)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _short(value: object) -> str:
    text = repr(tuple(value)) if isinstance(value, torch.Size) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
