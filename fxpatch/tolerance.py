"""How far two results of the same computation may be apart.

The rule for a floating point element: `|seen - expected| <= rtol * |expected| + scale * rms(expected)`. The second term
is `torch.testing`'s `atol` for values around 1, made to fit values of any size: a fixed 1e-5 lets a wrong gradient of
1e-6 pass, and rejects a right sum of 1e6. An element near zero that came from a cancellation has the rounding errors of
what was cancelled, and that is as large as the tensor, not as the element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


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


def allowed(dtype: torch.dtype, table: Mapping[torch.dtype, Tolerance], roundings: Roundings) -> Tolerance:
    """What results of a dtype are allowed after so many roundings; a dtype that is not in the table has to be equal."""
    tolerance = table.get(dtype, EXACT)
    if tolerance == EXACT or dtype not in TOLERANCES or torch.finfo(dtype).bits <= 8:
        return tolerance
    many = roundings if isinstance(roundings, int) else roundings.get(dtype, 1)
    return tolerance.after(many, torch.finfo(dtype).eps)
