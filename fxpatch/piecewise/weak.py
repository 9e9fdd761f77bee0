"""Tensors that do not keep their memory. The problem: buckets share memory only if nobody holds what a graph computes
anew at every replay, and yet the next step has to reach it; torch has no public tensor over a bare address. The rule: a
private door is looked up by name, tried once per device before it is trusted, and not used on a device whose storages
are none of torch's own; in doubt a tensor is held, which costs memory and nothing else.

torch's door makes a plain c10::StorageImpl. A vendor may have registered its own (c10::SetStorageImplCreate), and then
reads fields behind it that are not there: torch_npu does, and has a door of its own. So the table below is a list of
devices, not a default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Weaken = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Door:
    """A private function, and where it was seen.

    Args:
        module, name: where it is.
        seen_in: the versions of the package in which it was seen.
        devices: on which device types it is right.
        why: how that is known.
    """

    module: str
    name: str
    seen_in: tuple[str, ...]
    devices: tuple[str, ...]
    why: str

    def find(self) -> Any:
        """The function; None where its package is not loaded or has it no more."""
        return getattr(sys.modules.get(self.module), self.name, None)


FROM_POINTER = Door(
    module="torch._C",
    name="_construct_storage_from_data_pointer",
    seen_in=("2.13.0",),
    devices=("cuda", "xpu", "musa", "npu"),  # npu: only where torch_npu is not loaded, that is, simulated
    why="torch/csrc/Module.cpp makes a c10::StorageImpl without a deleter; no other kind is known of on these devices",
)
TORCH_NPU = Door(
    module="torch_npu._C",
    name="_weak_ref_tensor",
    seen_in=("2.13.0",),
    devices=("npu",),
    why="torch_npu registers NPUStorageImpl, and uses this in its own graphs (torch_npu/npu/graphs.py)",
)


def weakener(device: torch.device) -> tuple[Weaken | None, str]:
    """How to make a weak tensor on a device, and by which door; None and why not."""
    if device.type == "npu" and "torch_npu" in sys.modules:
        door, weaken = TORCH_NPU, TORCH_NPU.find()
    else:
        door, weaken = FROM_POINTER, _from_pointer if FROM_POINTER.find() is not None else None
    if device.type not in door.devices:
        return None, f"nobody has said whether {device.type}'s storages are torch's own"
    if weaken is None:
        return None, f"torch {torch.__version__} has no {door.module}.{door.name} (seen in {', '.join(door.seen_in)})"
    fault = _fault(weaken, device)
    return (weaken, f"{door.module}.{door.name}") if fault is None else (None, f"{door.module}.{door.name}: {fault}")


def can_be_weak(tensor: torch.Tensor) -> bool:
    """Whether there is an address to go by."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return plain and not tensor.requires_grad and not tensor.is_quantized and tensor.untyped_storage().nbytes() > 0


def _from_pointer(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    alias = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    weak = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    weak.set_(alias, tensor.storage_offset(), tensor.size(), tensor.stride())
    weak = weak.conj() if tensor.is_conj() else weak
    return torch._neg_view(weak) if tensor.is_neg() else weak


def _fault(weaken: Weaken, device: torch.device) -> str | None:
    """What is wrong with a weak tensor on this device; None if nothing is."""
    try:
        with torch.no_grad():
            held = torch.arange(8, dtype=torch.float32, device=device).view(2, 4).t()
            weak = weaken(held)
            if _geometry(weak) != _geometry(held):
                return f"made a tensor of {tuple(weak.shape)}, {weak.dtype} on {weak.device}"
            if weak.data_ptr() != held.data_ptr():
                return "made a tensor at another address"
            weak.add_(1)
            if held.cpu().sum().item() != 36:
                return "what was written through it did not arrive"
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()
