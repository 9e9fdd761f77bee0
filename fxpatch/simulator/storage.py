"""Device memory. The problem: pure Python can register no allocator with torch. The rule: a device storage is a
second name for host memory, and that memory lives exactly as long as something that may read it.

Each allocation is a `Block`: the host storage that owns the memory, and a CPU `alias` of it that cannot be resized,
through which CPU kernels reach it (a kernel that resized the owner would free memory under the device storage's
feet). A block is held by its device storage, and by every graph that was captured over it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import cast

import torch

from fxpatch.errors import SimulatorError
from fxpatch.simulator.untraced import untraced

CPU = torch.device("cpu")
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set_storage = torch.ops.aten.set_.source_Storage_storage_offset


class Block:
    """One allocation; `statistics` counts it from here until the last holder lets go."""

    def __init__(self, owner: torch.UntypedStorage) -> None:
        self.nbytes = owner.nbytes()
        self.alias = _name(owner.data_ptr(), CPU, self.nbytes)
        self._owner = owner
        statistics.took(self.nbytes)

    @untraced
    def __del__(self) -> None:
        statistics.gave_back(self.nbytes)


@dataclass
class Statistics:
    """What `memory_allocated()` and its kin answer: live and peak bytes, live blocks."""

    nbytes: int = 0
    blocks: int = 0
    peak: int = 0

    def took(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.blocks += 1
        self.peak = max(self.peak, self.nbytes)

    def gave_back(self, nbytes: int) -> None:
        self.nbytes -= nbytes
        self.blocks -= 1

    def reset_peak(self) -> None:
        self.peak = self.nbytes


statistics = Statistics()
_blocks: dict[int, Block] = {}  # StorageImpl address of a live device storage -> its memory


def device_type() -> str:
    """The name PrivateUse1 goes by in this process."""
    return torch._C._get_privateuse1_backend_name()


def the_device() -> torch.device:
    """The simulated device. There is one: the Python device guard of torch cannot switch to a second."""
    return torch.device(device_type(), 0)


def on_device(x: object) -> bool:
    """Whether `x` is a tensor on the simulated device."""
    return isinstance(x, torch.Tensor) and x.device.type == device_type()


def check_index(device: torch.device | None) -> None:
    """Refuses an index other than 0, in a real device's words."""
    if device is not None and device.index not in (None, 0):
        raise RuntimeError(f"{device.type} error: invalid device ordinal {device.index}: there is one simulated device")


def adopt(host: torch.UntypedStorage) -> torch.UntypedStorage:
    """A new device storage over the memory of `host`, which it keeps alive."""
    block = Block(host)
    storage = _name(host.data_ptr(), the_device(), block.nbytes)
    address = storage._cdata
    _blocks[address] = block
    # torch keeps the Python object of a storage as long as its C++ one, so this fires when the last tensor is gone
    weakref.finalize(storage, _blocks.pop, address).atexit = False
    return storage


def block_of(storage: torch.UntypedStorage) -> Block | None:
    """The memory behind a device storage; None for one that C++ made itself (over nothing, or over a raw pointer)."""
    return _blocks.get(storage._cdata)


def alias_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A CPU storage over the same memory, which owns nothing and cannot be resized."""
    block = block_of(storage)
    return _name(storage.data_ptr(), CPU, storage.nbytes()) if block is None else block.alias


def host_view(tensor: torch.Tensor, alias: torch.UntypedStorage) -> torch.Tensor:
    """The CPU tensor over `alias` with the geometry of a device tensor."""
    host = torch.empty(0, dtype=tensor.dtype, device=CPU)
    point(host, alias, like=tensor)
    return host


def device_view(host: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """The device tensor over `storage` with the geometry of a CPU tensor."""
    if host.layout is not torch.strided or host.is_quantized:
        raise SimulatorError(
            "An operator made a tensor that the simulated device has no memory for.",
            seen=f"a {host.layout} tensor of {host.dtype}",
            expected="a dense tensor (torch.strided)",
            hint="keep sparse, quantized and MKL-DNN tensors on the CPU",
        )
    tensor: torch.Tensor = torch._C._acc.create_empty_tensor((0,), host.dtype)
    point(tensor, storage, like=host)
    return tensor


def to_device(host: torch.Tensor) -> torch.Tensor:
    """A device tensor that takes over the memory of a CPU tensor nobody else uses."""
    return device_view(host, adopt(host.untyped_storage()))


def grow(tensor: torch.Tensor, host: torch.Tensor) -> None:
    """Gives a device tensor the memory and geometry of `host`; a real device grows the storage in place.

    A storage that other tensors use as well cannot be exchanged in all of them, so that raises.
    """
    storage = tensor.untyped_storage()
    if storage.nbytes() > 0 and torch._C._storage_Use_Count(storage._cdata) > 2:  # `tensor`, and `storage` here
        raise SimulatorError(
            "A tensor that shares its memory with others cannot be grown on the simulated device.",
            seen=f"a tensor of shape {tuple(tensor.shape)} that is a view, or has views, to be {tuple(host.shape)}",
            expected="a tensor that is the only user of its storage",
            hint="allocate the full size first, or drop the views before it grows",
        )
    point(tensor, adopt(host.untyped_storage()), like=host)


def point(tensor: torch.Tensor, storage: torch.UntypedStorage, like: torch.Tensor) -> None:
    """Sets storage and geometry of a tensor, in place."""
    # the CPU kernel of set_ touches metadata only, so it serves a device tensor as well
    _set_storage.redispatch(_CPU_KEYS, tensor, storage, like.storage_offset(), like.shape, like.stride())
    if tensor.is_conj() != like.is_conj():
        torch._C._set_conj(tensor, like.is_conj())
    if tensor.is_neg() != like.is_neg():
        torch._C._set_neg(tensor, like.is_neg())


def _name(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    return cast(torch.UntypedStorage, torch._C._construct_storage_from_data_pointer(pointer, device, nbytes))
