"""`torch.UntypedStorage(n, device=...)` asks C++ for the device's allocator, finds a null pointer and ends the process.
`deepcopy`, `torch.load` and `pickle` all come through there. So the class gets a `__new__` that makes storages of the
simulated device over host memory, and a `new` and a `resize_` that do not reach C++ on them.
"""

from __future__ import annotations

from typing import Any

import torch

from fxpatch.errors import SimulatorError
from fxpatch.simulator.storage import adopt, check_index, device_type


def guard() -> None:
    """Puts the guarded methods on `torch.UntypedStorage`, for the rest of the process."""
    cls: Any = torch.UntypedStorage
    make, empty, resize = cls.__new__, cls.new, cls.resize_

    def __new__(subclass: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return make(subclass, *args, **kwargs)
        wanted = torch.device(device)
        if wanted.type != device_type():
            return make(subclass, *args, device=device, **kwargs)
        check_index(wanted)
        return adopt(make(torch.UntypedStorage, *args, **kwargs))

    def new(self: Any) -> Any:
        return type(self)(0, device=self.device) if self.device.type == device_type() else empty(self)

    def resize_(self: Any, size: int) -> Any:
        if self.device.type == device_type() and size != self.nbytes():
            raise SimulatorError(
                "The storage of a simulated device cannot be resized.",
                seen=f"{self.nbytes()} bytes, to be {size}",
                expected="a storage that keeps its size",
                hint="resize a tensor that is its only user, or allocate a new one",
            )
        return self if self.device.type == device_type() else resize(self, size)

    cls.__new__, cls.new, cls.resize_ = staticmethod(__new__), new, resize_
