"""Streams and events outside captures: whose stream is current, what waits for what, times that say what they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    assert results, "the thread raised"
    return results[0]


@pytest.fixture
def side(musa: str) -> torch.Stream:
    """A stream that is not the default one."""
    made: torch.Stream = torch.musa.Stream()
    return made


# -- the current stream ---------------------------------------------------------------------------


def test_streams_have_identities(musa: str, side: torch.Stream) -> None:
    default = torch.musa.default_stream()
    assert torch.musa.current_stream() == default == torch.musa.default_stream(torch.device(musa, 0))
    assert side != default
    assert side != torch.musa.Stream()
    assert len({side, default, torch.musa.Stream(device="musa:0"), torch.musa.Stream(0, priority=-1)}) == 4
    assert isinstance(side, torch.Stream)
    assert side.device == torch.device(musa, 0)
    for wrong, error in (("musa:1", RuntimeError), (1, RuntimeError), ("cpu", ValueError)):
        with pytest.raises(error):
            torch.musa.Stream(wrong)
        with pytest.raises(error):
            torch.musa.current_stream(wrong)


def test_contexts_nest_and_come_back(musa: str, side: torch.Stream) -> None:
    other, default = torch.musa.Stream(), torch.musa.default_stream()
    with torch.musa.stream(side):
        assert torch.musa.current_stream() == side
        with other:
            assert torch.musa.current_stream() == other
            with side, torch.musa.stream(None):
                assert torch.musa.current_stream() == side
            assert torch.musa.current_stream() == other
        assert torch.musa.current_stream() == side
    assert torch.musa.current_stream() == default
    with pytest.raises(KeyError), side:
        raise KeyError
    with pytest.raises(KeyError), torch.musa.stream(side):
        raise KeyError
    assert torch.musa.current_stream() == default


def test_set_stream(musa: str, side: torch.Stream) -> None:
    def work() -> list[torch.Stream]:
        torch.musa.set_stream(side)
        torch.musa.set_stream(None)
        with torch.musa.stream(torch.musa.default_stream()):
            inner = torch.musa.current_stream()
        return [inner, torch.musa.current_stream()]

    assert in_thread(work) == [torch.musa.default_stream(), side]
    assert torch.musa.current_stream() == torch.musa.default_stream()


def test_each_thread_has_its_own(musa: str, side: torch.Stream) -> None:
    with side:
        assert in_thread(torch.musa.current_stream) == torch.musa.default_stream()


def test_one_stream_object_serves_two_threads(musa: str, side: torch.Stream) -> None:
    mine, inside, leave = torch.musa.Stream(), threading.Event(), threading.Event()
    after: list[torch.Stream] = []

    def work() -> None:
        torch.musa.set_stream(mine)
        with side:
            inside.set()
            leave.wait()
        after.append(torch.musa.current_stream())

    thread = threading.Thread(target=work)
    with side:
        thread.start()
        inside.wait()
    assert torch.musa.current_stream() == torch.musa.default_stream()
    leave.set()
    thread.join()
    assert after == [mine]


def test_backward_runs_on_the_stream_of_its_caller(musa: str, side: torch.Stream) -> None:
    seen: list[tuple[str, torch.Stream]] = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append((threading.current_thread().name, torch.musa.current_stream()))
            return grad

    x = torch.ones(2, device=musa, requires_grad=True)
    with side:
        Note.apply(x).sum().backward()
    Note.apply(x).sum().backward()
    assert [stream for _, stream in seen] == [side, torch.musa.default_stream()]
    assert seen[0][0] != threading.current_thread().name  # as on every accelerator: a thread of autograd's


# -- order and events -----------------------------------------------------------------------------


def test_all_that_was_launched_has_happened(musa: str, side: torch.Stream) -> None:
    x = torch.zeros(1000, device=musa)
    with side:
        x.add_(1)
        event = side.record_event()
    assert isinstance(event, torch.Event)
    assert event.query()
    assert side.query()
    event.wait()
    event.synchronize()
    side.synchronize()
    torch.musa.current_stream().wait_stream(side)
    torch.musa.current_stream().wait_event(event)
    side.wait_event(torch.musa.Event())  # never recorded
    assert side.record_event(event) is event
    torch.musa.synchronize()
    x.record_stream(side)
    assert x.eq(1).all()
    assert not side.is_capturing()


def test_times_are_the_hosts_and_say_so(musa: str, side: torch.Stream) -> None:
    start, end = torch.musa.Event(enable_timing=True), torch.musa.Event(enable_timing=True)
    before = time.perf_counter()
    start.record()
    time.sleep(0.02)
    end.record(side)
    upper = (time.perf_counter() - before) * 1000
    took = start.elapsed_time(end)
    assert 20 <= took <= upper
    assert isinstance(took, float)
    assert f"{took}" == str(took) == repr(took) == f"{float(took):.3f} (simulated: milliseconds of the host)"
    assert end.elapsed_time(start) == -took
    start.record()
    assert start.elapsed_time(end) < 0


def test_what_has_no_time(musa: str) -> None:
    timed, untimed = torch.musa.Event(enable_timing=True), torch.musa.Event()
    timed.record()
    untimed.record()
    for a, b in ((timed, untimed), (untimed, timed), (untimed, untimed)):
        with pytest.raises(RuntimeError, match="both events must have been created with enable_timing=True"):
            a.elapsed_time(b)
    with pytest.raises(RuntimeError, match="both events must have been recorded"):
        timed.elapsed_time(torch.musa.Event(enable_timing=True))


def test_torchs_own_streams_mean_the_default_one(musa: str) -> None:
    stream = torch.Stream(musa)
    assert stream.device == torch.device(musa, 0)
    assert stream == torch.accelerator.current_stream()
    event = stream.record_event()
    event.wait(stream)
    stream.synchronize()
    assert stream.query()
    with pytest.raises(RuntimeError, match="Backend doesn't support synchronizing events"):
        event.synchronize()  # torch's own: a device in Python cannot answer it
    with stream:
        assert torch.ones(2, device=musa).sum() == 2
