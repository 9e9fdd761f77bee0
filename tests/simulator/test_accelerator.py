"""`torch.accelerator`: everything in it answers as `torch.musa` does, and nothing asks a hook that only C++ has."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

INVALID = r"musa error: invalid device ordinal 1: there is one simulated device"


def test_it_is_the_accelerator(musa: str) -> None:
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device(musa)
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 1
    assert torch.accelerator.current_device_index() == 0


def test_an_index_that_does_not_exist_is_refused(musa: str) -> None:
    for index in (0, "musa:0", torch.device(musa, 0)):
        torch.accelerator.set_device_index(index)
    torch.accelerator.set_device_index(-1)  # says torch: no operation
    with torch.accelerator.device_index(0), torch.accelerator.device_index(None):
        assert torch.accelerator.current_device_index() == 0
    calls: list[Callable[[], Any]] = [
        lambda: torch.accelerator.set_device_index(1),
        lambda: torch.accelerator.device_index(1).__enter__(),
        lambda: torch.accelerator.current_stream(1),
        lambda: torch.accelerator.synchronize("musa:1"),
        lambda: torch.accelerator.memory_allocated(1),
        lambda: torch.accelerator.get_memory_info(1),
        lambda: torch.accelerator.get_device_capability(1),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=INVALID):
            call()
    with pytest.raises(ValueError, match="cuda doesn't match the current accelerator musa"):
        torch.accelerator.set_device_index("cuda:0")


def test_streams_and_waiting(musa: str) -> None:
    torch.accelerator.set_stream(torch.accelerator.current_stream())
    torch.accelerator.synchronize()
    torch.accelerator.synchronize(musa)
    assert torch.accelerator.current_stream() == torch.musa.current_stream()
    own = torch.musa.Stream()
    with torch.musa.stream(own):
        assert torch.accelerator.current_stream() == own
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(own)
    assert torch.musa.current_stream() == own
    torch.accelerator.set_stream(before)
    assert torch.musa.current_stream() == torch.musa.default_stream()
    graph = torch.musa.MUSAGraph()
    with pytest.raises(RuntimeError), torch.musa.graph(graph):  # a capture cannot wait, whoever asks it to
        torch.accelerator.synchronize()


def test_memory_is_what_the_device_module_says(musa: str) -> None:
    of_torch, of_device = torch.accelerator, torch.musa
    of_torch.empty_cache()
    of_torch.empty_host_cache()
    of_torch.reset_peak_memory_stats()
    x = torch.ones(5000, device=musa)
    del x
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        assert getattr(of_torch, name)() == getattr(of_device, name)(), name
    assert of_torch.max_memory_allocated() - of_torch.memory_allocated() >= 20_000
    assert dict(of_torch.memory_stats()) == dict(of_device.memory_stats())
    assert of_torch.get_memory_info() == of_device.mem_get_info()
    of_torch.reset_peak_memory_stats()
    assert of_torch.max_memory_allocated() == of_torch.memory_allocated()
    of_torch.reset_accumulated_memory_stats()
    assert of_torch.memory_stats()["allocated_bytes.all.allocated"] == 0


def test_capability_lists_what_tensors_can_be(musa: str) -> None:
    dtypes = torch.accelerator.get_device_capability()["supported_dtypes"]
    assert {torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64} <= dtypes
    assert torch.qint8 not in dtypes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that complex32 is experimental
        assert {torch.ones(2, device=musa).to(dtype).dtype for dtype in dtypes} == dtypes


# what is left to C++, and why that is right
LEFT_TO_TORCH = {
    "_accelerator_getAccelerator": "names the device",
    "_accelerator_getDeviceIndex": "asks the device guard, which says 0",
    "_accelerator_getAllocatorSettings": "a text that torch keeps",
    "_accelerator_setAllocatorSettings": "a text that torch keeps",
}


def test_every_question_that_torch_can_ask_has_an_answer(musa: str) -> None:
    asked = {name for name in dir(torch._C) if name.startswith("_accelerator_")} - set(LEFT_TO_TORCH)
    assert {name for name in asked if not isinstance(getattr(torch._C, name), types.FunctionType)} == set()


def test_a_torch_that_asks_otherwise_is_told_of(fresh: Callable[..., str]) -> None:
    out = fresh("""
        import warnings, torch
        from fxpatch.simulator import simulate
        def moved(): ...
        moved.__doc__ = "_accelerator_synchronizeDevice(arg0: int, arg1: bool) -> None"
        torch._C._accelerator_synchronizeDevice = moved
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            simulate("musa")
        print(*(warning.message for warning in caught))
        assert torch._C._accelerator_synchronizeDevice is moved
    """)
    assert "torch._C._accelerator_synchronizeDevice in a way that the simulated device does not know" in out


def test_graphs_of_torch_are_refused_in_words(musa: str) -> None:
    with pytest.raises(RuntimeError, match="Graph is not supported on device type: musa"):
        torch.accelerator.Graph()


TRACED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "synchronize": lambda x: (torch.accelerator.synchronize(), x + 1)[1],
    "streams": lambda x: (torch.accelerator.set_stream(torch.accelerator.current_stream()), x + 1)[1],
    "index": lambda x: x + torch.accelerator.current_device_index() + 1,
}
BREAKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "set index": lambda x: (torch.accelerator.set_device_index(0), x + 1)[1],
    "memory": lambda x: x + 1 + 0 * torch.accelerator.memory_allocated(),
    "cache": lambda x: (torch.accelerator.empty_cache(), x + 1)[1],
    "capability": lambda x: (torch.accelerator.get_device_capability(), x + 1)[1],
}


@pytest.mark.parametrize("what", [*TRACED, *BREAKS])
def test_compiled_as_eager(musa: str, what: str) -> None:
    """In one graph where Dynamo has rules for it, with a break where it has none: as on any accelerator."""
    torch._dynamo.reset()
    f = TRACED.get(what) or BREAKS[what]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=what in TRACED)
    assert compiled(torch.ones(2, device=musa)).tolist() == f(torch.ones(2, device=musa)).tolist() == [2, 2]


@pytest.mark.slow
def test_dynamo_asks_the_simulated_device_however_early_it_came(fresh: Callable[..., str]) -> None:
    fresh("""
        import torch
        torch.compile(abs, backend="eager")(torch.ones(2))  # from here on it remembers what torch._C holds
        from fxpatch.simulator import simulate
        simulate("musa")

        def waits(x):
            torch.accelerator.synchronize()
            with torch.accelerator.device_index(0):
                return x + torch.accelerator.current_device_index()

        def wrong(x):
            with torch.accelerator.device_index(1):
                return x + 1

        x = torch.ones(2, device="musa")
        assert torch.compile(waits, backend="aot_eager", fullgraph=True)(x).tolist() == [1, 1]
        try:
            torch.compile(wrong, backend="aot_eager")(x)
        except Exception as error:
            assert "invalid device ordinal 1" in str(error)
        else:
            raise AssertionError("index 1 was taken")
    """)
