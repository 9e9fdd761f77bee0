"""Devices without an index: `torch.device("musa")` and `musa:0` are not equal, and mean the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxpatch.doctor.probe import Probe, Subject
from fxpatch.doctor.probes.checks import expect, run_all
from fxpatch.doctor.probes.presence import device_module, needs_accelerator


def _index(subject: Subject) -> str:
    needs_accelerator(subject)
    name, module = subject.device, device_module(subject)
    current = torch._C.device(name, int(module.current_device()))
    x = torch.ones(3, device=name)

    def made() -> None:
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "torch.empty(device=name)": lambda: torch.empty(1, device=name),
            "x.to(name)": lambda: torch.ones(1).to(name),
            "torch.tensor(device=name)": lambda: torch.tensor([1.0], device=torch._C.device(name)),
            "zeros_like": lambda: torch.zeros_like(x),
            "torch.arange": lambda: torch.arange(2, device=name),
            "an operator's result": lambda: x + 1,
        }
        for what, make in ways.items():
            expect(make().device, current, f"the device of {what}")

    def not_copied() -> None:
        for where in (name, torch._C.device(name), current):
            expect(x.to(where).data_ptr(), x.data_ptr(), f"the memory of x.to({where!r})")

    def as_default() -> None:
        with torch._C.device(name):
            expect(torch.zeros(1).device, current, "the device of a tensor made under `with torch.device(name)`")
        expect(torch.zeros(1).device.type, "cpu", "the device of a tensor made after that")

    def in_a_module() -> None:
        linear = torch.nn.Linear(2, 2).to(name)
        expect(next(linear.parameters()).device, current, "the device of a parameter after module.to(name)")
        expect(linear(torch.ones(1, 2, device=current)).device, current, "the device of what it computes")

    def of_the_module() -> None:
        with module.device(int(module.current_device())):
            expect(torch.empty(1, device=name).device, current, "the device of a tensor under `with module.device()`")

    def out_of_range() -> None:
        beyond = torch._C.device(name, int(module.device_count()))
        try:
            found: Any = torch.ones(1, device=beyond).device
        except (RuntimeError, AssertionError, ValueError):
            return
        expect(found, "an error", f"a tensor on {beyond}, which does not exist,")

    return run_all(
        {
            "tensors have an index": made,
            "no copy to the same place": not_copied,
            "as the default device": as_default,
            "module.to": in_a_module,
            "the module's device guard": of_the_module,
            "an index that does not exist": out_of_range,
        }
    )


PROBES = (
    Probe(
        name="device-index",
        stage="runtime",
        title="devices without an index",
        run=_index,
        why="a tensor whose device has no index compares unequal to every other, is copied at each .to(), and compiled "
        "code guards on it (out-of-tree catalogue S7)",
        todo="vendor: give new tensors the current device's index, in the allocator and in the guard",
        installs=False,
    ),
)
