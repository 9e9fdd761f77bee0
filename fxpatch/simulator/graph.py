"""Stream capture. The problem: code over graphs can only be trusted if a capture behaves as a device's does. The rule:
a capture records and computes nothing; replay computes, into the same memory; what a device cannot capture raises.

What a capture allocates is filled with a pattern that no result has (NaN, or the byte 0x5A), so that reading an
output before the first replay shows. All memory that the program touches lives as long as the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from fxpatch.simulator.storage import alias_of, block_of, host_view, on_device
from fxpatch.simulator.untraced import untraced

POISON_BYTE = 0x5A

_begin_or_end = threading.Lock()
# one per process, not per thread: autograd runs backward kernels in threads of its own, on the same stream
_capturing: Graph | None = None


class Graph:
    """A recorded sequence of kernel launches: `capture_begin()`, launches, `capture_end()`, `replay()` at will."""

    def __init__(self) -> None:
        self._program: list[Callable[[], object]] | None = None
        self._kept: list[object] = []

    @untraced
    def capture_begin(self) -> None:
        """From here on, every launch on the device goes into this graph instead."""
        global _capturing
        with _begin_or_end:
            if _capturing is not None:
                raise RuntimeError("a graph is already being captured on this device")
            if self._program is not None:
                raise RuntimeError("this graph has been captured already: call reset() first")
            self._program = []
            _capturing = self

    @untraced
    def capture_end(self) -> None:
        """Launches execute again; the graph can be replayed."""
        global _capturing
        with _begin_or_end:
            if _capturing is not self:
                raise RuntimeError("this graph is not being captured")
            _capturing = None

    @untraced
    def replay(self) -> None:
        """Runs the program once, on whatever its input memory holds now."""
        refuse_while_capturing("replaying a graph")
        if self._program is None:
            raise RuntimeError("this graph has not been captured")
        # nothing a replay makes gets out; and this is the mode in which tensors of every mode may be written.
        # A replay is no operator to anyone: no autocast, function mode, dispatch mode or transform sees into it
        with (
            torch.inference_mode(),
            torch._C._DisableAutocast(),
            torch._C._DisableFuncTorch(),
            torch._C._DisableTorchDispatch(),
            torch._C.DisableTorchFunction(),
        ):
            for launch in self._program:
                launch()

    @untraced
    def reset(self) -> None:
        """Forgets the program and lets go of its memory; the graph can be captured anew."""
        if _capturing is self:
            self.capture_end()
        self._program = None
        self._kept.clear()

    @property
    def launches(self) -> int:
        """How many launches one replay makes."""
        return len(self._program or ())

    def record(self, launch: Callable[[], object], *touched: object) -> None:
        """Appends a launch and keeps the memory of the device tensors it touches."""
        assert self._program is not None
        self._program.append(launch)
        self.keep(*touched)

    def keep(self, *touched: object) -> None:
        """Keeps the memory of device tensors alive as long as the graph."""
        for tensor in touched:
            if isinstance(tensor, torch.Tensor) and on_device(tensor):
                storage = tensor.untyped_storage()
                # the block, not the tensor: what the user does with the tensor's geometry later is no affair of ours
                self._kept.append(block_of(storage) or storage)


class capture:
    """`with torch.musa.graph(g): ...` captures the body into `g`; if it raises, `g` is left empty."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        self._graph.capture_begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._graph.capture_end()
        if kind is not None:
            self._graph.reset()


def capturing() -> Graph | None:
    """The graph being captured now."""
    return _capturing


def refuse_while_capturing(what: str) -> None:
    """Raises as a device does when `what` needs a result or a host copy, and none can exist yet."""
    if _capturing is not None:
        raise RuntimeError(f"{what} is not permitted while a graph is being captured")


def launch(kernel: Callable[..., object], *args: Any) -> None:
    """The door through which Inductor's generated code calls its C++ kernels."""
    graph = capturing()
    if graph is None:
        kernel(*args)
    else:
        pinned = [_fixed(arg) for arg in args]
        graph.record(lambda: kernel(*pinned), *args)


def poison(host: torch.Tensor) -> None:
    """Makes fresh memory, into which nothing has been computed, recognisable."""
    if host.is_floating_point() or host.is_complex():
        host.fill_(float("nan"))
    elif host.dtype is torch.bool:
        host.fill_(True)  # a bool has no third value
    elif host.numel():
        memory = torch.empty(0, dtype=torch.uint8, device=host.device).set_(host.untyped_storage())
        memory.fill_(POISON_BYTE)


def _fixed(arg: object) -> object:
    """A kernel argument as it is now: the same address, whatever becomes of the tensor."""
    if isinstance(arg, torch.Tensor):
        return host_view(arg, alias_of(arg.untyped_storage())) if on_device(arg) else arg.clone()
    return arg
