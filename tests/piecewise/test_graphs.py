"""Device adapters: what a capture leaves, what a failed one must not leave, and devices that have no graphs."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from garbage import collect
from hypothesis import given
from hypothesis import strategies as st

import fxpatch
from compile_configs import DeviceProfile, load_profile
from fxpatch.errors import CaptureFailedError
from fxpatch.piecewise import graph_streams
from fxpatch.piecewise.capture_failure import out_of_graphs
from fxpatch.piecewise.graph_recorder import Recorder
from fxpatch.piecewise.graph_streams import AcceleratorGraphs, ContextGraphs, StreamGraphs
from fxpatch.piecewise.graphs import GraphDevice, Pool, frozen_gc, graph_device


def profile_with(*classes: str, budget: int | None = 1900) -> DeviceProfile:
    """MUSA's profile, with other graph classes."""
    profile = load_profile("musa")
    return dataclasses.replace(profile, capture=dataclasses.replace(profile.capture, classes=classes, budget=budget))


@pytest.fixture
def strict(musa: str) -> Iterator[Callable[..., None]]:
    """The simulated device checks each replay; `strict(max_live_graphs=2)` sets more for the length of a test."""
    fxpatch.simulate(musa, strict=True)
    collect()
    yield lambda **settings: fxpatch.simulate(musa, **settings)
    fxpatch.simulate(musa, memory=None, max_live_graphs=None, strict=False)


@pytest.fixture
def device(musa: str, strict: Callable[..., None]) -> GraphDevice:
    return graph_device(musa, load_profile("musa"))


@pytest.fixture(params=["musa", "recorder", "cpu"])
def any_device(request: pytest.FixtureRequest, strict: Callable[..., None]) -> GraphDevice:
    """A device with graphs, the same one without, and the host."""
    if request.param == "cpu":
        return graph_device("cpu", load_profile("cpu"))
    return graph_device("musa", load_profile("musa") if request.param == "musa" else profile_with())


def assert_unharmed(device: GraphDevice) -> None:
    """The device is as it should be outside a capture."""
    assert not device.is_capturing()
    assert torch.musa.current_stream() == torch.musa.default_stream()
    device.synchronize()
    x = torch.ones(3, device="musa")
    captured = device.capture(lambda: x + 1, device.pool())
    captured.replay()
    assert captured.result.tolist() == [2, 2, 2]
    captured.release()


# -- capture and replay -------------------------------------------------------------------------------


def test_what_is_captured_runs_at_each_replay(any_device: GraphDevice) -> None:
    x = torch.zeros(2, device=any_device.device)
    y = torch.zeros(2, device=any_device.device)
    pool = any_device.pool()
    first = any_device.capture(lambda: {"y": x + 1, "n": 3}, pool)
    first.replay()  # what follows reads real values
    second = any_device.capture(lambda: (first.result["y"] * 2, y.add_(x)), pool)
    y.zero_()
    for value in (1.0, 5.0):
        x.fill_(value)
        first.replay()
        second.replay()
        assert first.result["y"].tolist() == [value + 1] * 2
        assert first.result["n"] == 3
        assert second.result[0].tolist() == [2 * (value + 1)] * 2
    assert y.tolist() == [6, 6]


def test_replay_and_release_are_the_graph_s_own(device: GraphDevice) -> None:
    captured = device.capture(lambda: torch.ones(2, device="musa"), device.pool())
    graph = captured.replay.__self__
    assert type(graph) is torch.musa.MUSAGraph
    assert captured.replay == graph.replay
    assert captured.release == graph.reset


def test_release_makes_room_for_another(device: GraphDevice, strict: Callable[..., None]) -> None:
    x = torch.ones(2, device="musa")
    strict(max_live_graphs=1)
    for _ in range(3):
        captured = device.capture(lambda: x + 1)
        captured.replay()
        assert captured.result.tolist() == [2, 2]
        captured.release()
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        captured.replay()


def test_warm_up_and_capture_share_a_stream_and_leave_it(device: GraphDevice) -> None:
    streams: list[Any] = []

    def call() -> torch.Tensor:
        streams.append(torch.musa.current_stream())
        return torch.ones(1, device="musa")

    with device.side_stream():
        call()
        device.capture(call, device.pool())
        assert not device.is_capturing()
        call()
    device.capture(call, device.pool())
    assert streams[0] != torch.musa.default_stream()
    assert [stream == streams[0] for stream in streams] == [True] * 4
    assert torch.musa.current_stream() == torch.musa.default_stream()


def test_the_side_stream_waits_and_is_waited_for(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[int, int]] = []
    outside = torch.musa.Stream()
    monkeypatch.setattr(torch.musa.Stream, "wait_stream", lambda a, b: waits.append((a.stream_id, b.stream_id)))
    with torch.musa.stream(outside), device.side_stream():
        side = torch.musa.current_stream().stream_id
        with device.side_stream():
            assert torch.musa.current_stream().stream_id == side
    assert waits == [(side, outside.stream_id), (outside.stream_id, side)]


def test_captures_of_one_pool_share_memory(device: GraphDevice) -> None:
    def temporary() -> torch.Tensor:
        return (torch.ones(1024, device="musa") + 1).sum()

    shared, alone = device.pool(), [device.pool(), device.pool()]
    before = torch.musa.memory_reserved()
    kept = [device.capture(temporary, shared) for _ in range(2)]
    of_one = torch.musa.memory_reserved() - before
    kept += [device.capture(temporary, pool) for pool in alone]
    assert torch.musa.memory_reserved() - before == 3 * of_one
    for captured in kept:
        captured.replay()
        assert captured.result.item() == 2048


def test_random_operators_draw_anew(any_device: GraphDevice) -> None:
    assert any_device.registers_generator
    captured = any_device.capture(lambda: torch.rand(8, device=any_device.device), any_device.pool())
    draws = []
    for _ in range(3):
        captured.replay()
        draws.append(tuple(captured.result.tolist()))
    assert len(set(draws)) == 3


def test_the_garbage_collector_rests_during_a_capture(device: GraphDevice) -> None:
    assert gc.isenabled()
    assert device.capture(gc.isenabled).result is False
    assert gc.isenabled()


def test_memory(device: GraphDevice) -> None:
    before = device.memory()
    held = torch.ones(1 << 18, device="musa")
    after = device.memory()
    assert after["allocated"] - before["allocated"] == held.nbytes
    assert after["reserved"] >= after["allocated"]
    assert graph_device("cpu", load_profile("cpu")).memory() is None


# -- failure ------------------------------------------------------------------------------------------


def fails_itself(x: torch.Tensor) -> None:
    _ = x + 1
    raise ValueError("the third piece\nis not well")


def asks_the_host(x: torch.Tensor) -> None:
    (x + 1).sum().item()


def waits_for_the_device(x: torch.Tensor) -> None:
    torch.musa.synchronize()


def leaves_a_stream_unjoined(x: torch.Tensor) -> None:
    side = torch.musa.Stream()
    side.wait_stream(torch.musa.current_stream())
    with torch.musa.stream(side):
        x + 1


def fails_on_another_stream(x: torch.Tensor) -> None:
    torch.musa.set_stream(torch.musa.Stream())
    raise ValueError("elsewhere")


FAILURES = {
    fails_itself: ("the call: ValueError: the third piece", ValueError),
    asks_the_host: (
        "the call: CaptureError: MUSA error: operation not permitted",
        RuntimeError,
    ),
    waits_for_the_device: ("the call: CaptureError: MUSA error: operation not permitted", RuntimeError),
    leaves_a_stream_unjoined: (
        "capture_end: CaptureError: MUSA error: capturing stream has unjoined work",
        RuntimeError,
    ),
    fails_on_another_stream: ("the call: ValueError: elsewhere", ValueError),
}


@pytest.mark.parametrize("mistake", FAILURES)
def test_a_failed_capture_ends(mistake: Callable[[torch.Tensor], None], device: GraphDevice) -> None:
    seen, cause = FAILURES[mistake]
    x, pool = torch.ones(4, device="musa"), device.pool()
    good = device.capture(lambda: x + 1, pool)
    with pytest.raises(CaptureFailedError) as caught:
        device.capture(lambda: mistake(x), pool)
    error = caught.value
    assert str(error).startswith("A call could not be captured into a graph of device 'musa'.\n  seen: " + seen)
    assert "operations that the device can record" in error.expected
    assert "split=" in error.hint
    assert not error.out_of_graphs
    assert isinstance(error.__cause__, cause)
    assert_unharmed(device)
    again = device.capture(lambda: good.result * 10, pool)
    good.replay()
    again.replay()
    assert again.result.tolist() == [20] * 4


def test_what_goes_wrong_in_ending_is_noted(device: GraphDevice) -> None:
    x = torch.ones(4, device="musa")
    with pytest.raises(CaptureFailedError) as caught:
        device.capture(lambda: asks_the_host(x), device.pool())
    (note,) = caught.value.__cause__.__notes__
    assert note.startswith(
        "and capture_end after that: CaptureError: MUSA error: operation failed due to a previous error"
    )


def test_a_call_that_leaves_its_stream_is_captured_all_the_same(device: GraphDevice) -> None:
    x = torch.ones(4, device="musa")

    def call() -> torch.Tensor:
        y = x + 1
        torch.musa.set_stream(torch.musa.Stream())
        return y

    captured = device.capture(call, device.pool())
    captured.replay()
    assert captured.result.tolist() == [2] * 4
    assert_unharmed(device)


def test_an_error_from_before_is_not_the_capture_s(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("an earlier kernel has failed")

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.musa, "synchronize", fail)
        with pytest.raises(RuntimeError, match=r"^an earlier kernel has failed$"):
            device.capture(lambda: calls.append(1), device.pool())
    assert not calls
    assert_unharmed(device)


def test_a_capture_ends_whatever_the_device_says_of_it(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.musa, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.musa.MUSAGraph, "reset", lambda graph: None)
        with pytest.raises(CaptureFailedError):
            device.capture(lambda: fails_itself(torch.ones(2, device="musa")), device.pool())
    assert_unharmed(device)


def test_an_interruption_stays_one(device: GraphDevice) -> None:
    def call() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.capture(call, device.pool())
    assert gc.isenabled()
    assert_unharmed(device)


def test_a_capture_inside_a_capture_is_refused_and_does_not_spoil_it(device: GraphDevice) -> None:
    x, refusals = torch.ones(4, device="musa"), []

    def outer() -> torch.Tensor:
        with pytest.raises(CaptureFailedError, match="the current stream is being captured already") as caught:
            device.capture(lambda: x + 2, device.pool())
        refusals.append(caught.value)
        return x + 1

    captured = device.capture(outer, device.pool())
    captured.replay()
    assert captured.result.tolist() == [2] * 4
    assert len(refusals) == 1


def test_running_out_of_graphs_is_said(device: GraphDevice, strict: Callable[..., None]) -> None:
    x, pool = torch.ones(4, device="musa"), device.pool()
    strict(max_live_graphs=2)
    kept = [device.capture(lambda: x + 1, pool) for _ in range(2)]
    with pytest.raises(CaptureFailedError, match="out of resources: 2 graphs are live") as caught:
        device.capture(lambda: x + 1, pool)
    assert caught.value.out_of_graphs
    assert "its profile plans with 1900" in caught.value.expected
    assert "capture fewer sizes" in caught.value.hint
    for captured in kept:
        captured.replay()
        assert captured.result.tolist() == [2] * 4
    kept.pop().release()
    assert_unharmed(device)


def test_running_out_of_memory_is_said(device: GraphDevice, strict: Callable[..., None]) -> None:
    x = torch.ones(1 << 20, device="musa")
    torch.musa.empty_cache()
    strict(memory=torch.musa.memory_reserved() + (1 << 20))
    with pytest.raises(CaptureFailedError, match="OutOfMemoryError: MUSA out of memory") as caught:
        device.capture(lambda: x + 1, device.pool())
    assert not caught.value.out_of_graphs
    assert caught.value.hint.startswith("capture fewer or smaller sizes")
    strict(memory=None)
    assert_unharmed(device)


@pytest.mark.parametrize(
    ("device", "text", "step", "gone"),
    [
        ("npu", "NPU function error: c10_npu::acl::AclmdlRICaptureBegin, error code is 207008", "capture_begin", True),
        ("npu", "error code is 207005\n[ERROR] 2026-01-01", "the call", True),
        ("npu", "a tensor of 1207008 bytes", "the call", False),
        ("npu", "error code is 507015", "the call", False),
        ("musa", "MUSA error: an illegal memory access was encountered", "capture_end", True),
        ("musa", "MUSA error: an illegal memory access was encountered", "the call", False),
        ("cuda", "CUDA error: an illegal memory access was encountered", "capture_end", False),
    ],
)
def test_the_words_for_running_out_of_graphs(device: str, text: str, step: str, gone: bool) -> None:
    assert out_of_graphs(device, RuntimeError(text), step) is gone


def test_an_end_that_fails_costs_the_stream_the_pool_and_nothing_else(
    device: StreamGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst that was seen: the stream goes on being captured, whatever one does."""
    x, pool = torch.ones(4, device="musa"), device.pool()
    streams: list[Any] = []
    good = device.capture(lambda: (streams.append(torch.musa.current_stream()), x + 1)[1], pool)
    handle, stuck = pool.handle, []

    def end(graph: Any) -> None:
        stuck.append(graph)
        raise RuntimeError("MUSA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(torch.musa.MUSAGraph, "capture_end", end)
        patch.setattr(torch.musa.MUSAGraph, "reset", lambda graph: None)
        with pytest.raises(CaptureFailedError, match="capture_end: RuntimeError: MUSA error: an illegal") as caught:
            device.capture(lambda: x + 1, pool)
    assert caught.value.out_of_graphs
    assert torch.musa.current_stream() == torch.musa.default_stream()
    assert stuck == device._kept  # an allocator may still ask it
    assert pool.handle != handle
    stuck[0].reset()  # the simulated device has one capture at a time
    device.capture(lambda: streams.append(torch.musa.current_stream()), pool)
    assert streams[0] != streams[1]
    assert_unharmed(device)
    good.replay()
    assert good.result.tolist() == [2] * 4


@given(st.lists(st.sampled_from(["good", *FAILURES]), max_size=8), st.booleans())
def test_whatever_fails_between_them_graphs_are_right(steps: list[Any], nested: bool) -> None:
    fxpatch.simulate("musa", strict=True)
    device = graph_device("musa", load_profile("musa"))
    pool = device.pool()
    values = [torch.zeros(3, device="musa")]
    plan = []

    def build() -> None:
        for step in steps:
            if step == "good":
                captured = device.capture(lambda: values[-1] + 1, pool)
                values.append(captured.result)
                plan.append(captured)
            else:
                with pytest.raises(CaptureFailedError):
                    device.capture(lambda step=step: step(values[-1]), pool)

    if nested:
        with device.side_stream():
            build()
    else:
        build()
    for start in (10.0, 20.0):
        values[0].fill_(start)
        for captured in plan:
            captured.replay()
        assert [value.tolist() for value in values] == [[start + i] * 3 for i in range(len(values))]
    assert_unharmed(device)


def test_nothing_of_a_failed_capture_stays(device: GraphDevice) -> None:
    x, pool = torch.ones(1 << 16, device="musa"), device.pool()
    with pytest.raises(CaptureFailedError):
        device.capture(lambda: asks_the_host(x), pool)
    collect()
    before = device.memory()
    for mistake in FAILURES:
        with pytest.raises(CaptureFailedError):
            device.capture(lambda mistake=mistake: mistake(x), pool)
    collect()
    assert device.memory() == before


# -- weak tensors -------------------------------------------------------------------------------------


def test_a_weak_tensor_keeps_nothing_and_reads_what_is_there(device: StreamGraphs) -> None:
    assert device.weak_reason == "torch._C._construct_storage_from_data_pointer"
    x, pool = torch.ones(1024, device="musa"), device.pool()
    before = device.memory()["allocated"]
    captured = device.capture(lambda: (x + 1).view(2, 512).t()[3:], pool)
    assert device.memory()["allocated"] - before == x.nbytes
    strong = captured.result
    weak = device.weak(strong)
    place = weak.data_ptr(), weak.shape, weak.stride(), weak.dtype, weak.device
    assert place == (strong.data_ptr(), strong.shape, strong.stride(), strong.dtype, strong.device)
    captured.replay()
    assert torch.equal(weak, strong)
    replay = captured.replay
    del captured, strong
    collect()
    assert device.memory()["allocated"] == before  # `weak` holds none of it
    other = device.capture(lambda: x * 3, pool)
    assert other.result.data_ptr() == weak.data_ptr() - weak.storage_offset() * 4  # and so it was handed out again
    for _ in range(2):
        replay()
        assert weak.unique().tolist() == [2]
        other.replay()
        assert other.result.unique().tolist() == [3]


@pytest.mark.parametrize("kind", ["conj", "neg", "empty", "grad", "parameter", "subclass", "int8", "view"])
def test_weak_tensors_of_every_kind_are_equal(kind: str, device: GraphDevice) -> None:
    x = torch.tensor([1 + 2j, 3 - 4j], device="musa")
    tensor = {
        "conj": lambda: x.conj(),
        "neg": lambda: x.conj().imag,
        "empty": lambda: torch.empty(0, 3, device="musa"),
        "grad": lambda: torch.ones(2, device="musa", requires_grad=True),
        "parameter": lambda: torch.nn.Parameter(torch.ones(2, device="musa")),
        "subclass": lambda: torch.ones(2, device="musa").as_subclass(type("Sub", (torch.Tensor,), {})),
        "int8": lambda: torch.arange(5, dtype=torch.int8, device="musa"),
        "view": lambda: torch.arange(12, device="musa").view(3, 4)[1:, ::2],
    }[kind]()
    weak = device.weak(tensor)
    assert weak.tolist() == tensor.tolist()
    assert (weak.data_ptr(), weak.is_conj(), weak.is_neg()) == (tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
    assert (weak is tensor) is (kind in ("empty", "grad", "parameter", "subclass"))


def test_a_door_that_is_gone_or_wrong_is_not_used(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(3, device=musa)
    name = "_construct_storage_from_data_pointer"
    for wrong, why in (
        (lambda pointer, device, nbytes: torch.zeros(nbytes, device=device).untyped_storage(), "at another address"),
        (lambda pointer, device: None, "TypeError"),
    ):
        monkeypatch.setattr(torch._C, name, wrong)
        device = graph_device(musa, load_profile("musa"))
        assert why in device.weak_reason
        assert device.weak(tensor) is tensor
    monkeypatch.delattr(torch._C, name)
    device = graph_device(musa, load_profile("musa"))
    assert f"has no torch._C.{name} (seen in 2.13.0)" in device.weak_reason
    assert device.weak(tensor) is tensor


# -- which class --------------------------------------------------------------------------------------


def test_the_first_class_that_can_be_built_is_used(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(torch.musa, "BrokenGraph", refuse, raising=False)
    device = graph_device(musa, profile_with("torch.musa.NoGraph", "torch.musa.BrokenGraph", "torch.musa.MUSAGraph"))
    assert device.captures
    assert device.reason == "torch.musa.MUSAGraph; torch.musa.NoGraph: not there; torch.musa.BrokenGraph: no driver"
    assert repr(device) == f"StreamGraphs('musa': {device.reason})"


def test_torch_s_accelerator_graph_is_not_believed_unless_it_can_be_built(musa: str) -> None:
    device = graph_device(musa, profile_with("torch.accelerator.Graph"))
    assert isinstance(device, Recorder)
    assert not device.captures
    assert device.reason.startswith("torch.accelerator.Graph: ")
    assert device.reason != "torch.accelerator.Graph: "


def test_no_class_means_the_recorder(musa: str) -> None:
    assert graph_device(musa, profile_with()).reason == "the profile of musa names no graph class"
    assert graph_device("cpu", load_profile("cpu")).reason == "the profile of cpu names no graph class"
    assert graph_device("cpu", load_profile("cpu")).type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_a_device_that_is_not_in_this_machine(name: str) -> None:
    if getattr(torch, name).is_available():
        pytest.skip(f"this machine has a {name}")
    device = graph_device(name, load_profile(name))
    assert isinstance(device, Recorder)
    assert f"torch.{name}.{name.upper()}Graph: Tried to instantiate dummy base class" in device.reason


def test_a_device_with_an_index(strict: Callable[..., None]) -> None:
    device = graph_device("musa:0", load_profile("musa"))
    assert (device.type, device.device.index) == ("musa", 0)
    assert_unharmed(device)


def test_a_graph_that_takes_no_error_mode(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.xpu.XPUGraph has it."""

    class XPULike(torch.musa.MUSAGraph):
        def capture_begin(self, pool: Any = None) -> None:
            super().capture_begin(pool=pool)

    monkeypatch.setattr(torch.musa, "XPULike", XPULike, raising=False)
    assert_unharmed(graph_device("musa", profile_with("torch.musa.XPULike")))


def test_a_graph_bound_from_cpp_gets_both(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch_musa's `_MUSAGraph` has it: no defaults, and no signature to ask for."""
    given: list[dict[str, Any]] = []

    class Bound(torch.musa.MUSAGraph):
        def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
            given.append({"pool": pool, "capture_error_mode": capture_error_mode})
            super().capture_begin(pool, capture_error_mode)

    def no_signature(function: Any) -> None:
        raise ValueError("no signature found for builtin")

    monkeypatch.setattr(torch.musa, "Bound", Bound, raising=False)
    bound = graph_device("musa", profile_with("torch.musa.Bound"))
    with monkeypatch.context() as patch:
        patch.setattr(graph_streams.inspect, "signature", no_signature)
        pool = bound.pool()
        bound.capture(lambda: torch.ones(2, device="musa"), pool)
    assert given == [{"pool": pool.handle, "capture_error_mode": "thread_local"}]


class AcceleratorLike:
    """`torch.accelerator.Graph`'s interface (2.13) over the simulated device's graph."""

    def __init__(self, keep_graph: bool = False, *, pool: Any = None, capture_error_mode: str = "default") -> None:
        self._graph = torch.musa.MUSAGraph(keep_graph)
        self._options = (pool, capture_error_mode)

    def capture_begin(self) -> None:
        self._graph.capture_begin(*self._options)

    def __enter__(self) -> None:
        raise AssertionError("it empties the cache of a device that may have none")

    def __exit__(self, *error: object) -> None:
        raise AssertionError("it ends a capture that has failed")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


def test_the_interface_is_torch_s() -> None:
    graph = pytest.importorskip("torch.accelerator.graphs", reason="torch.accelerator.Graph came with torch 2.12").Graph
    assert [*inspect.signature(graph.capture_begin).parameters] == ["self"]
    assert [*inspect.signature(graph.__init__).parameters] == ["self", *inspect.signature(AcceleratorLike).parameters]


@pytest.fixture
def accelerator_graphs(strict: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> GraphDevice:
    """A device that has registered its graphs with torch.accelerator."""
    monkeypatch.setattr(torch.accelerator, "Graph", AcceleratorLike, raising=False)
    return graph_device("musa", profile_with("torch.accelerator.Graph", "torch.musa.MUSAGraph"))


def test_torch_s_accelerator_graph(accelerator_graphs: GraphDevice) -> None:
    assert isinstance(accelerator_graphs, AcceleratorGraphs)
    assert accelerator_graphs.reason == "torch.accelerator.Graph"
    assert_unharmed(accelerator_graphs)
    with pytest.raises(CaptureFailedError):
        accelerator_graphs.capture(lambda: asks_the_host(torch.ones(2, device="musa")), accelerator_graphs.pool())
    assert_unharmed(accelerator_graphs)


def test_torch_s_accelerator_graph_is_another_device_s(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "Graph", AcceleratorLike, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    device = graph_device(musa, profile_with("torch.accelerator.Graph"))
    assert device.reason == "torch.accelerator.Graph: torch's accelerator is xpu, not musa"


def test_a_device_without_pool_handles(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first graph's pool is everybody's."""
    monkeypatch.delattr(torch.musa, "graph_pool_handle")
    x, pool = torch.ones(2, device="musa"), device.pool()
    assert pool == Pool(None)
    first = device.capture(lambda: x + 1, pool)
    assert pool.handle == first.replay.__self__.pool()
    second = device.capture(lambda: first.result + 1, pool)
    assert second.replay.__self__.pool() == pool.handle
    first.replay()
    second.replay()
    assert second.result.tolist() == [3, 3]


def test_a_graph_that_only_a_context_manager_begins(
    strict: Callable[..., None], musa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = torch.musa.graph

    class Opaque:
        def __init__(self) -> None:
            self._graph = torch.musa.MUSAGraph()
            self.replay, self.reset, self.pool = self._graph.replay, self._graph.reset, self._graph.pool

    monkeypatch.setattr(torch.musa, "Opaque", Opaque, raising=False)
    monkeypatch.setattr(torch.musa, "graph", lambda g, **options: graph(g._graph, **options))
    device = graph_device(musa, profile_with("torch.musa.Opaque"))
    assert isinstance(device, ContextGraphs)
    assert_unharmed(device)
    x = torch.ones(4, device=musa)
    for mistake, (seen, _) in FAILURES.items():
        with pytest.raises(CaptureFailedError) as caught:
            device.capture(lambda mistake=mistake: mistake(x), device.pool())
        assert seen in str(caught.value)
        assert_unharmed(device)


# -- other devices, in processes of their own ---------------------------------------------------------


def test_a_simulated_npu(fresh: Callable[..., str]) -> None:
    out = fresh("""
        import torch, fxpatch
        from compile_configs import load_profile
        from fxpatch.errors import CaptureFailedError
        from fxpatch.piecewise.graphs import graph_device

        fxpatch.simulate("npu", strict=True, max_live_graphs=2)
        device = graph_device("npu", load_profile("npu"))
        x, pool = torch.ones(3, device="npu"), device.pool()
        print(type(device).__name__, type(device.capture(lambda: x + 1, pool).replay.__self__).__name__)
        print(device.reason)
        print(device.registers_generator, device.weak_reason)
        first = device.capture(lambda: x + 1, pool)
        second = device.capture(lambda: first.result * 2, pool)
        first.replay(); second.replay()
        print(second.result.tolist())
        try:
            device.capture(lambda: x + 1, pool)
        except CaptureFailedError as error:
            print(error.out_of_graphs, error.expected)
    """)
    lines = out.splitlines()
    assert lines[0] == "StreamGraphs NPUGraph"
    assert lines[1].startswith("torch.npu.NPUGraph; torch.accelerator.Graph: ")
    assert lines[2] == "False torch._C._construct_storage_from_data_pointer"
    assert lines[3:] == ["[4.0, 4.0, 4.0]", "True room for one more graph on this device; its profile plans with 1800"]


def test_a_device_that_nobody_has_heard_of_holds_its_tensors(fresh: Callable[..., str]) -> None:
    """Its storages may be of a kind of their own, and a tensor over a bare address would have another."""
    out = fresh("""
        import dataclasses, torch, fxpatch
        from compile_configs import load_profile
        from fxpatch.piecewise.graphs import graph_device

        fxpatch.simulate("quux")
        profile = load_profile("musa")
        capture = dataclasses.replace(profile.capture, classes=("torch.quux.QUUXGraph",))
        device = graph_device("quux", dataclasses.replace(profile, device="quux", capture=capture))
        x = torch.ones(2, device="quux")
        print(device.captures, device.registers_generator, device.weak(x) is x, device.weak_reason)
        captured = device.capture(lambda: x + 1, device.pool()); captured.replay(); print(captured.result.tolist())
    """)
    assert out.splitlines() == [
        "True False True nobody has said whether quux's storages are torch's own",
        "[2.0, 2.0]",
    ]


# -- the recorder -------------------------------------------------------------------------------------


@pytest.fixture
def recorder() -> Recorder:
    device = graph_device("cpu", load_profile("cpu"))
    assert isinstance(device, Recorder)
    return device


def test_outputs_stay_where_they_are(recorder: Recorder) -> None:
    x = torch.arange(6.0)
    shapes: dict[str, Callable[[], Any]] = {
        "fresh": lambda: x * 2,
        "expanded": lambda: (x[:3] * 2).view(3, 1).expand(3, 4),
        "scalar": lambda: x.sum(),
        "views of one": lambda: (x * 2).split(3),
        "the input": lambda: x,
        "a view of the input": lambda: x.view(2, 3),
        "in place": lambda: x.mul_(1.0),
        "empty": lambda: x[:0] + 1,
        "a tree": lambda: {"a": [x + 1, None], "b": (3, x.t())},
    }
    for name, call in shapes.items():
        captured = recorder.capture(call, recorder.pool())
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(captured.result) if isinstance(leaf, torch.Tensor)]
        places = [leaf.data_ptr() for leaf in leaves]
        for start in (1.0, 7.0):
            x.copy_(torch.arange(6.0) + start)
            writes = x._version
            captured.replay()
            assert x._version == writes + (name == "in place"), name  # nothing is copied onto itself
            want = [leaf for leaf in torch.utils._pytree.tree_leaves(call()) if isinstance(leaf, torch.Tensor)]
            assert [leaf.tolist() for leaf in leaves] == [leaf.tolist() for leaf in want], name
            assert [leaf.data_ptr() for leaf in leaves] == places, name


def test_a_call_that_returns_something_else_is_refused(recorder: Recorder) -> None:
    results = iter([torch.ones(4), torch.ones(1), torch.ones(4, dtype=torch.float64), (torch.ones(4),) * 2])
    captured = recorder.capture(lambda: next(results))
    for said in (
        r"a tensor of \(1,\), torch.float32, and of \(4,\), torch.float32 when it was captured",
        r"a tensor of \(4,\), torch.float64",
        "returned 2 tensors, and 1 when it was captured",
    ):
        with pytest.raises(RuntimeError, match=said):
            captured.replay()


def test_the_recorder_fails_as_a_device_does(recorder: Recorder) -> None:
    with pytest.raises(CaptureFailedError, match="graph of device 'cpu'") as caught:
        recorder.capture(lambda: fails_itself(torch.ones(2)), recorder.pool())
    assert isinstance(caught.value.__cause__, ValueError)
    x = torch.ones(2)
    captured = recorder.capture(lambda: x + 1)
    captured.release()
    with pytest.raises(RuntimeError, match="has been released"):
        captured.replay()
    with recorder.side_stream():
        recorder.synchronize()
    assert not recorder.is_capturing()
    assert recorder.weak(x) is x


# -- garbage collection -------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_garbage_collector_is_as_it_was(enabled: bool, frozen: bool, fails: bool) -> None:
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count()
    gc.unfreeze()
    try:
        gc.enable() if enabled else gc.disable()
        if frozen:
            gc.freeze()
        before = gc.get_freeze_count() > 0
        with pytest.raises(ZeroDivisionError) if fails else frozen_gc():
            with frozen_gc():
                assert not gc.isenabled()
                assert gc.get_freeze_count() > 0
                gc.enable()  # whatever somebody does inside
                _ = 1 / (0 if fails else 1)
        assert gc.isenabled() is enabled
        assert (gc.get_freeze_count() > 0) is before is frozen
    finally:
        gc.unfreeze()
        if was_frozen:
            gc.freeze()
        gc.enable() if was_enabled else gc.disable()


def test_cycles_go_before_the_collector_rests() -> None:
    import weakref

    class Cycle:
        pass

    one = Cycle()
    one.self = one
    gone = weakref.ref(one)
    del one
    with frozen_gc():
        assert gone() is None
