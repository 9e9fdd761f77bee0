"""Graph pools. The problem: a graph's addresses are fixed, and what a program sees of that (outputs that stay put,
graphs that share memory and overwrite each other's) depends on which address is handed out when. The rule: a pool hands
out memory as torch's CUDA allocator does: segments of 2 MiB for small blocks, 20 MiB for medium ones, their own for
large ones; best fit; a block is cut to size, and a freed one is joined with its free neighbours and handed out again.

So a tensor that nobody holds any more is overwritten by the next graph of its pool, as it would be on a device. A
pointer into a pool stays readable as long as a graph or a tensor of the pool lives.

Source: c10/cuda/CUDACachingAllocator.cpp (get_allocation_size, should_split, try_merge_blocks), torch 2.11 to 2.13.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fxpatch.simulator.memory import GRANULE, ledger, rounded

_SMALL, _MEDIUM = 1 << 20, 10 << 20  # the largest blocks that share a segment
_SMALL_SEGMENT, _MEDIUM_SEGMENT, _STEP = 2 << 20, 20 << 20, 2 << 20

PoolId = tuple[int, int]


class Segment:
    """One piece of host memory, and which ranges of it are free."""

    def __init__(self, nbytes: int) -> None:
        ledger.take_segment(nbytes)
        self.nbytes = nbytes  # from here on `__del__` gives it back, also where the host has no memory
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self.address = self.memory.data_ptr()
        self.free: list[tuple[int, int]] = [(0, nbytes)]  # start and stop, in order, never adjacent
        self.claims = array("q", bytes(8 * (nbytes // GRANULE)))  # which graph allocated each granule last: `liveness`
        _segments[self.address] = self

    def __del__(self, _give_back: Callable[[int], None] = ledger.give_back_segment) -> None:
        if hasattr(self, "nbytes"):  # at the end of the process, the module's own names are gone before this
            _give_back(self.nbytes)

    def cut(self, position: int, nbytes: int) -> tuple[int, int]:
        """Takes `nbytes` from the front of a free range; all of it where the rest would be too little to be useful."""
        start, stop = self.free[position]
        rest = stop - start - nbytes
        if rest <= (0 if self.nbytes == _SMALL_SEGMENT else _SMALL):
            del self.free[position]
            return start, stop
        self.free[position] = (start + nbytes, stop)
        return start, start + nbytes

    def join(self, start: int, stop: int) -> None:
        """Puts a range back, as one with its free neighbours."""
        position = bisect.bisect(self.free, (start, stop))
        if position < len(self.free) and self.free[position][0] == stop:
            stop = self.free.pop(position)[1]
        if position and self.free[position - 1][1] == start:
            start = self.free.pop(position - 1)[0]
            position -= 1
        self.free.insert(position, (start, stop))


@dataclass(frozen=True)
class Range:
    """A block of a segment, in bytes from its start."""

    pool: weakref.ref[Pool]
    segment: Segment
    start: int
    stop: int

    def bytes(self, count: int) -> torch.Tensor:
        """The first `count` bytes: a CPU tensor of uint8."""
        return self.segment.memory[self.start : self.start + count]

    def give_back(self) -> None:
        """The block is free. Called when a tensor dies, which may be at any moment: so the pool only notes it."""
        ledger.discount(self.stop - self.start)
        pool = self.pool()
        if pool is not None:
            pool.returned.append((self.segment, self.start, self.stop))


class Pool:
    """The memory that graphs share."""

    def __init__(self, pool_id: PoolId) -> None:
        self.id = pool_id
        self._segments: list[Segment] = []
        self.returned: deque[tuple[Segment, int, int]] = deque()  # blocks given back and not yet joined
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Range:
        """A block of at least `nbytes`; raises torch.OutOfMemoryError where the device is full."""
        size = max(rounded(nbytes), GRANULE)
        with self._lock:
            self._join_returned()
            _, segment, position = min(self._fitting(size), default=(0, None, 0), key=lambda fit: fit[0])
            if segment is None:
                segment = Segment(_segment_size(size))
                self._segments.append(segment)
            start, stop = segment.cut(position, size)
        ledger.count(stop - start)
        return Range(weakref.ref(self), segment, start, stop)

    def segments(self) -> list[Segment]:
        """All its segments, with what has been given back joined."""
        with self._lock:
            self._join_returned()
            return list(self._segments)

    def _join_returned(self) -> None:
        while self.returned:
            segment, start, stop = self.returned.popleft()
            segment.join(start, stop)

    def _fitting(self, size: int) -> Iterator[tuple[int, Segment, int]]:
        """Free ranges that hold `size` bytes, in the segments for blocks of that size."""
        shared = _segment_size(size)
        for segment in self._segments:
            if (segment.nbytes == _SMALL_SEGMENT) == (shared == _SMALL_SEGMENT):
                for position, (start, stop) in enumerate(segment.free):
                    if stop - start >= size:
                        yield stop - start, segment, position


def pool(pool_id: PoolId) -> Pool:
    """The pool of this name; it lives as long as a graph holds it."""
    found = _pools.get(pool_id)
    if found is None:
        found = _pools[pool_id] = Pool(pool_id)
    return found


def new_id(by_user: bool) -> PoolId:
    """A name no pool has had: torch's form, with the counter first for a graph's own pool, last for a user's."""
    number = next(_numbers)
    return (0, number) if by_user else (number, 0)


def all_pools() -> list[Pool]:
    """Every pool that a graph holds."""
    return list(_pools.values())


def segment_at(address: int) -> Segment | None:
    """The live segment that contains an address."""
    for segment in list(_segments.values()):
        if segment.address <= address < segment.address + segment.nbytes:
            return segment
    return None


_numbers = itertools.count(1)
_pools: weakref.WeakValueDictionary[PoolId, Pool] = weakref.WeakValueDictionary()
_segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()


def _segment_size(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _MEDIUM_SEGMENT if size < _MEDIUM else rounded(size, _STEP)
