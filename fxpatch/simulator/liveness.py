"""What a graph depends on. The problem: a graph goes to addresses, and on a device nothing says whether what lies there
is still what it was captured with. The rule: of all that a graph reads and has not computed itself, memory outside its
pool must be owned by a tensor still, and memory in a pool must hold what was allocated there when it was captured.

For the second, every granule of a pool remembers which graph allocated it last: each replay of that graph claims it
anew, since it computes into all that it has allocated. Updating in place what another graph has made claims nothing.
That is how a graph replayed out of order is found: its temporaries lie where a later graph keeps its results.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass

import torch

from fxpatch.simulator.memory import GRANULE
from fxpatch.simulator.pools import Pool, Segment, segment_at
from fxpatch.simulator.storage import Watch, block_of

_serials = itertools.count(1)
_Place = tuple[Segment, int, int]  # from one granule to another


@dataclass(frozen=True)
class _Read:
    """Something read that the graph has not computed itself.

    Args:
        watch: knows whether a tensor still owns it; None in the graph's own pool.
        place, claims: where in a pool it lies, and which graphs had claimed it.
    """

    name: str
    shape: tuple[int, ...]
    watch: Watch | None
    place: _Place | None = None
    claims: array[int] | None = None


class Dependencies:
    """What one captured graph reads, and which memory it claims."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._serial = next(_serials)
        self._reads: list[_Read] = []
        self._allocated: list[_Place] = []
        self._updated: list[_Place] = []  # of what other graphs have allocated

    def allocated(self, tensor: torch.Tensor) -> None:
        """The capture has taken memory from the pool for this tensor."""
        place = _granules(tensor)
        if place is not None:
            self._claim(place)
            self._allocated.append(place)

    def read(self, tensor: torch.Tensor, name: str) -> None:
        """A launch reads this tensor of the device."""
        watch, place = self._watch(tensor), _granules(tensor)
        claims = None
        if place is not None and not any(_within(place, updated) for updated in self._updated):
            segment, start, stop = place
            now = segment.claims[start:stop]
            claims = None if now.count(self._serial) == len(now) else now
        if watch is not None or claims is not None:
            self._reads.append(_Read(name, tuple(tensor.shape), watch, place, claims))

    def written(self, tensor: torch.Tensor, name: str) -> None:
        """A launch writes this tensor of the device, all of it."""
        watch, place = self._watch(tensor), _granules(tensor)
        if watch is not None:
            self._reads.append(_Read(name, tuple(tensor.shape), watch))
        if place is not None and self._serial not in place[0].claims[place[1] : place[2]]:
            self._updated.append(place)

    def seal(self) -> None:
        """The capture is over. Its temporaries overlap, so it claims far fewer ranges than it has allocated."""
        merged: list[_Place] = []
        for segment, start, stop in sorted(self._allocated, key=lambda place: (place[0].address, place[1])):
            if merged and merged[-1][0] is segment and start <= merged[-1][2]:
                merged[-1] = (segment, merged[-1][1], max(stop, merged[-1][2]))
            else:
                merged.append((segment, start, stop))
        self._allocated, self._updated = merged, []

    def replayed(self) -> None:
        """The graph has computed into all that it has allocated."""
        for place in self._allocated:
            self._claim(place)

    def check(self) -> None:
        """Raises where a replay would read what is not what the graph was captured with."""
        for read in self._reads:
            if read.watch is not None and not read.watch.owned:
                raise RuntimeError(
                    f"a graph would read or write memory that is no longer owned: {read.name} was captured with a "
                    f"tensor of shape {read.shape} that has been freed since. Keep the tensor as long as the graph, "
                    "or capture again"
                )
            if read.place is not None and read.claims is not None:
                segment, start, stop = read.place
                if segment.claims[start:stop] != read.claims:
                    raise RuntimeError(
                        f"a graph would read memory that another graph has overwritten: {read.name} was captured with "
                        f"a tensor of shape {read.shape} in the pool, where other graphs have their memory too. Replay "
                        "graphs of one pool in the order in which they were captured, and keep the tensors that they "
                        "hand on; or use two pools"
                    )

    def _claim(self, place: _Place) -> None:
        segment, start, stop = place
        segment.claims[start:stop] = array("q", [self._serial]) * (stop - start)

    def _watch(self, tensor: torch.Tensor) -> Watch | None:
        """For memory that is not the pool's: keeps it from the host, as a launch will go to its address."""
        block = block_of(tensor.untyped_storage())
        if block is None or not tensor.numel():
            return None
        return None if block.place is not None and block.place.pool() is self._pool else block.watched()


def _granules(tensor: torch.Tensor) -> _Place | None:
    """Where in which pool segment a tensor lies, in granules."""
    if not tensor.numel():
        return None
    segment = segment_at(tensor.data_ptr())
    if segment is None:
        return None
    start = tensor.data_ptr() - segment.address
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return segment, start // GRANULE, -(-(start + extent * tensor.itemsize) // GRANULE)


def _within(inner: _Place, outer: _Place) -> bool:
    return inner[0] is outer[0] and outer[1] <= inner[1] and inner[2] <= outer[2]
