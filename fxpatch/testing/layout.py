"""Layouts. The problem: kernels go wrong on what is transposed, expanded or starts in the middle of its memory, and
`.to(device)` makes most of that contiguous on the way. The rule: what is moved keeps strides, offset and sharing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor lie in its storage.

    Args:
        shape, strides: as of the tensor.
        offset: elements before the first one.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def extent(self) -> int:
        """How many elements the storage has to hold."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((side - 1) * step for side, step in zip(self.shape, self.strides, strict=True))

    def over(self, elements: torch.Tensor) -> torch.Tensor:
        """The tensor of this layout whose storage is that of `elements`, a whole one-dimensional tensor."""
        if elements.numel() < self.extent:
            raise ValueError(f"{self} wants a storage of {self.extent} elements, not {elements.numel()}")
        return self._within(elements)

    def _within(self, tensor: torch.Tensor) -> torch.Tensor:
        placed = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return placed.set_(tensor.untyped_storage(), self.offset, self.shape, self.strides)


def layout_of(tensor: torch.Tensor) -> Layout:
    """The layout that `tensor` has."""
    return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def elements_of(tensor: torch.Tensor) -> torch.Tensor:
    """All that the storage of `tensor` holds, in one dimension, over the same memory."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return Layout((count,), (1,))._within(tensor)


def relocated(tree: Any, device: str | torch.device) -> Any:
    """Copies of the tensors in `tree` on `device`, in the same layouts; what shared memory shares it there too.

    A tensor that requires grad becomes a leaf that does.
    """
    storages: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            there = tensor.detach().to(device, copy=True)
        else:
            key = (tensor.untyped_storage()._cdata, tensor.dtype)
            if key not in storages:
                storages[key] = elements_of(tensor).to(device, copy=True)
            there = layout_of(tensor).over(storages[key])
        return there.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, move, tree)


def significant_strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The strides that say where an element is: of a dimension of one, or of an empty tensor, no stride does."""
    if tensor.numel() == 0:
        return ()
    return tuple(step if side != 1 else None for side, step in zip(tensor.shape, tensor.stride(), strict=True))
