"""Pinned host memory. torch asks a C++ allocator for it, which pure Python cannot register; but `tensor.pin_memory()`
and `is_pinned()` are operators. All host memory is equally near to this device, so pinning copies and remembers.

`torch.empty(..., pin_memory=True)` goes to the allocator directly, and raises.
"""

from __future__ import annotations

import weakref

import torch

from fxpatch.simulator.untraced import untraced

_pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


def register() -> torch.library.Library:
    """Registers both operators for CPU tensors, as long as the library lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_pin_memory", untraced(pin_memory), "CPU")
    library.impl("is_pinned", untraced(is_pinned), "CPU")
    return library


def pin_memory(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    copy = tensor.clone()
    _pinned.add(copy.untyped_storage())
    return copy


def is_pinned(tensor: torch.Tensor, device: torch.device | None = None) -> bool:
    return tensor.untyped_storage() in _pinned
