"""Tensors of a certain layout on a device, for calls that a kernel refuses because of their layout."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device with the strides that it has; `to` packs what does not lie densely."""
    whole = torch.empty(0, dtype=tensor.dtype)
    memory = tensor.untyped_storage()
    whole.set_(memory, 0, (memory.nbytes() // tensor.element_size(),), (1,))
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
