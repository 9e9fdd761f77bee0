"""The same random numbers for every run: Python's, NumPy's where it is there, torch's on the CPU and on the devices."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch


class Randomness:
    """The state of all generators when this is made.

    Args:
        devices: the devices that the model and its inputs are on; the CPU is always there.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = sorted({each for each in devices if each.type not in ("cpu", "meta")}, key=str)
        self._state = self._now()

    def restore(self) -> None:
        """Puts all generators back."""
        python, numpy, cpu, others = self._state
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        for device, state in zip(self._devices, others, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    def drawn(self) -> bool:
        """Whether somebody has drawn from a generator since it was last put back."""
        before, now = self._state, self._now()
        numpy_same = before[1] is None or all(_same(one, other) for one, other in zip(before[1], now[1], strict=True))
        tensors = zip((before[2], *before[3]), (now[2], *now[3]), strict=True)
        return before[0] != now[0] or not numpy_same or not all(torch.equal(one, other) for one, other in tensors)

    def other(self) -> None:
        """Seeds all generators with something else."""
        random.seed(0x5EED)
        if self._state[1] is not None:
            sys.modules["numpy"].random.seed(0x5EED)
        torch.default_generator.manual_seed(0x5EED)
        for device in self._devices:
            module = torch.get_device_module(device)
            with module.device(device) if device.index is not None else module.device(module.current_device()):
                module.manual_seed(0x5EED)

    def _now(self) -> tuple[Any, Any, torch.Tensor, list[torch.Tensor]]:
        numpy = sys.modules.get("numpy")
        return (
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
            torch.random.get_rng_state(),
            [torch.get_device_module(device).get_rng_state(device) for device in self._devices],
        )


def _same(one: Any, other: Any) -> bool:
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
