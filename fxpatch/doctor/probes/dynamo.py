"""Does Dynamo trace what code does with devices, whole, and to what eager gives?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxpatch.doctor.probe import Probe, Subject
from fxpatch.doctor.probes.checks import expect, expect_close, run_all
from fxpatch.doctor.probes.presence import device_module, needs_accelerator, where_it_can_run
from fxpatch.repair.device_class import REAL


def _as_eager(function: Callable[[torch.Tensor], Any], device: str, fullgraph: bool = True) -> None:
    """Raises whatever Dynamo does, and `Differs` where the compiled function gives something else than the function."""
    torch.compiler.reset()
    x = torch.arange(4.0, device=device)
    want = function(x)
    got = torch.compile(function, backend="eager", fullgraph=fullgraph)(x)
    expect_close(got, want, "what the compiled function gives")


def _devices(subject: Subject) -> str:
    device = where_it_can_run(subject)
    real = REAL(device, 0) if device != "cpu" else REAL("cpu")

    functions: dict[str, Callable[[torch.Tensor], Any]] = {
        "x.device": lambda x: x + torch.ones(4, device=x.device),
        "torch.device(name)": lambda x: x + torch.ones(4, device=torch.device(device)),
        "torch.device(type, index)": lambda x: x.to(torch.device(type=real.type, index=real.index)) + 1,
        "a device from outside": lambda x: x + torch.ones(4, device=real),
        "comparing devices": lambda x: x + 1 if x.device == real and x.device != torch.device("meta") else x - 1,
        "type and index": lambda x: (x + 1, x.device.type, x.device.index),
        "to the CPU and back": lambda x: x.to("cpu").add(1).to(x.device),
        "returning a device": lambda x: (x + 1, x.device),
    }
    names = run_all({name: partial(_as_eager, f, device) for name, f in functions.items()})
    return f"in one graph, as in eager, on {device}: {names}"


def _isinstance(subject: Subject) -> str:
    device = where_it_can_run(subject)

    def alone(x: torch.Tensor) -> Any:
        return x + 1, isinstance(x.device, torch.device)

    def among_others(x: torch.Tensor) -> Any:
        return x + 1, isinstance(x.device, (str, torch.device)), isinstance("cpu", torch.device)

    functions = {"isinstance(x.device, torch.device)": alone, "isinstance with a tuple": among_others}
    return run_all({name: partial(_as_eager, f, device) for name, f in functions.items()})


def _module(subject: Subject) -> str:
    device, on = subject.device, where_it_can_run(subject)
    whole = True

    def looked_up(x: torch.Tensor) -> Any:
        return x + 1, torch.get_device_module(device) is None

    def called(x: torch.Tensor) -> Any:
        return x + 1, getattr(torch, device).is_available()

    def calls() -> None:
        nonlocal whole
        whole = _traces(called, on)

    names = run_all({"torch.get_device_module()": lambda: _as_eager(looked_up, on), f"torch.{device}": calls})
    return f"as in eager: {names}" + ("" if whole else f"; calling torch.{device}.is_available() breaks the graph")


def _traces(function: Callable[[torch.Tensor], Any], device: str) -> bool:
    """Whether a function traces whole. Where it does not, the rest of it has to be compiled, and right, all the same:
    a break in the graph is slow and not wrong."""
    try:
        _as_eager(function, device)
    except importlib.import_module("torch._dynamo.exc").Unsupported:
        _as_eager(function, device, fullgraph=False)
        return False
    return True


def _streams(subject: Subject) -> str:
    needs_accelerator(subject)
    module, device = device_module(subject), subject.device

    def on_a_stream(x: torch.Tensor) -> torch.Tensor:
        side = torch.Stream(device=device)
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            y = x * 2
        torch.accelerator.current_stream().wait_stream(side)
        return y + 1

    def on_the_modules_stream(x: torch.Tensor) -> torch.Tensor:
        side = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            y = x * 2
        module.current_stream().wait_stream(side)
        return y + 1

    _as_eager(on_a_stream, device)
    if _traces(on_the_modules_stream, device):
        return f"torch.Stream and torch.{device}.Stream trace"
    return f"torch.Stream traces; torch.{device}.Stream breaks the graph, and gives what eager gives"


def _flex_attention(subject: Subject) -> str:
    needs_accelerator(subject)
    from torch.nn.attention.flex_attention import flex_attention

    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 16, generator=made) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    got: Any = flex_attention(q.to(subject.device), k.to(subject.device), v.to(subject.device))
    expect(got.device.type, subject.device, "the device of its result")
    expect_close(got, want, "FlexAttention, against attention on the CPU,")
    return "gives what attention gives on the CPU"


PROBES = (
    Probe(
        name="dynamo-devices",
        stage="dynamo",
        title="devices in compiled code",
        run=_devices,
        why="Dynamo knows devices by their class: 'Unexpected type in sourceless builder', 'Attempted to call function "
        "marked as skipped', and a graph break at every x.device (out-of-tree catalogue A2)",
        todo="fxpatch.install(); and import the vendor's package before anything is compiled",
        limit_s=40.0,
    ),
    Probe(
        name="dynamo-isinstance",
        stage="dynamo",
        title="isinstance in compiled code",
        run=_isinstance,
        why="Dynamo asks issubclass where Python asks isinstance: under a shim the compiled function silently takes "
        "the other branch (out-of-tree catalogue S6)",
        todo="fxpatch.install(); vendor: define __subclasscheck__ beside __instancecheck__",
        limit_s=40.0,
    ),
    Probe(
        name="dynamo-device-module",
        stage="dynamo",
        title="device module in compiled code",
        run=_module,
        why="Dynamo traces the device module's Python functions, and needs trace rules for those bound from C "
        "(out-of-tree catalogue A11)",
        todo="fxpatch.install() where the module is none; vendor: write these functions in Python, or add trace rules",
        limit_s=40.0,
    ),
    Probe(
        name="dynamo-streams",
        stage="dynamo",
        title="streams in compiled code",
        run=_streams,
        why="a stream class that Dynamo does not know ends in: Expected 'int' but found 'NoneType', from 2.12 on "
        "(out-of-tree catalogue A10)",
        todo="vendor: subclass torch.Stream, and register a DeviceInterface with current_stream",
        limit_s=40.0,
    ),
    Probe(
        name="flex-attention",
        stage="dynamo",
        title="FlexAttention is admitted",
        run=_flex_attention,
        why="FlexAttention is only supported on CUDA, CPU, HPU, or MPS devices: a list, before the device is looked at "
        "(out-of-tree catalogue A12; torch/nn/attention/flex_attention.py)",
        todo="fxpatch.install()",
        limit_s=40.0,
    ),
)
