"""Streams and events. The device finishes each launch before the next, so every stream is the one in-order stream and
every event has happened; what is left to get right is identity, timing, and that waiting is refused in a capture.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fxpatch.simulator.graph import refuse_while_capturing
from fxpatch.simulator.storage import device_type


class Stream(torch.Stream):
    """The device's stream."""

    def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
        if ids:
            return super().__new__(cls, **ids)
        return super().__new__(cls, device=device_type() if device is None else device, priority=priority)

    def synchronize(self) -> None:
        refuse_while_capturing("synchronizing a stream")


class Event(torch.Event):
    """A point in time on the stream."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return super().__new__(cls, device_type())

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timed, self._at = enable_timing, 0.0

    def record(self, stream: torch.Stream | None = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: torch.Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        refuse_while_capturing("synchronizing an event")

    def elapsed_time(self, end_event: torch.Event) -> float:
        """Milliseconds from this event to the other."""
        if not (isinstance(end_event, Event) and self._timed and end_event._timed):
            raise RuntimeError("both events must have been created with enable_timing=True")
        return (end_event._at - self._at) * 1000


def current_stream(device: Any = None) -> torch.Stream:
    current = torch.accelerator.current_stream()
    return Stream(stream_id=current.stream_id, device_index=current.device_index, device_type=current.device_type)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Launches inside go to `stream`."""
    yield
