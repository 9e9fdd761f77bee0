"""The allocator: is memory counted, does it come back, and is running out of it the error that programs catch?"""

from __future__ import annotations

import gc
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, run_all
from fxpatch.doctor.probes.presence import device_module, needs_accelerator

_MIB = 1 << 20
_ABSURD = 1 << 50
"""Bytes, a million GiB: no device has them, so asking for them fills none."""
_SIMULATED = 64 * _MIB
"""Bytes of a simulated device: behind it is the host's memory, which says no in words of its own."""


def _counts(subject: Subject) -> str:
    needs_accelerator(subject)
    module: Any = device_module(subject)
    gc.collect()

    def settled(function: Any) -> int:
        module.synchronize()
        return int(function())

    before = settled(module.memory_allocated)
    module.reset_peak_memory_stats()
    held = torch.ones(8 * _MIB // 4, device=subject.device)
    during, reserved = settled(module.memory_allocated), settled(module.memory_reserved)
    del held
    after = settled(module.memory_allocated)
    peak = settled(module.max_memory_allocated)

    def grows() -> None:
        if not before + 8 * _MIB <= during <= before + 16 * _MIB:
            raise Differs(f"memory_allocated() goes from {before} to {during} with 8 MiB more held")

    def comes_back() -> None:
        expect(after, before, "memory_allocated() after the tensor is gone")

    def peaks() -> None:
        if not during <= peak <= during + 8 * _MIB:
            raise Differs(f"max_memory_allocated() is {peak}, and {during} were held")
        module.reset_peak_memory_stats()
        if settled(module.max_memory_allocated) >= peak:
            raise Differs("max_memory_allocated() keeps its value after reset_peak_memory_stats()")

    def reserves() -> None:
        if reserved < during:
            raise Differs(f"memory_reserved() is {reserved}, less than the {during} allocated")
        module.empty_cache()
        if (left := settled(module.memory_reserved)) > reserved - 4 * _MIB:
            raise Differs(f"memory_reserved() is {left} after empty_cache(), and was {reserved} before")

    def free_and_total() -> None:
        free, total = module.mem_get_info()
        if not 0 < free <= total:
            raise Differs(f"mem_get_info() says {free} bytes of {total} are free")

    return run_all(
        {
            "allocated grows": grows,
            "and comes back": comes_back,
            "peak": peaks,
            "reserved, empty_cache": reserves,
            "free and total": free_and_total,
        }
    )


def _out_of_memory(subject: Subject) -> str:
    needs_accelerator(subject)
    asked = _ABSURD
    if subject.simulated:
        from fxpatch.simulator.registration import simulate

        simulate(subject.device, memory=_SIMULATED)
        asked = 2 * _SIMULATED
    try:
        torch.empty(asked, dtype=torch.uint8, device=subject.device)
    except torch.OutOfMemoryError:
        pass
    except Exception as error:
        raise Broken(
            f"asking for {asked} bytes raises {type(error).__name__}, and not torch.OutOfMemoryError"
        ) from error
    else:
        raise Broken(f"asking for {asked} bytes is granted: memory is promised that is not there")
    expect(torch.ones(4, device=subject.device).sum().item(), 4.0, "a sum after running out of memory")
    return "asking for too much raises torch.OutOfMemoryError, and the device goes on"


PROBES = (
    Probe(
        name="memory",
        stage="runtime",
        title="memory is counted",
        run=_counts,
        why="engines size their KV cache by memory_allocated, its peak and mem_get_info; torch.accelerator refuses "
        "where the allocator is no DeviceAllocator (out-of-tree catalogue A8)",
        todo="vendor: implement c10::DeviceAllocator, or the functions of torch.<device> in torch.cuda's names, in "
        "bytes",
        installs=False,
    ),
    Probe(
        name="out-of-memory",
        stage="runtime",
        title="running out of memory",
        run=_out_of_memory,
        why="programs catch torch.OutOfMemoryError to retry with less; another class ends them (torch/cuda/memory.py)",
        todo="vendor: raise c10::OutOfMemoryError from the allocator",
        installs=False,
    ),
)
