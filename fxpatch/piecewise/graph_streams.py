"""Devices that capture what is launched on a stream: CUDA, XPU, NPU, MUSA, and whoever follows torch.cuda's names.

A capture here is begun and ended by its own calls. The context managers that torch and vendors have for it do more and
less than they should: they give back all cached memory each time, they end a capture that has failed as if it had not,
and the error that this raises takes the place of the one that says why (`torch.cuda.graph`, `torch.npu.graph`,
`torch.accelerator.Graph`; the last calls `torch.accelerator.empty_cache`, which torch_npu refuses: vllm-ascend#14188).

After a failed capture its pool and its stream are not used again. A graph whose capture could not be ended is kept: the
allocator may still ask it which streams it records (the filter in CUDAGraph::capture_begin holds a pointer to it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fxpatch.piecewise.capture_failure import failure, under_way
from fxpatch.piecewise.graph_device import Captured, GraphDevice, Opened, Pool, T, device_memory, no_gc
from fxpatch.piecewise.weak import can_be_weak, weakener

# Only this thread is kept from what a capture forbids: another may load data. cudagraph trees choose the same.
_ERROR_MODE = "thread_local"


class StreamGraphs(GraphDevice):
    """Captures with a class in the manner of `torch.cuda.CUDAGraph`.

    Args:
        device: as of `GraphDevice`.
        graph_class: the device's graph class.
        reason: as of `GraphDevice`.
        budget: how many graphs the device's profile plans with; for messages.
    """

    captures = True

    def __init__(self, device: torch.device, graph_class: Any, reason: str, budget: int | None = None) -> None:
        super().__init__(device, reason)
        self._class, self._budget = graph_class, budget
        self._module: Any = torch.get_device_module(device.type)
        self._side: Any = None
        self._kept: list[Any] = []  # graphs whose capture could not be ended; see above
        self._lost: list[Any] = []  # streams that are being captured for good
        self._weaken, self.weak_reason = weakener(device)
        self.registers_generator = _registers_default_generator(device.type, self._module, graph_class)

    def pool(self) -> Pool:
        handle = getattr(self._module, "graph_pool_handle", None)
        return Pool(None if handle is None else handle())

    def capture(self, call: Callable[[], T], pool: Pool | None = None) -> Captured[T]:
        if self.is_capturing():
            raise under_way(self.type)
        pool = Pool() if pool is None else pool
        with self.side_stream(), no_gc():
            self.synchronize()  # an error of what was launched before is not this capture's
            graph = self._new(pool)
            step = "capture_begin"
            try:
                self._begin(graph, pool)
                step = "the call"
                result = call()
                step = "capture_end"
                with self._on_side():  # wherever the call has left us
                    self._end(graph)
            except BaseException as error:
                self._abandon(graph, step, error, pool)
                if isinstance(error, Exception):
                    raise failure(self.type, error, step, self._budget) from error
                raise
        if pool.handle is None:
            pool.handle = graph.pool()
        return Captured(result, graph.replay, graph.reset)

    def open(self, pool: Pool) -> Opened:
        if self.is_capturing():
            raise under_way(self.type)
        self.synchronize()
        graph = self._new(pool)
        try:
            self._begin(graph, pool)
        except BaseException as error:
            self._abandon(graph, "capture_begin", error, pool)
            if isinstance(error, Exception):
                raise failure(self.type, error, "capture_begin", self._budget) from error
            raise
        return _Opened(self, graph, pool)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        with self._device_guard():
            if self._side is None:
                self._side = self._module.Stream()
            side, outside = self._side, self._module.current_stream()
            if outside == side:
                yield
                return
            side.wait_stream(outside)
            try:
                with self._module.stream(side):
                    yield
            finally:
                if side not in self._lost:
                    outside.wait_stream(side)

    def weak(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._weaken is None or not can_be_weak(tensor) else self._weaken(tensor)

    def synchronize(self) -> None:
        with self._device_guard():
            self._module.synchronize()

    def memory(self) -> dict[str, int] | None:
        with self._device_guard():
            return device_memory(self.device)

    def is_capturing(self) -> bool:
        with self._device_guard():
            return bool(self._module.is_current_stream_capturing())

    # -- what differs between classes ---------------------------------------------------------------

    def _new(self, pool: Pool) -> Any:
        """A new graph."""
        return self._class()

    def _begin(self, graph: Any, pool: Pool) -> None:
        """What is launched on the current stream goes into the graph from here on."""
        graph.capture_begin(**_accepted(self._class.capture_begin, pool=pool.handle, capture_error_mode=_ERROR_MODE))

    def _end(self, graph: Any) -> None:
        graph.capture_end()

    # -- what is the same ---------------------------------------------------------------------------

    def _abandon(self, graph: Any, step: str, error: BaseException, pool: Pool) -> None:
        """Ends a capture that has failed; what goes wrong in doing so is noted on the error."""
        failed = {step}

        def end() -> None:
            if step == "the call" or self.is_capturing():  # after the call it has to end, whatever the device says
                self._end(graph)

        with self._on_side():
            for name, ending in (("capture_end", end), ("reset", graph.reset), ("synchronize", self.synchronize)):
                if name == step:
                    continue
                try:
                    ending()
                except Exception as second:
                    failed.add(name)
                    error.add_note(f"and {name} after that: {type(second).__name__}: {str(second).strip()}")
            if failed & {"capture_begin", "capture_end"}:
                self._kept.append(graph)
                if self.is_capturing():
                    self._lost.append(self._side)
        self._side = None
        pool.handle = self.pool().handle

    def _on_side(self) -> Any:
        return self._module.stream(self._side)

    def _device_guard(self) -> Any:
        return nullcontext() if self.device.index is None else self._module.device(self.device.index)


class _Opened(Opened):
    def __init__(self, device: StreamGraphs, graph: Any, pool: Pool) -> None:
        self._device, self._graph, self._pool = device, graph, pool

    def close(self) -> Captured[None]:
        device = self._device
        try:
            with device._on_side():
                device._end(self._graph)
        except Exception as error:
            device._abandon(self._graph, "capture_end", error, self._pool)
            raise failure(device.type, error, "capture_end", device._budget) from error
        if self._pool.handle is None:
            self._pool.handle = self._graph.pool()
        return Captured(None, self._graph.replay, self._graph.reset)

    def abandon(self, error: BaseException) -> None:
        self._device._abandon(self._graph, "the call", error, self._pool)


class AcceleratorGraphs(StreamGraphs):
    """Captures with `torch.accelerator.Graph` (torch 2.12 and later, where the backend has registered its own)."""

    def _new(self, pool: Pool) -> Any:
        # "default" is the one mode that every backend takes
        return self._class(pool=pool.handle, capture_error_mode="default")

    def _begin(self, graph: Any, pool: Pool) -> None:
        graph.capture_begin()


class ContextGraphs(StreamGraphs):
    """Captures with `torch.<device>.graph(...)`, on a device whose graph class cannot be begun by itself."""

    def _begin(self, graph: Any, pool: Pool) -> None:
        self._context = self._module.graph(graph, pool=pool.handle, stream=self._side)
        self._context.__enter__()

    def _end(self, graph: Any) -> None:
        self._context.__exit__(None, None, None)


def _accepted(function: Any, **wanted: Any) -> dict[str, Any]:
    """Those of the keywords that a function takes: XPU has no error mode. One that does not say what it takes is bound
    from C++, and torch_musa's wants both."""
    try:
        taken = inspect.signature(function).parameters
    except ValueError:
        return wanted
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return wanted
    return {name: value for name, value in wanted.items() if name in taken}


def _registers_default_generator(device: str, module: Any, graph_class: Any) -> bool:
    """Whether `capture_begin` registers the default generator.

    It does in every backend that can register one: CUDAGraph.cpp, XPUGraph.cpp, NPUGraph.cpp and MUSAGraph.cpp have the
    same lines. torch_musa does not bind `register_generator_state` in Python.
    """
    if device == "musa" or hasattr(graph_class, "register_generator_state"):
        return True
    # torch.accelerator.Graph has no such method; what it runs is the vendor's class
    own = getattr(module, f"{device.upper()}Graph", None)
    return hasattr(own, "register_generator_state")
