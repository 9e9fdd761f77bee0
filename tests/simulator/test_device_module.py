"""`torch.musa`: the names and signatures that torch and its users rely on; streams and events."""

from __future__ import annotations

import types

import pytest
import torch


def test_it_is_a_module(musa: str) -> None:
    assert type(torch.musa) is types.ModuleType
    assert torch.musa.__name__ == "torch.musa"
    import torch.musa as imported

    assert imported is torch.musa


NAMES = """Event MUSAGraph Stream current_device current_stream default_generators default_stream device device_count
device_of empty_cache get_amp_supported_dtype get_device_capability get_device_name get_device_properties
get_rng_state get_rng_state_all graph graph_pool_handle init initial_seed is_available is_bf16_supported
is_current_stream_capturing is_initialized make_graphed_callables manual_seed manual_seed_all
max_memory_allocated max_memory_reserved mem_get_info memory_allocated memory_reserved memory_snapshot
memory_stats reset_accumulated_memory_stats reset_peak_memory_stats seed seed_all set_device set_rng_state
set_rng_state_all set_stream stream synchronize"""


def test_its_names_are_these(musa: str) -> None:
    assert sorted(n for n in vars(torch.musa) if not n.startswith("_")) == NAMES.split()


def test_what_it_answers(musa: str) -> None:
    assert torch.musa.is_available()
    assert torch.musa.device_count() == 1
    assert torch.accelerator.current_accelerator() == torch.device(musa)
    assert torch.musa.get_device_name() == torch.musa.get_device_properties("musa:0").name == "Simulated musa"
    assert torch.musa.is_bf16_supported()
    with torch.musa.device(0), torch.musa.device_of(torch.ones(1, device=musa)):
        assert torch.musa.current_device() == 0
    torch.musa.synchronize()
    with pytest.raises(ValueError, match="expected a musa device, but got cpu"):
        torch.musa.set_device("cpu")


def test_memory_is_counted(musa: str) -> None:
    torch.musa.empty_cache()
    before, reserved = torch.musa.memory_allocated(), torch.musa.memory_reserved()
    torch.musa.reset_peak_memory_stats()
    x = torch.ones(1000, device=musa)
    assert torch.musa.memory_allocated() - before == 4096  # a multiple of 512
    del x
    assert torch.musa.memory_allocated() == before
    assert torch.musa.max_memory_allocated() - before == 4096
    assert torch.musa.memory_reserved() - reserved == 4096
    torch.musa.empty_cache()
    assert torch.musa.memory_reserved() == reserved
    assert torch.musa.max_memory_reserved() - reserved == 4096
    assert torch.musa.memory_stats()["allocated_bytes.all.current"] == before
    free, total = torch.musa.mem_get_info()
    assert total - free == reserved


def test_streams_and_events(musa: str) -> None:
    stream = torch.musa.Stream()
    start, end = torch.musa.Event(enable_timing=True), torch.musa.Event(enable_timing=True)
    with torch.musa.stream(stream):
        start.record()
        x = torch.ones(10, device=musa) + 1
        end.record(stream)
    x.record_stream(stream)
    stream.wait_stream(torch.musa.current_stream())
    torch.musa.current_stream().wait_event(end)
    end.synchronize()
    stream.synchronize()
    assert stream.query()
    assert end.query()
    assert start.elapsed_time(end) > 0
    assert isinstance(stream.record_event(), torch.Event)
    with pytest.raises(RuntimeError, match="enable_timing=True"):
        start.elapsed_time(torch.musa.Event())


def test_tensor_and_module_methods(musa: str) -> None:
    assert torch.ones(2).musa().is_musa
    assert torch.nn.Linear(2, 2).musa().weight.is_musa


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dynamo_traces_it(musa: str, backend: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        module = torch.get_device_module(x.device)
        if module.is_available() and torch.musa.current_device() == 0 and module.is_bf16_supported():
            x = x + module.device_count()
        return x

    torch._dynamo.reset()
    assert torch.compile(f, backend=backend, fullgraph=True)(torch.ones(2, device=musa)).tolist() == [2, 2]
