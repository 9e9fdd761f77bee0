"""Whether two tensors have the same bits."""

from __future__ import annotations

import torch

_CHUNK = 1 << 26  # bytes; comparing takes as much again


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool | None:
    """Of two tensors with one shape, dtype and device; None where they have no plain memory: quantized, sparse."""
    if one.is_quantized or one.layout is not torch.strided:
        return None
    try:
        flat = [each.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for each in (one, other)]
    except RuntimeError:
        return None
    return all(map(torch.equal, *(each.split(_CHUNK) for each in flat)))
