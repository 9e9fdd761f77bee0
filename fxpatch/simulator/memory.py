"""What is allocated, what is reserved, and where the device is full. The problem: programs depend on what a caching
allocator counts and where it stops, and here the memory itself is the host's. The rule: everything is counted as
torch's CUDA allocator counts it (blocks in multiples of 512 bytes; freed memory stays reserved until `empty_cache()` or
until something else needs it). `reserved` is what an allocator without fragmentation would hold.

Memory of graph pools is not counted only: `pools` hands it out and takes it back as the CUDA allocator does.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import torch

from fxpatch.privateuse1 import private_type

GRANULE = 512  # bytes


def rounded(nbytes: int, step: int = GRANULE) -> int:
    """The next multiple of `step`."""
    return -(-nbytes // step) * step


@dataclass
class Gauge:
    """One quantity over time: the four numbers that `torch.cuda.memory_stats()` has of it."""

    current: int = 0
    peak: int = 0
    allocated: int = 0
    freed: int = 0

    def add(self, amount: int) -> None:
        self.current += amount
        self.allocated += amount
        if self.current > self.peak:
            self.peak = self.current

    def remove(self, amount: int) -> None:
        self.current -= amount
        self.freed += amount

    def reset_peak(self) -> None:
        self.peak = self.current

    def reset_accumulated(self) -> None:
        self.allocated = self.freed = 0


class Ledger:
    """The device's counts, and its limit in bytes (None: what the host has)."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.blocks, self.allocated, self.reserved = Gauge(), Gauge(), Gauge()
        self.refusals = 0
        self.used = False  # whether there has ever been a block
        # bytes outside pools: of live blocks, and reserved; bytes of pools
        self._live = self._kept = self._segments = 0
        # a block may die in any thread, and by the garbage collector within this very code: so a lock that its owner
        # can take again, and no change of a count is spread over more than one statement
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> int:
        """Counts a new block outside pools; returns as how many bytes.

        Raises:
            torch.OutOfMemoryError: it does not fit under the limit, even with nothing cached.
        """
        nbytes = -(-nbytes // GRANULE) * GRANULE
        with self._lock:
            if self.limit is not None:
                self._check_room(nbytes)
            self.used = True
            self._live += nbytes
            if self._live > self._kept:
                self._keep(self._live)
            self.blocks.add(1)
            self.allocated.add(nbytes)
        return nbytes

    def give_back(self, nbytes: int) -> None:
        """A block outside pools is free."""
        with self._lock:
            self._live -= nbytes
            self.blocks.remove(1)
            self.allocated.remove(nbytes)

    def count(self, nbytes: int) -> None:
        """One more live block, in a pool."""
        with self._lock:
            self.used = True
            self.blocks.add(1)
            self.allocated.add(nbytes)

    def discount(self, nbytes: int) -> None:
        """One live block of a pool less."""
        with self._lock:
            self.blocks.remove(1)
            self.allocated.remove(nbytes)

    def take_segment(self, nbytes: int) -> None:
        """Counts a new segment of a pool; raises as `take` does."""
        with self._lock:
            if self.limit is not None:
                self._check_room(nbytes)
                self._keep(min(self._kept, self.limit - self._segments - nbytes))  # what is cached makes room
            self._segments += nbytes
            self.reserved.add(nbytes)

    def give_back_segment(self, nbytes: int) -> None:
        """A pool has let go of a segment."""
        with self._lock:
            self._segments -= nbytes
            self.reserved.remove(nbytes)

    def empty_cache(self) -> None:
        """What no tensor uses outside pools goes back to the host."""
        with self._lock:
            self._keep(self._live)

    @property
    def total(self) -> int:
        """Bytes the device has."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if self.limit is None else self.limit

    @property
    def in_use(self) -> int:
        """Bytes that cannot be had back now: of live blocks, and of pools."""
        return self._live + self._segments

    @property
    def in_pools(self) -> int:
        """Bytes of all pools' segments."""
        return self._segments

    def _check_room(self, nbytes: int) -> None:
        if self.limit is not None and self._live + self._segments + nbytes > self.limit:
            self.refusals += 1
            raise torch.OutOfMemoryError(self._refusal(nbytes))

    def _keep(self, nbytes: int) -> None:
        """From here on, this is reserved outside pools."""
        change = nbytes - self._kept
        self._kept = nbytes
        if change > 0:
            self.reserved.add(change)
        else:
            self.reserved.remove(-change)

    def _refusal(self, nbytes: int) -> str:
        free = max(0, self.total - self._live - self._segments)
        return (
            f"{private_type().upper()} out of memory. Tried to allocate {_readable(nbytes)}. "
            f"Device 0 has a total capacity of {_readable(self.total)} of which {_readable(free)} is free. "
            f"{_readable(self.allocated.current)} is allocated by PyTorch, and {_readable(self._segments)} is held by "
            f"graph pools. The capacity is that of simulate(memory=...)."
        )


ledger = Ledger()


def _readable(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"
