"""What belongs to a capture, and what a device refuses while it lasts: streams, events, threads, CUDA's error codes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxpatch.simulator import Graph, capturing
from fxpatch.simulator.capture import CaptureError

CODES = {
    900: "operation not permitted when stream is capturing",
    901: "operation failed due to a previous error during capture",
    903: "capture was not ended in the same stream as it began",
    904: "capturing stream has unjoined work",
    905: "dependency created on uncaptured work in another stream",
    906: "operation would make the legacy stream depend on a capturing blocking stream",
    907: "operation not permitted on an event last recorded in a capturing stream",
    908: "attempt to terminate a thread-local capture sequence from another thread",
}


@pytest.fixture
def graph(musa: str) -> Graph:
    """An empty graph."""
    made: Graph = torch.musa.MUSAGraph()
    return made


@pytest.fixture
def x(musa: str) -> torch.Tensor:
    return torch.ones(3, device=musa)


@pytest.fixture(autouse=True)
def no_capture_is_left_open(musa: str) -> Any:
    yield
    assert capturing() is None
    assert not torch.musa.is_current_stream_capturing()
    assert torch.musa.current_stream() == torch.musa.default_stream()


def code_of(work: Callable[[], object]) -> int:
    """The code of the error that `work` raises, whose text is CUDA's for that code."""
    with pytest.raises(torch.AcceleratorError) as caught:
        work()
    error = caught.value
    assert isinstance(error, CaptureError)
    assert str(error).startswith(f"MUSA error: {CODES[error.error_code]}: ")
    return error.error_code


def in_thread(work: Callable[[], object]) -> None:
    """Runs `work` in a thread of its own, and raises what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def spoils(graph: Graph, within: Callable[[], object]) -> tuple[int, int]:
    """The codes of `within`, whose error the program swallows, and of the capture's end; the graph is left empty."""
    with torch.musa.stream(torch.musa.Stream()):
        graph.capture_begin()
        first = code_of(within)
        second = code_of(graph.capture_end)
    assert graph.launches == 0
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        graph.replay()
    return first, second


# -- begin and end --------------------------------------------------------------------------------


def test_a_capture_begins_off_the_default_stream(graph: Graph, x: torch.Tensor) -> None:
    for begin in (graph.capture_begin, lambda: torch.musa.graph(graph, stream=torch.musa.default_stream()).__enter__()):
        with pytest.raises(RuntimeError, match="must be captured on a non-default stream: use the context manager"):
            begin()
    assert (x + 1).tolist() == [2, 2, 2]


def test_begin_and_end_by_hand(graph: Graph, x: torch.Tensor) -> None:
    with torch.musa.stream(torch.musa.Stream()) as stream:
        graph.capture_begin()
        assert stream.is_capturing()
        assert capturing() is graph
        y = x + 1
        graph.capture_end()
        assert not stream.is_capturing()
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_a_stream_of_the_users(graph: Graph, x: torch.Tensor) -> None:
    stream = torch.musa.Stream()
    with torch.musa.graph(graph, stream=stream):
        assert torch.musa.current_stream() == stream
        y = x + 1
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_the_graph_may_be_named_after_the_device(graph: Graph) -> None:
    with torch.musa.graph(musa_graph=graph):
        pass
    for wrong in ({}, {"cuda_graph": graph}, {"musa_graph": graph, "more": graph}):
        with pytest.raises(TypeError, match="first or as musa_graph="):
            torch.musa.graph(**wrong)
    with pytest.raises(TypeError, match="captures into a MUSAGraph, not 3"):
        torch.musa.graph(3)


def test_a_second_end_is_an_error(graph: Graph, x: torch.Tensor) -> None:
    with torch.musa.graph(graph):
        y = x + 1
    with pytest.raises(RuntimeError, match="this graph is not being captured"):
        graph.capture_end()
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_captures_do_not_nest(graph: Graph, x: torch.Tensor) -> None:
    inner = torch.musa.MUSAGraph()

    def enter() -> None:
        with torch.musa.graph(inner):
            raise AssertionError

    assert spoils(graph, enter) == (900, 901)  # the context manager synchronizes first
    with torch.musa.stream(torch.musa.Stream()):
        graph.capture_begin()
        assert code_of(inner.capture_begin) == 900
        y = x + 1  # a refused begin is no fault of the first capture
        graph.capture_end()
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_one_capture_at_a_time_in_a_process(graph: Graph, x: torch.Tensor) -> None:
    other = torch.musa.MUSAGraph()

    def begin() -> None:
        with torch.musa.stream(torch.musa.Stream()):
            other.capture_begin()

    with torch.musa.graph(graph):
        y = x + 1
        assert code_of(lambda: in_thread(begin)) == 900
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_it_ends_on_the_stream_where_it_began(graph: Graph) -> None:
    other = torch.musa.Stream()

    def end_elsewhere() -> None:
        with torch.musa.graph(graph):
            torch.musa.set_stream(other)

    assert code_of(end_elsewhere) == 903
    assert graph.launches == 0


def test_it_ends_in_the_thread_where_it_began(graph: Graph, x: torch.Tensor) -> None:
    stream = torch.musa.Stream()

    def end() -> None:
        with stream:
            graph.capture_end()

    for mode in ("global", "thread_local", "relaxed"):
        with stream:
            graph.capture_begin(capture_error_mode=mode)
            y = x + 1
        if mode == "relaxed":
            in_thread(end)
            graph.replay()
            assert y.tolist() == [2, 2, 2]
        else:
            assert code_of(lambda: in_thread(end)) == 908


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_body_arrives_as_it_is(graph: Graph, x: torch.Tensor, error: type[BaseException]) -> None:
    def body() -> None:
        with torch.musa.graph(graph):
            x + 1
            raise error("mine")

    with pytest.raises(error, match="mine"):
        body()
    assert graph.launches == 0
    with torch.musa.graph(graph):
        y = x + 1
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_reset_ends_a_capture_and_empties_a_graph(graph: Graph, x: torch.Tensor) -> None:
    with torch.musa.stream(torch.musa.Stream()):
        graph.capture_begin()
        x.add_(1)
        graph.reset()
    assert (x + 1).tolist() == [2, 2, 2]
    for _ in range(2):
        graph.reset()
        with pytest.raises(RuntimeError, match="nothing has been captured"):
            graph.replay()
    with torch.musa.graph(graph):
        x.add_(1)
    graph.replay()
    assert x.tolist() == [2, 2, 2]


# -- what spoils it -------------------------------------------------------------------------------

SPOILING: dict[str, tuple[int, Callable[[torch.Tensor], object]]] = {
    "a host read": (900, lambda x: x[0].item()),
    "a copy to the host": (900, lambda x: x.cpu()),
    "a copy from the host": (900, lambda x: x.copy_(torch.ones(3))),
    "a shape that depends on data": (900, lambda x: x.nonzero()),
    "synchronizing the device": (900, lambda x: torch.musa.synchronize()),
    "synchronizing through torch.accelerator": (900, lambda x: torch.accelerator.synchronize()),
    "synchronizing the stream": (900, lambda x: torch.musa.current_stream().synchronize()),
    "asking the stream": (900, lambda x: torch.musa.current_stream().query()),
    "synchronizing an event": (907, lambda x: torch.musa.current_stream().record_event().synchronize()),
    "asking an event": (907, lambda x: torch.musa.current_stream().record_event().query()),
    "an event from outside": (905, lambda x: torch.musa.default_stream().record_event().wait()),
    "the work of the default stream": (
        905,
        lambda x: torch.musa.current_stream().wait_stream(torch.musa.default_stream()),
    ),
    "the default stream waiting": (
        906,
        lambda x: torch.musa.default_stream().wait_stream(torch.musa.current_stream()),
    ),
}


@pytest.mark.parametrize("what", SPOILING)
def test_what_is_refused_spoils_the_capture(graph: Graph, x: torch.Tensor, what: str) -> None:
    code, work = SPOILING[what]
    assert spoils(graph, lambda: work(x)) == (code, 901)
    work(x)  # outside it is fine


def test_a_replay_within_a_capture(graph: Graph, x: torch.Tensor) -> None:
    other = torch.musa.MUSAGraph()
    with torch.musa.graph(other):
        x + 1
    assert spoils(graph, other.replay) == (900, 901)


def test_times_of_captured_events(graph: Graph) -> None:
    start, end = torch.musa.Event(enable_timing=True), torch.musa.Event(enable_timing=True)
    start.record()

    def ask() -> None:
        end.record()
        start.elapsed_time(end)

    assert spoils(graph, ask) == (907, 901)
    with pytest.raises(RuntimeError, match="both events must have been recorded, outside a graph"):
        start.elapsed_time(end)


def test_a_spoiled_capture_takes_nothing_more(graph: Graph, x: torch.Tensor) -> None:
    def swallow() -> None:
        assert code_of(lambda: x.sum().item()) == 900
        x + 1

    assert spoils(graph, swallow) == (901, 901)


# -- streams --------------------------------------------------------------------------------------


def test_a_side_stream_that_forks_and_joins_is_recorded(graph: Graph, x: torch.Tensor) -> None:
    side = torch.musa.Stream()
    with torch.musa.graph(graph):
        y = x + 1
        side.wait_stream(torch.musa.current_stream())
        assert side.is_capturing()
        with side:
            z = y * 10
        w = y * 100
        torch.musa.current_stream().wait_stream(side)
        total = z + w
    assert not side.is_capturing()
    assert graph.launches == 4
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert total.tolist() == [110 * (value + 1)] * 3


def test_forks_by_events_and_through_other_streams(graph: Graph, x: torch.Tensor) -> None:
    first, second = torch.musa.Stream(), torch.musa.Stream()
    with torch.musa.graph(graph):
        torch.musa.current_stream().record_event(forked := torch.musa.Event())
        first.wait_event(forked)
        with first:
            y = x + 1
            half_way = first.record_event()
        second.wait_event(half_way)
        with second:
            z = y * 2
        second.record_event().wait(torch.musa.current_stream())  # which brings what second had waited for, too
    graph.replay()
    assert z.tolist() == [4, 4, 4]


def test_an_unjoined_side_stream(graph: Graph, x: torch.Tensor) -> None:
    side = torch.musa.Stream()

    def fork(joined_too_early: bool) -> None:
        with torch.musa.graph(graph):
            side.wait_stream(torch.musa.current_stream())
            if joined_too_early:
                torch.musa.current_stream().wait_stream(side)
            with side:
                x + 1

    for joined_too_early in (False, True):
        with pytest.raises(CaptureError, match=f"wait on the capturing stream for stream {side.stream_id}") as caught:
            fork(joined_too_early)
        assert caught.value.error_code == 904
        assert graph.launches == 0


def test_waiting_for_less_undoes_no_join(graph: Graph, x: torch.Tensor) -> None:
    side = torch.musa.Stream()
    with torch.musa.graph(graph):
        side.wait_stream(torch.musa.current_stream())
        with side:
            early = side.record_event()
            y = x + 1
            late = side.record_event()
        late.wait()
        early.wait()
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_a_stream_that_is_not_part_of_it_runs_at_once(graph: Graph, x: torch.Tensor) -> None:
    other = torch.musa.Stream()
    with torch.musa.graph(graph):
        y = x + 1
        with other:
            assert capturing() is None
            z = x + 5
            assert z.cpu().tolist() == [6, 6, 6]
            other.synchronize()
            assert other.record_event().query()
        assert capturing() is graph
    assert graph.launches == 1
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_events_of_a_capture_that_is_over_hold_nobody_up(graph: Graph, x: torch.Tensor) -> None:
    event, other = torch.musa.Event(), torch.musa.MUSAGraph()
    with torch.musa.graph(graph):
        x + 1
        event.record()
    event.wait()
    event.synchronize()
    with torch.musa.graph(other):
        event.wait()
        y = x + 2
    other.replay()
    assert y.tolist() == [3, 3, 3]


def test_external_events_happen_at_each_replay(graph: Graph, x: torch.Tensor) -> None:
    start, end = (torch.musa.Event(enable_timing=True, external=True) for _ in range(2))
    outside = torch.musa.Event(external=True)
    outside.record()
    with torch.musa.graph(graph):
        outside.wait()
        start.record()
        x.add_(1)
        end.record()
    assert graph.launches == 3
    with pytest.raises(RuntimeError, match="both events must have been recorded"):
        start.elapsed_time(end)
    graph.replay()
    first = start.elapsed_time(end)
    assert first > 0
    end.synchronize()
    start.record()
    assert start.elapsed_time(end) < 0
    graph.replay()
    assert start.elapsed_time(end) > 0


# -- threads --------------------------------------------------------------------------------------


def test_other_threads_run_at_once(graph: Graph, x: torch.Tensor) -> None:
    results: dict[str, Any] = {}

    def work() -> None:
        results["capturing"] = capturing()
        results["sum"] = (x + 1).sum().item()
        weight = torch.ones(3, device=x.device, requires_grad=True)
        (weight * weight * 3).sum().backward()  # in a thread of autograd's, for this one
        results["grad"] = weight.grad.tolist()

    with torch.musa.graph(graph):
        y = x + 1
        in_thread(work)
    assert results == {"capturing": None, "sum": 6, "grad": [6, 6, 6]}
    assert graph.launches == 1
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_a_backward_within_a_capture_is_recorded(graph: Graph, x: torch.Tensor) -> None:
    weight = torch.full((3,), 2.0, device=x.device, requires_grad=True)
    with torch.musa.graph(graph):
        (gradient,) = torch.autograd.grad((weight * weight * x).sum(), weight)
    assert gradient.isnan().all()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert gradient.tolist() == [4 * value] * 3


def test_another_thread_that_synchronizes_the_device_spoils_it(graph: Graph) -> None:
    assert spoils(graph, lambda: in_thread(torch.musa.synchronize)) == (900, 901)


def test_threads_that_take_turns(musa: str) -> None:
    lock, errors = threading.Lock(), []

    def work(number: int) -> None:
        try:
            x = torch.full((10,), float(number), device=musa)
            for _ in range(10):
                g = torch.musa.MUSAGraph()
                with lock, torch.musa.graph(g, stream=torch.musa.Stream()):
                    y = (x * 2).add_(1)
                g.replay()
                assert y.eq(2 * number + 1).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
