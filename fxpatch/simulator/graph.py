"""Device graphs. The problem: code over graphs can only be trusted if a graph behaves as a device's does. The rule: a
capture records and computes nothing; replay computes, into the same memory; what a device cannot capture raises.

What a capture allocates comes from the graph's pool and holds a pattern that no result has (NaN, or the byte 0x5A), so
that reading an output before the first replay shows. The graph owns its pool and nothing else: of a tensor from outside
that has died it reads NaN. `strict` mode looks before each replay whether all that it is going to read is still what it
was captured with.

Read `capture` for streams and what is refused, `pools` for addresses, `liveness` for what strict mode checks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator import capture, fork, pools
from fxpatch.simulator.liveness import Dependencies
from fxpatch.simulator.memory import ledger
from fxpatch.simulator.storage import alias_of, from_pool, host_view, on_device
from fxpatch.simulator.streams import Stream, stream
from fxpatch.simulator.untraced import unseen, untraced

POISON_BYTE = 0x5A
ERROR_MODES = ("global", "thread_local", "relaxed")
_WITHOUT_NAN = {torch.float4_e2m1fn_x2}


@dataclass
class Limits:
    """What `simulate()` was told: how many captured graphs there may be at a time, and whether replays are checked."""

    max_live_graphs: int | None = None
    strict: bool = False


limits = Limits()
_live: weakref.WeakSet[Graph] = weakref.WeakSet()


@dataclass(frozen=True)
class _Launch:
    """One kernel of a graph."""

    run: Callable[[], object]
    name: str


class Graph:
    """A recorded sequence of kernel launches: `capture_begin()`, launches, `capture_end()`, `replay()` at will.

    Args:
        keep_graph: leave `instantiate()` to the caller, or to the first replay.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self._keep_graph = keep_graph
        self._clear()

    def _clear(self) -> None:
        self._program: list[_Launch] | None = None
        self._strict = False
        self._capture: capture.Capture | None = None
        self._pool: pools.Pool | None = None
        self._dependencies: Dependencies | None = None

    @untraced
    def capture_begin(
        self,
        pool: pools.PoolId | None = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
    ) -> None:
        """From here on, launches on the current stream go into this graph instead.

        Args:
            pool: what `graph_pool_handle()`, or another graph's `pool()`, returned; None: a pool of its own.
            capture_error_mode: one of `ERROR_MODES`. Other threads may use the device in all of them; "relaxed" lets
                another thread end the capture.
            check_input_liveness: check every replay of this graph, as `simulate(strict=True)` does for all.
        """
        fork.check()
        if capture_error_mode not in (*ERROR_MODES, "default"):
            raise ValueError(f"capture_error_mode is one of {', '.join(ERROR_MODES)}, not {capture_error_mode!r}")
        if not (pool is None or (isinstance(pool, tuple) and len(pool) == 2 and all(type(n) is int for n in pool))):
            raise TypeError(f"pool is what graph_pool_handle() or a graph's pool() returned, not {pool!r}")
        if self._program is not None:
            raise RuntimeError("this graph has been captured already: call reset() first, or make another graph")
        self._capture = capture.begin(self, any_thread=capture_error_mode == "relaxed")
        self._program, self._pool = [], pools.pool(pool or pools.new_id(by_user=False))
        self._dependencies = Dependencies(self._pool)
        self._strict = check_input_liveness

    @untraced
    def capture_end(self) -> None:
        """Launches run again, and the graph can be replayed; it is left empty if the capture failed."""
        ending = self._capture
        if ending is None or capture.active() is not ending:
            raise RuntimeError("this graph is not being captured")
        self._capture = None
        try:
            ending.check_end()
            assert self._dependencies is not None
            self._dependencies.seal()
            if not self._keep_graph:
                self.instantiate()
        except RuntimeError:
            self._clear()
            raise

    @untraced
    def instantiate(self) -> None:
        """Makes it executable: it counts among the live graphs from here on."""
        self._check_captured("instantiate")
        if self in _live:
            return
        if limits.max_live_graphs is not None and len(_live) >= limits.max_live_graphs:
            raise torch.AcceleratorError(
                f"{private_type().upper()} error: out of resources: {len(_live)} graphs are live, and the device has "
                "room for no more (simulate(max_live_graphs=...)): reset() one, or capture fewer sizes"
            )
        _live.add(self)

    @untraced
    def replay(self) -> None:
        """Runs the program once, on whatever its input memory holds now."""
        fork.check()
        capture.refuse("replaying a graph")
        program = self._check_captured("replay")
        assert self._dependencies is not None
        self.instantiate()
        if limits.strict or self._strict:
            self._dependencies.check()
        with unseen():  # a replay is no operator, and nothing that it makes gets out
            for launch in program:
                launch.run()
        self._dependencies.replayed()

    @untraced
    def reset(self) -> None:
        """Forgets the program and lets go of its memory; the graph can be captured anew."""
        if self._capture is not None:
            self._capture = None
            capture.end()
        _live.discard(self)
        self._clear()

    def pool(self) -> pools.PoolId:
        """Which pool its memory is in, for `capture_begin(pool=...)` of other graphs."""
        self._check_captured("pool")
        assert self._pool is not None
        return self._pool.id

    def enable_debug_mode(self) -> None:
        """Nothing to enable: the program can be dumped at any time."""

    def debug_dump(self, debug_path: str) -> None:
        """Writes the launches to a file, one line each: number and operator."""
        program = self._check_captured("debug_dump")
        with open(debug_path, "w") as file:
            file.writelines(f"{number}\t{launch.name}\n" for number, launch in enumerate(program))

    @property
    def launches(self) -> int:
        """How many launches one replay makes."""
        return len(self._program or ())

    def record(
        self, run: Callable[[], object], name: str, reads: Iterable[object] = (), writes: Iterable[object] = ()
    ) -> None:
        """Appends a launch; of `reads` and `writes` the device tensors count, the rest is passed over."""
        assert self._program is not None
        assert self._capture is not None
        assert self._dependencies is not None
        self._capture.check_sound()
        self._capture.advance(capture.current_stream())
        self._program.append(_Launch(run, name))
        for tensor in reads:
            if isinstance(tensor, torch.Tensor) and on_device(tensor):
                self._dependencies.read(tensor, name)
        for tensor in writes:
            if isinstance(tensor, torch.Tensor) and on_device(tensor):
                self._dependencies.written(tensor, name)

    def new_tensor(self, like: torch.Tensor) -> torch.Tensor:
        """A device tensor with the geometry of `like`, in the pool, with poison in it."""
        assert self._pool is not None
        assert self._dependencies is not None
        tensor = from_pool(like, self._pool)
        poison(host_view(tensor, alias_of(tensor.untyped_storage())))
        self._dependencies.allocated(tensor)
        return tensor

    def _check_captured(self, asked: str) -> list[_Launch]:
        if self._program is None or self._capture is not None:
            raise RuntimeError(f"{type(self).__name__}.{asked}() wants a captured graph, and nothing has been captured")
        return self._program


class graph:
    """`with torch.musa.graph(g): ...` captures the body into `g` on a side stream; if it raises, `g` is left empty.

    Args:
        graph: the graph; by position, or named after the device (`musa_graph=`), as vendors have it.
        pool: as of `Graph.capture_begin`.
        stream: the stream to capture on; None: a side stream of its own.
        capture_error_mode, check_input_liveness: as of `Graph.capture_begin`.
    """

    _side_stream: Stream | None = None

    def __init__(
        self,
        graph: Graph | None = None,
        pool: pools.PoolId | None = None,
        stream: torch.Stream | None = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
        **named: Graph,
    ) -> None:
        if graph is None:
            keyword = f"{private_type()}_graph"
            if list(named) != [keyword]:
                raise TypeError(f"graph() takes a graph, first or as {keyword}=; got {', '.join(named) or 'none'}")
            graph = named[keyword]
        if not isinstance(graph, Graph):
            raise TypeError(f"graph() captures into a {private_type().upper()}Graph, not {graph!r}")
        self._graph, self._stream = graph, stream
        self._begin = functools.partial(graph.capture_begin, pool, capture_error_mode, check_input_liveness)

    def __enter__(self) -> None:
        capture.refuse("synchronizing the device, with which a capture begins")
        ledger.empty_cache()
        if self._stream is None:
            if type(self)._side_stream is None:
                type(self)._side_stream = Stream()
            self._stream = type(self)._side_stream
        self._on_stream = stream(self._stream)
        self._on_stream.__enter__()
        try:
            self._begin()
        except BaseException:
            self._on_stream.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._graph.capture_end()
            else:
                self._graph.reset()  # the error that is on its way says more than the one of ending a spoiled capture
        finally:
            self._on_stream.__exit__(kind, error, traceback)


def graph_pool_handle() -> pools.PoolId:
    """A name for a pool that graphs are to share."""
    return pools.new_id(by_user=True)


def capturing() -> Graph | None:
    """The graph that launches of this thread go into now."""
    current = capture.here()
    return None if current is None else current.owner


def is_current_stream_capturing() -> bool:
    """Whether launches on the current stream go into a graph."""
    return capture.here() is not None


def launch(kernel: Callable[..., object], *args: Any) -> None:
    """The door through which Inductor's generated code calls its C++ kernels."""
    current = capturing()
    if current is None:
        kernel(*args)
    else:
        pinned = [_fixed(arg) for arg in args]
        # which of its arguments a kernel writes, only its source says
        current.record(lambda: kernel(*pinned), getattr(kernel, "__name__", "inductor kernel"), args, args)


def poison(host: torch.Tensor) -> None:
    """Makes fresh memory, into which nothing has been computed, recognisable."""
    if (host.is_floating_point() or host.is_complex()) and host.dtype not in _WITHOUT_NAN:
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
