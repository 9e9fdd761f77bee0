"""`torch.UntypedStorage(n, device=...)` asks C++ for the device's allocator, finds a null pointer and ends the process.
`deepcopy`, `torch.load` and `pickle` all come through there. So the class gets a `__new__` that makes storages of the
simulated device over host memory, and a `new` and a `resize_` that do not reach C++ on them. Sending one to another
process is refused.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch.multiprocessing import reductions

from fxpatch.errors import SimulatorError
from fxpatch.privateuse1 import private_type
from fxpatch.simulator import fork
from fxpatch.simulator.storage import adopt, check_index
from fxpatch.simulator.untraced import untraced


def guard() -> None:
    """Puts the guarded methods on `torch.UntypedStorage`, for the rest of the process."""
    cls: Any = torch.UntypedStorage
    make, empty, resize = cls.__new__, cls.new, cls.resize_

    def __new__(subclass: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return make(subclass, *args, **kwargs)
        wanted = torch.device(device)
        if wanted.type != private_type():
            return make(subclass, *args, device=device, **kwargs)
        fork.check()
        check_index(wanted)
        return adopt(make(torch.UntypedStorage, *args, **kwargs))

    def new(self: Any) -> Any:
        return type(self)(0, device=self.device) if self.device.type == private_type() else empty(self)

    def resize_(self: Any, size: int) -> Any:
        if self.device.type == private_type() and size != self.nbytes():
            raise SimulatorError(
                "The storage of a simulated device cannot be resized.",
                seen=f"{self.nbytes()} bytes, to be {size}",
                expected="a storage that keeps its size",
                hint="resize a tensor that is its only user, or allocate a new one",
            )
        return self if self.device.type == private_type() else resize(self, size)

    ForkingPickler.register(cls, untraced(_send))
    cls.__new__, cls.new, cls.resize_ = staticmethod(untraced(__new__)), untraced(new), untraced(resize_)


def _send(storage: torch.UntypedStorage) -> Any:
    """Reduces a storage for another process. A queue pickles in a thread of its own, and if that raises, the reader
    waits for ever: so what cannot be sent raises where it arrives."""
    if storage.device.type != private_type():
        return reductions.reduce_storage(storage)
    if multiprocessing.context.get_spawning_popen() is not None:
        _refuse_to_receive()
    return _refuse_to_receive, ()


def _refuse_to_receive() -> NoReturn:
    raise SimulatorError(
        "A tensor of a simulated device cannot be sent to another process.",
        seen=f"a {private_type()} tensor in a multiprocessing queue or among a process's arguments",
        expected="CPU tensors there",
        hint="send tensor.cpu(), and move it to the device where it arrives (a DataLoader: in the main process)",
    )
