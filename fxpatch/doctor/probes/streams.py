"""Streams and events: is order kept, and is the current stream the same for everyone who asks?"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import expect, run_all
from fxpatch.doctor.probes.presence import device_module, needs_accelerator

_SIDE = 512
_STEPS = 8


def _produced(x: torch.Tensor) -> torch.Tensor:
    """Work that takes a while, so that a reader that does not wait comes too early."""
    for _ in range(_STEPS):
        x = (x @ x).clamp(0, 1)
    return x + 1


def _streams(subject: Subject) -> str:
    needs_accelerator(subject)
    module: Any = device_module(subject)
    x = torch.eye(_SIDE).to(subject.device)
    want = float(_SIDE * _SIDE + _SIDE)

    def waits_for_a_stream() -> None:
        side, here = module.Stream(), module.current_stream()
        side.wait_stream(here)
        with module.stream(side):
            made = _produced(x)
        here.wait_stream(side)
        expect(float(made.sum()), want, "what the current stream reads after wait_stream()")

    def waits_for_an_event() -> None:
        side, here = module.Stream(), module.current_stream()
        side.wait_stream(here)
        with module.stream(side):
            made = _produced(x)
            event = module.Event()
            event.record()
        here.wait_event(event)
        expect(float(made.sum()), want, "what the current stream reads after wait_event()")

    def synchronizes() -> None:
        side = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            made = _produced(x)
            event = module.Event()
            event.record(side)
        side.synchronize()
        expect(bool(event.query()), True, "event.query() after its stream was synchronized")
        expect(float(made.sum()), want, "what is read after stream.synchronize()")

    return run_all(
        {"wait_stream": waits_for_a_stream, "wait_event": waits_for_an_event, "synchronize and query": synchronizes}
    )


def _current_stream(subject: Subject) -> str:
    needs_accelerator(subject)
    module: Any = device_module(subject)

    def entered() -> None:
        before, side = module.current_stream(), module.Stream()
        with module.stream(side):
            expect(module.current_stream() == side, True, "current_stream() == side inside `with stream(side)`")
        expect(module.current_stream() == before, True, "current_stream() == before, after the block")

    def left_by_an_error() -> None:
        before = module.current_stream()
        try:
            with module.stream(module.Stream()):
                raise KeyError
        except KeyError:
            pass
        expect(module.current_stream() == before, True, "current_stream() == before, after a block that raised")

    return run_all({"entered and left": entered, "after an error": left_by_an_error})


def _one_stream(subject: Subject) -> str:
    needs_accelerator(subject)
    module: Any = device_module(subject)

    def entered_by_the_module() -> None:
        side = module.Stream()
        with module.stream(side):
            expect(_number(torch.accelerator.current_stream()), _number(side), "torch.accelerator's current stream")

    def entered_by_torch() -> None:
        side = torch.Stream(device=subject.device)
        with side:
            expect(_number(module.current_stream()), _number(side), "current_stream() inside `with torch.Stream()`")

    return run_all({"as torch.accelerator sees it": entered_by_the_module, "as the module sees it": entered_by_torch})


def _number(stream: Any) -> tuple[str, int]:
    """What tells streams of one device apart, whichever class they have."""
    return stream.device.type, int(stream.stream_id)


def _elapsed_time(subject: Subject) -> str:
    needs_accelerator(subject)
    module: Any = device_module(subject)
    x = torch.eye(_SIDE).to(subject.device)
    begin, middle, end = (module.Event(enable_timing=True) for _ in range(3))
    begin.record()
    _produced(x)
    middle.record()
    _produced(x)
    end.record()
    end.synchronize()
    first, second, whole = begin.elapsed_time(middle), middle.elapsed_time(end), begin.elapsed_time(end)
    if not (first > 0 and second > 0 and math.isclose(first + second, whole, rel_tol=0.05, abs_tol=0.05)):
        raise Broken(f"two intervals of {first} ms and {second} ms are {whole} ms together")
    return f"{_STEPS} products of {_SIDE} x {_SIDE} in {float(first):.3f} ms"


PROBES = (
    Probe(
        name="streams",
        stage="runtime",
        title="streams and events keep order",
        run=_streams,
        why="a reader that does not wait reads what was there before, now and then: the worst errors to find",
        todo="vendor: wait_stream, wait_event and synchronize of the device module's Stream",
        installs=False,
    ),
    Probe(
        name="current-stream",
        stage="runtime",
        title="the current stream",
        run=_current_stream,
        why="a stream that stays current after its block, or never becomes current, puts kernels where nobody waits",
        todo="vendor: torch.<device>.stream as a context manager that sets and restores the current stream",
        installs=False,
    ),
    Probe(
        name="accelerator-stream",
        stage="runtime",
        title="one stream for torch and vendor",
        run=_one_stream,
        why="torch.accelerator and the device module must mean the same stream, or kernels run where nobody waits for "
        "them (out-of-tree catalogue A8, A10)",
        todo="vendor: make Stream a subclass of torch.Stream, and implement getStream and exchangeStream of the guard",
        installs=False,
    ),
    Probe(
        name="elapsed-time",
        stage="runtime",
        title="events measure time",
        run=_elapsed_time,
        why="benchmarks, autotuners and engines' profilers time kernels by events; a backend without timing raises, or "
        "gives nonsense that picks the wrong kernel (out-of-tree catalogue A8)",
        todo="vendor: Event(enable_timing=True) with elapsed_time() in milliseconds",
        installs=False,
    ),
)
