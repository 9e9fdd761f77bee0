"""What the runner asks of a device that captures graphs. The problem: devices have different names for the same few
calls, and a capture that fails may leave one half way. The rule: whatever happens inside `capture`, it ends, the device
can be used, the current stream is what it was, and the caller gets a graph or one typed error.

`graphs.graph_device` chooses; `graph_streams` is for devices that capture streams, `graph_recorder` for the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Pool:
    """The memory that all captures of a runner share.

    A capture that fails leaves a pool that some allocators still believe to be recorded into (torch.cuda's and
    torch_musa's `capture_end` return before they say otherwise): the next capture gets another, and those before it
    keep theirs.

    Args:
        handle: the device's; None: the next capture makes one.
    """

    handle: Any = None


@dataclass(frozen=True)
class Captured(Generic[T]):
    """What a capture has left.

    Args:
        result: what the call returned. Its tensors hold nothing until the first replay.
        replay: runs all that was captured, on the current stream; a method of the device's own graph.
        release: forgets the graph, and lets go of its memory. No replay after it.
    """

    result: T
    replay: Callable[[], None]
    release: Callable[[], None]


class Opened:
    """A capture that has begun, and that its owner ends: `close()`, or `abandon(error)` if what ran in it failed."""

    def close(self) -> Captured[None]:
        """Ends it.

        Raises:
            CaptureFailedError: the device refused; nothing is left of it.
        """
        raise NotImplementedError

    def abandon(self, error: BaseException) -> None:
        """Ends it without a graph. What goes wrong in doing so is noted on `error`."""
        raise NotImplementedError


class GraphDevice:
    """One device, as far as graphs go.

    Args:
        device: with or without an index; without, all happens on the current one.
        reason: why it does not capture, or which graph class it captures with; for reports.

    Attributes:
        type: the device type, e.g. "musa".
        captures: whether a captured call is replayed without running its Python again.
        registers_generator: whether a random operator on the device's default generator draws anew at each replay.
            Where it is False, random operators must stay outside graphs.
    """

    captures: bool = False
    registers_generator: bool = False

    def __init__(self, device: torch.device, reason: str) -> None:
        self.device, self.type, self.reason = device, device.type, reason

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.device)!r}: {self.reason})"

    def pool(self) -> Pool:
        """A new pool, for captures that may share memory: those that are replayed in the order of their capture."""
        return Pool()

    def capture(self, call: Callable[[], T], pool: Pool | None = None) -> Captured[T]:
        """Captures `call()` on the side stream. Warm it up on the same stream first.

        Args:
            call: launches kernels on the current stream, over memory that outlives the graph.
            pool: where the graph's memory comes from; None: a pool of its own.

        Raises:
            CaptureFailedError: the device, or `call`, refused; the cause is attached. The device can be used.
        """
        raise NotImplementedError

    def open(self, pool: Pool) -> Opened:
        """Begins a capture on the current stream, which is the side stream, for code that runs between captures.

        Raises:
            CaptureFailedError: the device refused.
        """
        raise NotImplementedError

    def side_stream(self) -> AbstractContextManager[object]:
        """The stream on which the runner warms up and captures: on entry it waits for the current stream, and the
        current one waits for it on exit."""
        raise NotImplementedError

    def weak(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory without keeping it: only for what a graph computes anew at every replay. Where the device
        gives no safe way, the tensor itself."""
        return tensor

    def synchronize(self) -> None:
        """Waits for everything on the device."""
        raise NotImplementedError

    def memory(self) -> dict[str, int] | None:
        """Bytes `allocated` and `reserved` on the device; None where nobody counts."""
        raise NotImplementedError

    def is_capturing(self) -> bool:
        """Whether launches on the current stream go into a graph."""
        raise NotImplementedError


@contextmanager
def frozen_gc() -> Iterator[None]:
    """One garbage collection, and none until the end: a collection inside a capture may free what the device must not
    free then, and between captures it takes longer than a capture. What was the case before is the case afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    # What somebody else has frozen cannot be told from ours when thawing; and while nothing is collected by itself,
    # freezing only spares those who call gc.collect().
    freezing = gc.get_freeze_count() == 0
    if freezing:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if freezing:
            gc.unfreeze()
        if enabled:
            gc.enable()
        else:
            gc.disable()


@contextmanager
def no_gc() -> Iterator[None]:
    """No garbage collection inside: for one capture. Costs nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def device_memory(device: torch.device) -> dict[str, int] | None:
    """What `torch.<device>` counts, in bytes; None where it does not."""
    module: Any = getattr(torch, device.type, None)
    try:
        return {"allocated": int(module.memory_allocated()), "reserved": int(module.memory_reserved())}
    except (AttributeError, NotImplementedError, RuntimeError):  # no such function; or the vendor's says no
        return None
