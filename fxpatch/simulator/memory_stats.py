"""What `torch.<name>` answers about memory, in the names and units of torch.cuda: bytes, blocks in multiples of 512.

`memory_allocated` counts what live tensors hold, graph pools included; `memory_reserved` adds what is free and kept.
"""

from __future__ import annotations

from typing import Any

from fxpatch.simulator import pools
from fxpatch.simulator.memory import ledger
from fxpatch.simulator.streams import check_device as _check


def empty_cache() -> None:
    """Gives back what is reserved and no tensor uses; a graph pool keeps its memory as long as its graphs."""
    ledger.empty_cache()


def memory_allocated(device: Any = None) -> int:
    """Bytes that live tensors hold."""
    _check(device)
    return ledger.allocated.current


def max_memory_allocated(device: Any = None) -> int:
    """The most they held since the start, or since `reset_peak_memory_stats()`."""
    _check(device)
    return ledger.allocated.peak


def memory_reserved(device: Any = None) -> int:
    """Bytes taken from the device: live tensors, freed memory that is kept, and graph pools."""
    _check(device)
    return ledger.reserved.current


def max_memory_reserved(device: Any = None) -> int:
    """The most that was taken since the start, or since `reset_peak_memory_stats()`."""
    _check(device)
    return ledger.reserved.peak


def reset_peak_memory_stats(device: Any = None) -> None:
    """Peaks are those from now on."""
    _check(device)
    for gauge in (ledger.blocks, ledger.allocated, ledger.reserved):
        gauge.reset_peak()


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """Totals are those from now on."""
    _check(device)
    for gauge in (ledger.blocks, ledger.allocated, ledger.reserved):
        gauge.reset_accumulated()


def memory_stats(device: Any = None) -> dict[str, int]:
    """Blocks, allocated bytes and reserved bytes: each current, peak, allocated and freed in total."""
    _check(device)
    gauges = {"allocation": ledger.blocks, "allocated_bytes": ledger.allocated, "reserved_bytes": ledger.reserved}
    stats = {f"{name}.all.{number}": value for name, gauge in gauges.items() for number, value in vars(gauge).items()}
    return {**stats, "num_ooms": ledger.refusals}


def memory_snapshot(mempool_id: pools.PoolId | None = None) -> list[dict[str, Any]]:
    """The segments of graph pools, of all or of one: where they lie and which blocks of them are in use."""
    found = [pool for pool in pools.all_pools() if mempool_id in (None, pool.id)]
    return [_described(segment, pool.id) for pool in found for segment in pool.segments()]


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes."""
    _check(device)
    return ledger.total - ledger.reserved.current, ledger.total


def _described(segment: pools.Segment, pool_id: pools.PoolId) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    position = 0
    for start, stop in [*segment.free, (segment.nbytes, segment.nbytes)]:
        if start > position:
            blocks.append(
                {"address": segment.address + position, "size": start - position, "state": "active_allocated"}
            )
        if stop > start:
            blocks.append({"address": segment.address + start, "size": stop - start, "state": "inactive"})
        position = stop
    in_use = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.nbytes,
        "allocated_size": in_use,
        "active_size": in_use,
        "segment_pool_id": pool_id,
        "blocks": blocks,
    }


PUBLIC = (
    empty_cache,
    memory_allocated,
    max_memory_allocated,
    memory_reserved,
    max_memory_reserved,
    reset_peak_memory_stats,
    reset_accumulated_memory_stats,
    memory_stats,
    memory_snapshot,
    mem_get_info,
)
