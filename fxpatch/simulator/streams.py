"""Streams and events. The device finishes each launch before the next, whatever the stream, so order is always kept and
every event has happened. What is left to get right is identity, what belongs to a capture, and times that nobody takes
for a device's.

`torch.Stream("musa")` and `torch.Event("musa")` are made in C++, which knows one stream only: they mean the default
stream, and a capture does not see them. `torch.musa.Stream` and `torch.musa.Event` are the ones to use.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from types import TracebackType
from typing import Any

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator import capture, fork
from fxpatch.simulator.storage import check_index

_ids = itertools.count(1)


class _Left(threading.local):
    """The streams that this thread has left by `with stream:`, to come back to; one stream may serve many threads."""

    def __init__(self) -> None:
        self.streams: list[int] = []


_left = _Left()


class SimulatedMilliseconds(float):
    """Time between two events: the host's, not a device's, and it says so wherever it is shown."""

    def __repr__(self) -> str:
        return f"{float(self):.3f} (simulated: milliseconds of the host)"

    __str__ = __repr__


class Stream(torch.Stream):
    """A stream of the device.

    Args:
        device: the device, by name, index or as torch.device; it has one index.
        priority: taken, and without effect.
    """

    def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
        if not ids:
            check_device(device)
            kind = torch.Stream(private_type()).device_type
            ids = {"stream_id": next(_ids), "device_index": 0, "device_type": kind}
        return super().__new__(cls, **ids)

    def wait_event(self, event: torch.Event) -> None:
        """Later launches on this stream come after `event`."""
        event.wait(self)

    def wait_stream(self, stream: torch.Stream) -> None:
        """Later launches on this stream come after all of `stream` so far."""
        event = Event()
        event.record(stream)
        event.wait(self)

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        """Records `event`, or a new one, on this stream; returns it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all launches have finished."""
        self._refuse_in_capture("asking whether a stream has finished")
        return True

    def synchronize(self) -> None:
        """Every launch has finished already."""
        self._refuse_in_capture("synchronizing a stream")

    def is_capturing(self) -> bool:
        """Whether launches on this stream go into a graph."""
        active = capture.active()
        return active is not None and active.includes(self.stream_id)

    def _refuse_in_capture(self, what: str) -> None:
        if self.is_capturing():
            capture.spoil(capture.UNSUPPORTED, what)

    def __enter__(self) -> Stream:
        _left.streams.append(capture.current_stream())
        capture.set_current_stream(self.stream_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        capture.set_current_stream(_left.streams.pop())


class Event(torch.Event):
    """A point on a stream.

    Args:
        enable_timing: whether `elapsed_time` may be asked.
        external: in a capture it becomes a launch of the graph, that happens at each replay, and can be waited for from
            either side; otherwise it is one of the capture's own dependencies.
    """

    _at: float | None = None  # when it was last recorded, on the host's clock
    _captured: tuple[weakref.ref[capture.Capture], capture.Clock] | None = None  # an event keeps no graph

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> Event:
        return super().__new__(cls, private_type())

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self._timed, self._external = enable_timing, external

    def record(self, stream: torch.Stream | None = None) -> None:
        """Puts the event after all launches on the stream so far."""
        number = _id(stream)
        active = capture.active()
        if active is None or not active.includes(number):
            self._happen()
        elif self._external:
            active.advance(number)
            active.owner.record(self._happen, "record of an external event")
        else:
            self._captured, self._at = (weakref.ref(active), active.advance(number)), None

    def _happen(self) -> None:
        self._captured, self._at = None, time.perf_counter()

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Later launches on the stream come after the event; one that was never recorded has happened."""
        number, active = _id(stream), capture.active()
        if self._captured is not None:
            recorded, clock = self._captured[0](), self._captured[1]
            if recorded is None or recorded is not active:
                return  # its capture is over, and so it has no time outside the graph
            if number == capture.DEFAULT_STREAM:
                capture.spoil(capture.IMPLICIT, "the default stream cannot wait for captured work")
            recorded.wait(number, clock)
        elif active is not None and active.includes(number) and self._at is not None and not self._external:
            capture.spoil(capture.ISOLATION, "a captured stream cannot wait for an event recorded outside the capture")

    def query(self) -> bool:
        """Whether it has happened."""
        self._refuse_in_capture()
        return True

    def synchronize(self) -> None:
        """It has happened already."""
        self._refuse_in_capture()

    def elapsed_time(self, end_event: torch.Event) -> float:
        """Milliseconds of the host from this event to the other."""
        if not (isinstance(end_event, Event) and self._timed and end_event._timed):
            raise RuntimeError("both events must have been created with enable_timing=True")
        self._refuse_in_capture()
        end_event._refuse_in_capture()
        if self._at is None or end_event._at is None:
            raise RuntimeError("both events must have been recorded, outside a graph, before their time is asked")
        return SimulatedMilliseconds((end_event._at - self._at) * 1000)

    def _refuse_in_capture(self) -> None:
        active = capture.active()
        if active is not None and self._captured is not None and self._captured[0]() is active:
            capture.spoil(capture.CAPTURED_EVENT, "asking for an event that the graph has yet to record")


class stream:
    """`with torch.musa.stream(s): ...`: launches inside go to `s`; None changes nothing."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> torch.Stream | None:
        self._before = capture.current_stream()
        set_stream(self.stream)
        return self.stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.stream is not None:
            capture.set_current_stream(self._before)


def current_stream(device: Any = None) -> Stream:
    """The stream that this thread launches to."""
    check_device(device)
    return _numbered(capture.current_stream())


def default_stream(device: Any = None) -> Stream:
    """The stream that a thread launches to until it sets another."""
    check_device(device)
    return _numbered(capture.DEFAULT_STREAM)


def set_stream(stream: torch.Stream | None) -> None:
    """Launches of this thread go to `stream` from here on; None changes nothing."""
    if stream is not None:
        capture.set_current_stream(stream.stream_id)


def _numbered(number: int) -> Stream:
    kind = torch.Stream(private_type()).device_type
    return Stream(stream_id=number, device_index=0, device_type=kind)


def _id(stream: torch.Stream | None) -> int:
    return capture.current_stream() if stream is None else int(stream.stream_id)


def check_device(device: Any) -> None:
    """Refuses what is not the device: a name, an index, a torch.device, or None for the current one."""
    fork.check()
    if isinstance(device, int):
        device = torch.device(private_type(), max(device, 0))
    elif isinstance(device, str):
        device = torch.device(device)
    if device is not None:
        if device.type != private_type():
            raise ValueError(f"expected a {private_type()} device, but got {device}")
        check_index(device)
