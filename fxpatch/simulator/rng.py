"""Random numbers. The problem: only C++ can give a backend its own `torch.Generator`, and CPU kernels draw from the
CPU's default one. The rule: device draws never touch the CPU's sequence, and `torch.manual_seed` repeats both.

The device's generator is a private CPU generator, and every kernel is told to draw from it. All of ATen's can be told.
For a custom operator that cannot, its state is put into the CPU's default generator for the length of one kernel, and
taken out again: that is safe as long as no other thread draws on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fxpatch.privateuse1 import private_type

# not of a class that says it is the device's: Dynamo breaks its graph at a torch.Generator, and fails at other classes
default_generator = torch.Generator("cpu")
_lock = threading.RLock()


@contextmanager
def drawing() -> Iterator[None]:
    """CPU kernels called inside draw from the device's sequence."""
    cpu = torch.default_generator
    with _lock:
        before = cpu.get_state()
        cpu.set_state(default_generator.get_state())
        try:
            yield
        finally:
            default_generator.set_state(cpu.get_state())
            cpu.set_state(before)


def check(generator: torch.Generator) -> None:
    """Refuses a generator that is not the device's, in a real device's words."""
    # by address: the dispatcher hands over a new Python object for the same generator
    if _address(generator) != _address(default_generator):
        raise RuntimeError(
            f"Expected a '{private_type()}' device type for generator but found '{generator.device.type}': the only "
            f"generator of a simulated device is torch.{private_type()}.default_generators[0]"
        )


def _address(generator: torch.Generator) -> int:
    address: int = generator._cdata  # type: ignore[attr-defined]
    return address
