"""Rounding to 8 bits and to powers of two, as quantising kernels do it: for their references, which compute in float32.

On the CPU fp8 has conversions and no arithmetic, so values are clamped and rounded as float32 and converted last.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANGES = {torch.float8_e4m3fn: (-448.0, 448.0), torch.int8: (-128.0, 127.0)}


def to_8bit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> `dtype`, saturating: float8_e4m3fn rounds to nearest even, int8 towards zero, as a C++ cast does."""
    values = values.clamp(*RANGES[dtype])
    return values.trunc().to(dtype) if dtype == torch.int8 else values.to(dtype)


def ceil_log2(values: Tensor) -> Tensor:
    """The exponent of the least power of two that is not below each of `values` (float32, positive), exactly: int32."""
    mantissa, exponent = torch.frexp(values)
    return exponent - (mantissa == 0.5).int()


def exp2(exponents: Tensor) -> Tensor:
    """The power of two with each of `exponents`, exactly: float32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def write_exponents(exponents: Tensor, scales: Tensor, *, clear: bool) -> None:
    """Writes exponents `[..., rows, groups]` as bytes, biased by 127, into packed scales `[..., rows, ceil(groups/4)]`.

    The bytes of groups that do not exist become 0 with `clear`, and stay as they are without.
    """
    packed = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    groups = exponents.shape[-1]
    packed[..., :groups] = (exponents + 127).to(torch.uint8)
    if clear:
        packed[..., groups:] = 0
    scales.copy_(packed.view(torch.int32))


def pack_int4(values: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, `[..., 8 * n]` -> int32 `[..., n]`: eight in each, the first in the lowest bits."""
    nibbles = values.to(torch.int64).reshape(*values.shape[:-1], values.shape[-1] // 8, 8) & 15
    packed = (nibbles << torch.arange(0, 32, 4, device=values.device)).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 `[..., n]` -> float32 `[..., 8 * n]`, from -8 to 7: what `pack_int4` packed."""
    nibbles = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, 4, device=packed.device)) & 15
    return (nibbles - 16 * (nibbles > 7)).flatten(-2).float()
