"""The state of a capture. The problem: which launches belong to a graph is decided by streams and by the events between
them, and a device refuses what it cannot record. The rules, which are CUDA's: a capture begins on a stream that is not
the default one; a stream joins it by waiting for an event that was recorded in it; all that joined must be waited for
by the first stream before the capture ends there; what the host would have to wait for is refused, and spoils the
capture. There is one capture at a time in a process.

Source: CUDA Runtime API, "Stream Management", cudaStreamBeginCapture and the errors 900 to 907.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NoReturn

import torch

DEFAULT_STREAM = 0

Clock = dict[int, int]  # stream -> how much of what was captured on it is known to have happened


class CaptureError(torch.AcceleratorError):
    """What a device says when a capture cannot be, or cannot go on; `error_code` is CUDA's."""

    def __init__(self, code: int, detail: str) -> None:
        name = torch._C._get_privateuse1_backend_name().upper()
        super().__init__(f"{name} error: {_ERRORS[code]}: {detail}")
        self.error_code = code


UNSUPPORTED, INVALIDATED, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT = 900, 901, 903, 904, 905, 906, 907
_ERRORS = {
    UNSUPPORTED: "operation not permitted when stream is capturing",
    INVALIDATED: "operation failed due to a previous error during capture",
    UNMATCHED: "capture was not ended in the same stream as it began",
    UNJOINED: "capturing stream has unjoined work",
    ISOLATION: "dependency created on uncaptured work in another stream",
    IMPLICIT: "operation would make the legacy stream depend on a capturing blocking stream",
    CAPTURED_EVENT: "operation not permitted on an event last recorded in a capturing stream",
}


@dataclass
class Capture:
    """One capture under way: its first stream, and what each of its streams knows of the others."""

    owner: object
    origin: int
    spoiled_by: str | None = None
    _clocks: dict[int, Clock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._clocks[self.origin] = {self.origin: 0}

    def includes(self, stream: int) -> bool:
        return stream in self._clocks

    def advance(self, stream: int) -> Clock:
        """Something is captured on `stream`; returns what then is known to have happened, for an event."""
        clock = self._clocks[stream]
        clock[stream] += 1
        return dict(clock)

    def wait(self, stream: int, clock: Clock) -> None:
        """`stream` waits for an event of this capture, and is part of it from here on."""
        known = self._clocks.setdefault(stream, {stream: 0})
        for other, position in clock.items():
            known[other] = max(known.get(other, 0), position)

    def unjoined(self) -> list[int]:
        """Streams with work that the first stream has not waited for."""
        known = self._clocks[self.origin]
        return [s for s, clock in self._clocks.items() if s != self.origin and known.get(s, 0) < clock[s]]


class _Thread(threading.local):
    stream: int | None = None  # None: this thread has never set one


_thread = _Thread()
_lock = threading.Lock()
_active: Capture | None = None


def active() -> Capture | None:
    """The capture under way, on whatever stream."""
    return _active


def begin(owner: object) -> Capture:
    """Begins a capture on the current stream."""
    global _active
    origin = current_stream()
    with _lock:
        if _active is not None:
            raise CaptureError(UNSUPPORTED, "a graph is already being captured in this process")
        if origin == DEFAULT_STREAM:
            raise RuntimeError(
                "a graph must be captured on a non-default stream: use the context manager "
                f"torch.{torch._C._get_privateuse1_backend_name()}.graph(g), or set a side stream first"
            )
        _active = Capture(owner, origin)
        return _active


def end() -> None:
    """Ends the capture; what was wrong with it is the caller's to say."""
    global _active
    with _lock:
        _active = None


def here() -> Capture | None:
    """The capture that launches of this thread go into; None where they run."""
    if _active is None:
        return None
    return _active if _active.includes(current_stream()) else None


def current_stream() -> int:
    """The stream that this thread launches to.

    The threads in which autograd runs backward kernels never set one. torch tells a real device's threads which stream
    the forward used; here they use the one that is being captured.
    """
    if _thread.stream is not None:
        return _thread.stream
    if _active is not None and torch._C._current_graph_task_id() != -1:
        return _active.origin
    return DEFAULT_STREAM


def set_current_stream(stream: int) -> None:
    _thread.stream = stream


def refuse(what: str) -> None:
    """Raises as a device does where `what` needs a result or a host copy, and none can exist yet."""
    if here() is not None:
        spoil(UNSUPPORTED, what)


def spoil(code: int, what: str) -> NoReturn:
    """Raises, and leaves a capture that can only be given up."""
    if _active is not None:
        _active.spoiled_by = what
    raise CaptureError(code, what)
