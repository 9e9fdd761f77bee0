"""Device memory. The problem: pure Python can register no allocator with torch. The rule: a device storage is a second
name for host memory, and that memory lives exactly as long as something that may read it.

The second name comes from `dlpack`. The storage carries its `Block`, which says where the memory is to those who run
CPU kernels on it, and which counts it. Kernels that write get an `alias` of the memory that cannot be resized: one that
resized the memory itself would free it under the device's feet.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from fxpatch.errors import SimulatorError
from fxpatch.privateuse1 import private_type
from fxpatch.simulator.dlpack import renamed
from fxpatch.simulator.memory import ledger
from fxpatch.simulator.pools import Pool, Range
from fxpatch.simulator.untraced import unseen, untraced

CPU = torch.device("cpu")
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set_storage = torch.ops.aten.set_.source_Storage_storage_offset
_use_count = torch._C._storage_Use_Count


class Block:
    """The memory of one device storage; it counts as allocated until the storage is gone.

    Args:
        host: CPU tensor over all of it.
        place: where it lies in a graph pool; None outside pools.
    """

    __slots__ = ("_alias", "counted", "dtype", "host", "nbytes", "place", "shape", "stride", "watch")

    def __init__(self, host: torch.Tensor, nbytes: int, place: Range | None = None) -> None:
        self.nbytes, self.place, self.counted = nbytes, place, 0
        self.watch: Watch | None = None
        self.host, self.stride, self.dtype = host, host.stride(), host.dtype
        self.shape: torch.Size | None = host.shape
        self._alias: torch.UntypedStorage | None = None
        if place is None and nbytes:
            self.counted = ledger.take(nbytes)

    @property
    def alias(self) -> torch.UntypedStorage:
        """A CPU storage over the same memory, which owns nothing and cannot be resized."""
        if self._alias is None:
            start = self.host.untyped_storage().data_ptr() + (0 if self.place is None else self.place.start)
            self._alias = _name(start, CPU, self.nbytes)
        return self._alias

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor for a kernel that only reads: what a device tensor over this memory holds."""
        if (
            tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.dtype is self.dtype
            and not tensor.storage_offset()
            and not tensor.is_neg()
            and not tensor.is_conj()
        ):
            return self.host
        return host_view(tensor, self.alias)

    def watched(self) -> Watch:
        """For a graph: keeps the memory from the host, and knows whether the device still owns it."""
        if self.watch is None:
            self.watch = Watch(self.host)
        return self.watch

    @untraced
    def __del__(self) -> None:
        try:  # before the memory is anybody else's
            if self.watch is not None:
                self.watch.lose()
        finally:
            if self.place is not None:
                self.place.give_back()
            elif self.counted:
                ledger.give_back(self.counted)


class Watch:
    """What a graph holds of memory that it does not own. A device would read whatever came to lie there; here the host
    keeps it, with NaN in it where the numbers can say so (an index must not send a kernel anywhere)."""

    __slots__ = ("host", "owned")

    def __init__(self, host: torch.Tensor) -> None:
        self.host, self.owned = host, True

    def lose(self) -> None:
        """The last tensor over the memory is gone."""
        self.owned = False
        if self.host.is_floating_point() or self.host.is_complex():
            with unseen():  # a tensor dies at any moment, under any mode
                self.host.fill_(float("nan"))


def the_device() -> torch.device:
    """The simulated device. There is one: the Python device guard of torch cannot switch to a second."""
    return torch.device(private_type(), 0)


def on_device(x: object) -> bool:
    """Whether `x` is a tensor on the simulated device."""
    return isinstance(x, torch.Tensor) and not x.is_cpu and x.device.type == private_type()


def check_index(device: torch.device | None) -> None:
    """Refuses an index other than 0, in a real device's words."""
    if device is not None and device.index not in (None, 0):
        raise RuntimeError(f"{device.type} error: invalid device ordinal {device.index}: there is one simulated device")


def block_of(storage: torch.UntypedStorage) -> Block | None:
    """The memory behind a device storage; None for one that C++ made itself (over nothing, or over a raw pointer)."""
    return getattr(storage, "_block", None)


def alias_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A CPU storage over the same memory, which owns nothing and cannot be resized."""
    block = block_of(storage)
    return _name(storage.data_ptr(), CPU, storage.nbytes()) if block is None else block.alias


def host_view(tensor: torch.Tensor, alias: torch.UntypedStorage) -> torch.Tensor:
    """A new CPU tensor over `alias` with the geometry of a device tensor."""
    host = _empty_host(tensor.dtype)
    host.set_(alias, tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.is_conj():
        torch._C._set_conj(host, True)
    if tensor.is_neg():
        torch._C._set_neg(host, True)
    return host


def take_over(host: torch.Tensor) -> torch.Tensor | None:
    """`to_device`, if nothing but this CPU tensor uses its memory; else None."""
    if host.layout is not torch.strided:
        return None
    source = host.untyped_storage()
    # two: the tensor, and the Python object made here
    return _move(host, source) if _use_count(source._cdata) == 2 else None


def to_device(host: torch.Tensor) -> torch.Tensor:
    """A device tensor that takes over the memory of a CPU tensor.

    Raises:
        torch.OutOfMemoryError: the device is full.
        SimulatorError: `host` has no dense memory.
    """
    if host.layout is not torch.strided:
        return device_view(host, torch.UntypedStorage())  # raises
    return _move(host, host.untyped_storage())


def _move(host: torch.Tensor, source: torch.UntypedStorage) -> torch.Tensor:
    block = Block(host, source.nbytes())
    if not host.storage_offset() and not host.is_conj() and not host.is_neg():
        try:
            tensor = renamed(host, block.stride)
        except (BufferError, RuntimeError):  # a dtype that DLPack has no name for
            return _adopt(host, source, block)
        storage: Any = tensor.untyped_storage()
        if storage.nbytes() == block.nbytes:
            storage._block = block
            return tensor
    return _adopt(host, source, block)


def from_pool(like: torch.Tensor, pool: Pool) -> torch.Tensor:
    """A device tensor with the geometry of `like` (of any device) over memory of a graph pool."""
    nbytes = like.untyped_storage().nbytes()
    place = pool.take(nbytes)
    memory = place.bytes(nbytes)
    host = _empty_host(like.dtype)
    first = memory.storage_offset() // like.itemsize
    host.set_(memory.untyped_storage(), first, like.shape, like.stride())
    # a storage begins where the tensor does: so one over these bytes, and the geometry on top
    storage: Any = renamed(memory, (1,)).untyped_storage()
    storage._block = Block(host, nbytes, place)
    return device_view(like, storage)


def adopt(host: torch.UntypedStorage) -> torch.UntypedStorage:
    """A new device storage over the memory of `host`, which it keeps alive."""
    memory = torch.empty(0, dtype=torch.uint8, device=CPU).set_(host)
    return to_device(memory).untyped_storage()


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


def grow(tensor: torch.Tensor, host: torch.Tensor) -> None:
    """Gives a device tensor the memory and geometry of `host`; a real device grows the storage in place.

    A storage that other tensors use as well cannot be exchanged in all of them, so that raises.
    """
    check_sole_user(tensor, host.shape)
    point(tensor, adopt(host.untyped_storage()), like=host)


def check_sole_user(tensor: torch.Tensor, wanted: torch.Size) -> None:
    """Refuses to give new memory to a tensor whose storage others use as well."""
    storage = tensor.untyped_storage()
    if storage.nbytes() > 0 and _use_count(storage._cdata) > 2:  # `tensor`, and `storage` here
        raise SimulatorError(
            "A tensor that shares its memory with others cannot be grown on the simulated device.",
            seen=f"a tensor of shape {tuple(tensor.shape)} that is a view, or has views, to be {tuple(wanted)}",
            expected="a tensor that is the only user of its storage",
            hint="allocate the full size first, or drop the views before it grows",
        )


def point(tensor: torch.Tensor, storage: torch.UntypedStorage, like: torch.Tensor) -> None:
    """Sets storage and geometry of a tensor, in place."""
    # the CPU kernel of set_ touches metadata only, so it serves a device tensor as well
    _set_storage.redispatch(_CPU_KEYS, tensor, storage, like.storage_offset(), like.shape, like.stride())
    if tensor.is_conj() != like.is_conj():
        torch._C._set_conj(tensor, like.is_conj())
    if tensor.is_neg() != like.is_neg():
        torch._C._set_neg(tensor, like.is_neg())


def _adopt(host: torch.Tensor, source: torch.UntypedStorage, block: Block) -> torch.Tensor:
    """`to_device` for a tensor whose geometry or dtype DLPack does not carry: bytes go through, and it on top."""
    memory = torch.empty(0, dtype=torch.uint8, device=CPU).set_(source)
    storage: Any = renamed(memory, (1,)).untyped_storage()
    storage._block = block
    block.shape = None  # `host` may begin elsewhere than its memory: never to be taken for a device tensor
    return device_view(host, storage)


def _empty_host(dtype: torch.dtype) -> torch.Tensor:
    """An empty CPU tensor; detaching one is faster than making one."""
    empty = _EMPTY.get(dtype)
    if empty is None:
        with torch.inference_mode(False):
            empty = _EMPTY[dtype] = torch.empty(0, dtype=dtype, device=CPU)
    return empty.detach()


_EMPTY: dict[torch.dtype, torch.Tensor] = {}


def _name(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    return cast(torch.UntypedStorage, torch._C._construct_storage_from_data_pointer(pointer, device, nbytes))
