"""The state of a capture. The problem: which launches belong to a graph is decided by streams and by the events between
them, and a device refuses what it cannot record. The rules, which are CUDA's: a capture begins on a stream that is not
the default one; a stream joins it by waiting for an event that was recorded in it; all that joined must be waited for
by the first stream before the capture ends there; what the host would have to wait for is refused, and spoils the
capture. There is one capture at a time in a process.

Source: CUDA Runtime API, "Stream Management", cudaStreamBeginCapture and the errors 900 to 908.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from fxpatch.privateuse1 import private_type

DEFAULT_STREAM = 0

Clock = dict[int, int]  # stream -> how much of what was captured on it is known to have happened


class CaptureError(torch.AcceleratorError):
    """What a device says when a capture cannot be, or cannot go on; `error_code` is CUDA's."""

    def __init__(self, code: int, detail: str) -> None:
        name = private_type().upper()
        super().__init__(f"{name} error: {_ERRORS[code]}: {detail}")
        self.error_code = code


UNSUPPORTED, INVALIDATED, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT = 900, 901, 903, 904, 905, 906
CAPTURED_EVENT, WRONG_THREAD = 907, 908
_ERRORS = {
    UNSUPPORTED: "operation not permitted when stream is capturing",
    INVALIDATED: "operation failed due to a previous error during capture",
    UNMATCHED: "capture was not ended in the same stream as it began",
    UNJOINED: "capturing stream has unjoined work",
    ISOLATION: "dependency created on uncaptured work in another stream",
    IMPLICIT: "operation would make the legacy stream depend on a capturing blocking stream",
    CAPTURED_EVENT: "operation not permitted on an event last recorded in a capturing stream",
    WRONG_THREAD: "attempt to terminate a thread-local capture sequence from another thread",
}


@dataclass
class Capture:
    """One capture under way: where it began, and what each of its streams knows of the others.

    Args:
        owner: the graph.
        origin: the stream on which it began, and is to end.
        thread: the thread that is to end it; None: any.
        spoiled_by: what the device refused; from there on the capture can only be given up.
    """

    owner: Any
    origin: int
    thread: int | None
    spoiled_by: str | None = None
    _clocks: dict[int, Clock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._clocks[self.origin] = {self.origin: 0}

    def check_sound(self) -> None:
        """Refuses to go on with a capture that something has spoiled."""
        if self.spoiled_by is not None:
            raise CaptureError(INVALIDATED, self.spoiled_by)

    def check_end(self) -> None:
        """Ends the capture, and says what was wrong with it."""
        here, thread, unjoined = current_stream(), threading.get_ident(), self.unjoined()
        end()
        self.check_sound()
        if self.thread not in (None, thread):
            raise CaptureError(WRONG_THREAD, "the thread that began it ends it, unless capture_error_mode is 'relaxed'")
        if here != self.origin:
            raise CaptureError(UNMATCHED, f"it began on stream {self.origin}, this is {here}")
        if unjoined:
            streams = ", ".join(map(str, unjoined))
            raise CaptureError(UNJOINED, f"wait on the capturing stream for stream {streams}")

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


_lock = threading.Lock()
_active: Capture | None = None
_STREAM = "fxpatch.simulator.capture.current_stream"


def active() -> Capture | None:
    """The capture under way, on whatever stream."""
    return _active


def begin(owner: Any, any_thread: bool = False) -> Capture:
    """Begins a capture on the current stream; `any_thread` may end it, otherwise this one."""
    global _active
    origin = current_stream()
    with _lock:
        if _active is not None:
            raise CaptureError(UNSUPPORTED, "a graph is already being captured in this process")
        if origin == DEFAULT_STREAM:
            raise RuntimeError(
                "a graph must be captured on a non-default stream: use the context manager "
                f"torch.{private_type()}.graph(g), or set a side stream first"
            )
        _active = Capture(owner, origin, None if any_thread else threading.get_ident())
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

    torch hands its thread-local objects on to the threads in which autograd runs backward kernels: those launch to the
    stream of the thread that called `backward()`. (torch 2.11, 2.13; cudagraph trees rely on it too.)
    """
    if not torch._C._is_key_in_tls(_STREAM):
        return DEFAULT_STREAM
    stream: int = torch._C._get_obj_in_tls(_STREAM)
    return stream


def set_current_stream(stream: int) -> None:
    torch._C._stash_obj_in_tls(_STREAM, stream)


def refuse(what: str) -> None:
    """Raises as a device does where `what` needs a result or a host copy, and none can exist yet."""
    if here() is not None:
        spoil(UNSUPPORTED, what)


def spoil(code: int, what: str) -> NoReturn:
    """Raises, and leaves a capture that can only be given up."""
    if _active is not None:
        _active.spoiled_by = what
    raise CaptureError(code, what)
