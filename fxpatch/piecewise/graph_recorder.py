"""Where there are no graphs: a replay runs the call again and copies what it returns to where it was the first time. So
all that is built on captures can be used, and tested, on any device; nothing is faster for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.piecewise.capture_failure import failure
from fxpatch.piecewise.graph_device import Captured, GraphDevice, Pool, T, device_memory


class Recorder(GraphDevice):
    """Runs calls again. Random operators draw anew in each run."""

    captures = False
    registers_generator = True

    def capture(self, call: Callable[[], T], pool: Pool | None = None) -> Captured[T]:
        try:
            result = call()
            rerun = _Rerun(call, result)
        except Exception as error:
            raise failure(self.type, error, "the call", None) from error
        return Captured(result, rerun.replay, rerun.release)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield  # everything happens in order

    def synchronize(self) -> None:
        if self.type != "cpu":
            with self._device_guard():
                torch.get_device_module(self.type).synchronize()

    def memory(self) -> dict[str, int] | None:
        return None if self.type == "cpu" else device_memory(self.device)

    def is_capturing(self) -> bool:
        return False

    def _device_guard(self) -> Any:
        index = self.device.index
        return nullcontext() if index is None else torch.get_device_module(self.type).device(index)


class _Rerun:
    """A call, and the tensors that it returned the first time."""

    def __init__(self, call: Callable[[], Any], result: Any) -> None:
        self._call: Callable[[], Any] | None = call
        self._kept = _tensors(result)
        self._written = [_written_once(tensor) for tensor in self._kept]

    def replay(self) -> None:
        if self._call is None:
            raise RuntimeError("this call has been released: capture it again")
        new = _tensors(self._call())
        if len(new) != len(self._kept):
            raise RuntimeError(f"the call returned {len(new)} tensors, and {len(self._kept)} when it was captured")
        for kept, written, tensor in zip(self._kept, self._written, new, strict=True):
            if tensor.shape != kept.shape or tensor.dtype is not kept.dtype:
                raise RuntimeError(
                    f"the call returned a tensor of {tuple(tensor.shape)}, {tensor.dtype}, and of {tuple(kept.shape)}, "
                    f"{kept.dtype} when it was captured"
                )
            if tensor is not kept and tensor.data_ptr() != kept.data_ptr():
                written.copy_(_written_once(tensor))

    def release(self) -> None:
        self._call, self._kept, self._written = None, [], []


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if type(result) in (tuple, list) and all(isinstance(leaf, torch.Tensor) for leaf in result):
        return list(result)  # what compiled pieces return; a pytree takes ten times as long
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _written_once(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its expanded dimensions, where each element stands for many: copy_ refuses to write those."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
