"""Copies of samples. The problem: `.to(device)` makes tensors contiguous that were not dense, and parts those that
shared memory; then an operator is not asked the same question twice. The rule: a copy has the same storages, whole,
under tensors of the same geometry; on the CPU and on the device alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def mirror(tree: Any, device: str, keep: tuple[torch.Tensor, ...] = ()) -> Any:
    """A copy of all tensors in `tree` on `device`, with whatever names the CPU as a device naming that one.

    Args:
        keep: tensors of the tree that stay on the CPU, because the operator reads them there.
    """
    storages: dict[tuple[int, str], torch.UntypedStorage] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return _tensor(x, "cpu" if any(x is kept for kept in keep) else device, storages)
        return torch.device(device) if names_a_device(x) else x

    return pytree.tree_map(leaf, tree)


def names_a_device(x: object) -> bool:
    """Whether an argument says on which device to work: a tensor there, or the device."""
    return isinstance(x, torch.Tensor) or x == torch.device("cpu") or x == "cpu"


def _tensor(x: torch.Tensor, device: str, storages: dict[tuple[int, str], torch.UntypedStorage]) -> torch.Tensor:
    if x.layout is not torch.strided:
        return x.detach().clone().to(device).requires_grad_(x.requires_grad)
    theirs = x.untyped_storage()
    storage = storages.get((theirs._cdata, device))
    if storage is None:
        memory = torch.empty(0, dtype=torch.uint8).set_(theirs)
        storage = storages[theirs._cdata, device] = memory.clone().to(device).untyped_storage()
    copy = torch.empty(0, dtype=x.dtype, device=device)
    copy.set_(storage, x.storage_offset(), x.shape, x.stride())
    if x.is_conj():
        copy = copy.conj()
    if x.is_neg():
        copy = torch._neg_view(copy)
    return copy.requires_grad_(x.requires_grad)
