"""Device graphs. The problem: code over graphs can only be trusted if a graph behaves as a device's does. The rule: a
capture records and computes nothing; replay computes, into the same memory; what a device cannot capture raises.

What a capture allocates comes from the graph's pool and holds a pattern that no result has (NaN, or the byte 0x5A), so
that reading an output before the first replay shows. The graph owns its pool and nothing else: of a tensor from outside
that has died it reads NaN. `strict` mode looks before each replay whether all that it is going to read is still what it
was captured with.

Read `capture` for streams and what is refused, `pools` for addresses.
"""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fxpatch.simulator import capture, pools
from fxpatch.simulator.memory import GRANULE, ledger
from fxpatch.simulator.storage import Watch, alias_of, block_of, device_type, from_pool, host_view, on_device
from fxpatch.simulator.streams import Stream, stream
from fxpatch.simulator.untraced import untraced

POISON_BYTE = 0x5A
ERROR_MODES = ("global", "thread_local", "relaxed")


@dataclass
class Limits:
    """What `simulate()` was told: how many captured graphs there may be at a time, and whether replays are checked."""

    max_live_graphs: int | None = None
    strict: bool = False


limits = Limits()
_live: weakref.WeakSet[Graph] = weakref.WeakSet()
_serials = itertools.count(1)


@dataclass(frozen=True)
class _Launch:
    """One kernel of a graph."""

    run: Callable[[], object]
    name: str


@dataclass(frozen=True)
class _Read:
    """Memory that a graph reads and has not written before: whose tensor must live, or who must have written it."""

    name: str
    shape: tuple[int, ...]
    watch: Watch | None
    place: tuple[pools.Segment, int, int] | None
    writers: array[int] | None


class Graph:
    """A recorded sequence of kernel launches: `capture_begin()`, launches, `capture_end()`, `replay()` at will.

    Args:
        keep_graph: leave `instantiate()` to the caller, or to the first replay.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self._keep_graph = keep_graph
        self._strict = False
        self._clear()

    def _clear(self) -> None:
        self._program: list[_Launch] | None = None
        self._serial = next(_serials)
        self._capture: capture.Capture | None = None
        self._pool: pools.Pool | None = None
        self._reads: list[_Read] = []
        self._writes: list[tuple[pools.Segment, int, int]] = []

    @untraced
    def capture_begin(self, pool: pools.PoolId | None = None, capture_error_mode: str = "global") -> None:
        """From here on, launches on the current stream go into this graph instead.

        Args:
            pool: what `graph_pool_handle()`, or another graph's `pool()`, returned; None: a pool of its own.
            capture_error_mode: one of `ERROR_MODES`; here all are as "global" is.
        """
        if capture_error_mode not in (*ERROR_MODES, "default"):
            raise ValueError(f"capture_error_mode is one of {', '.join(ERROR_MODES)}, not {capture_error_mode!r}")
        if self._program is not None:
            raise RuntimeError("this graph has been captured already: call reset() first, or make another graph")
        self._capture = capture.begin(self)
        self._program, self._pool = [], pools.pool(pool or pools.new_id(by_user=False))

    @untraced
    def capture_end(self) -> None:
        """Launches run again, and the graph can be replayed; it is left empty if the capture failed."""
        ending = self._capture
        if ending is None or capture.active() is not ending:
            raise RuntimeError("this graph is not being captured")
        here, unjoined = capture.current_stream(), ending.unjoined()
        self._capture = None
        capture.end()
        try:
            if ending.spoiled_by is not None:
                raise capture.CaptureError(capture.INVALIDATED, ending.spoiled_by)
            if here != ending.origin:
                raise capture.CaptureError(capture.UNMATCHED, f"it began on stream {ending.origin}, this is {here}")
            if unjoined:
                raise capture.CaptureError(
                    capture.UNJOINED, f"wait on the capturing stream for stream {', '.join(map(str, unjoined))}"
                )
            self._writes = _merged(self._writes)
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
                f"{device_type().upper()} error: out of resources: {len(_live)} graphs are live, and the device has "
                "room for no more (simulate(max_live_graphs=...)): reset() one, or capture fewer sizes"
            )
        _live.add(self)

    @untraced
    def replay(self) -> None:
        """Runs the program once, on whatever its input memory holds now."""
        capture.refuse("replaying a graph")
        program = self._check_captured("replay")
        self.instantiate()
        if limits.strict or self._strict:
            self._check_reads()
        # nothing a replay makes gets out; and this is the mode in which tensors of every mode may be written.
        # A replay is no operator to anyone: no autocast, function mode, dispatch mode or transform sees into it
        with (
            torch.inference_mode(),
            torch._C._DisableAutocast(),
            torch._C._DisableFuncTorch(),
            torch._C._DisableTorchDispatch(),
            torch._C.DisableTorchFunction(),
        ):
            for launch in program:
                launch.run()
        for segment, start, stop in self._writes:
            segment.written_by(self._serial, start, stop)

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
        self._capture.advance(capture.current_stream())
        self._program.append(_Launch(run, name))
        for tensor in reads:
            if isinstance(tensor, torch.Tensor) and on_device(tensor):
                self._note_read(tensor, name)
        for tensor in writes:
            if isinstance(tensor, torch.Tensor) and on_device(tensor):
                self._note_write(tensor, name)

    def new_tensor(self, like: torch.Tensor) -> torch.Tensor:
        """A device tensor with the geometry of `like`, in the pool, with poison in it."""
        assert self._pool is not None
        tensor = from_pool(like, self._pool)
        poison(host_view(tensor, alias_of(tensor.untyped_storage())))
        self._note_write(tensor, "allocation")
        return tensor

    # -- what it depends on -----------------------------------------------------------------------

    def _note_read(self, tensor: torch.Tensor, name: str) -> None:
        watch, place = self._watch(tensor), _granules(tensor)
        writers = None
        if place is not None:
            segment, start, stop = place
            last = segment.writers[start:stop]
            writers = None if last.count(self._serial) == len(last) else last
        if watch is not None or writers is not None:
            self._reads.append(_Read(name, tuple(tensor.shape), watch, place, writers))

    def _note_write(self, tensor: torch.Tensor, name: str) -> None:
        watch, place = self._watch(tensor), _granules(tensor)
        if watch is not None:
            self._reads.append(_Read(name, tuple(tensor.shape), watch, None, None))
        if place is not None:
            segment, start, stop = place
            segment.written_by(self._serial, start, stop)
            self._writes.append(place)

    def _watch(self, tensor: torch.Tensor) -> Watch | None:
        """For memory that is not the pool's: keeps it from the host, as a launch will go to its address."""
        block = block_of(tensor.untyped_storage())
        if block is None or (block.place is not None and block.place.pool() is self._pool):
            return None
        return block.watched()

    def _check_reads(self) -> None:
        for read in self._reads:
            if read.watch is not None and not read.watch.owned:
                raise RuntimeError(
                    f"a graph would read or write memory that is no longer owned: {read.name} was captured with a "
                    f"tensor of shape {read.shape} that has been freed since. Keep the tensor as long as the graph, "
                    "or capture again"
                )
            if read.place is not None and read.writers is not None:
                segment, start, stop = read.place
                if segment.writers[start:stop] != read.writers:
                    raise RuntimeError(
                        f"a graph would read memory that another graph has overwritten: {read.name} was captured with "
                        f"a tensor of shape {read.shape} in the pool, which was freed and given to another graph. "
                        "Keep the tensor, or replay the graph that writes it first"
                    )

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
        check_input_liveness: check every replay of this graph, as `simulate(strict=True)` does for all.
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
            keyword = f"{device_type()}_graph"
            if list(named) != [keyword]:
                raise TypeError(f"graph() takes a graph, first or as {keyword}=; got {', '.join(named) or 'none'}")
            graph = named[keyword]
        self._graph, self._pool, self._mode = graph, pool, capture_error_mode
        self._graph._strict = check_input_liveness
        self._stream = stream

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
            self._graph.capture_begin(self._pool, capture_error_mode=self._mode)
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
    return None if current is None else current.owner  # type: ignore[return-value]


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


def _granules(tensor: torch.Tensor) -> tuple[pools.Segment, int, int] | None:
    """Where in which pool segment a tensor lies, in granules."""
    if not tensor.numel():
        return None
    segment = pools.segment_at(tensor.data_ptr())
    if segment is None:
        return None
    start = tensor.data_ptr() - segment.address
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return segment, start // GRANULE, -(-(start + extent * tensor.itemsize) // GRANULE)


def _merged(places: list[tuple[pools.Segment, int, int]]) -> list[tuple[pools.Segment, int, int]]:
    """The same granules in as few ranges as there can be."""
    merged: list[tuple[pools.Segment, int, int]] = []
    for segment, start, stop in sorted(places, key=lambda place: (place[0].address, place[1])):
        if merged and merged[-1][0] is segment and start <= merged[-1][2]:
            merged[-1] = (segment, merged[-1][1], max(stop, merged[-1][2]))
        else:
            merged.append((segment, start, stop))
    return merged
