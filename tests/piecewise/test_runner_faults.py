"""One fault at a time: the right reason, the right numbers, nothing left behind, and a device that works."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from garbage import collect
from piecewise_models import assert_same, check, fault, ops, runner_of

import fxpatch
from compile_configs import load_profile
from fxpatch.errors import BudgetError, BusyError, CaptureFailedError, FxPatchError, InputError
from fxpatch.piecewise.graph_streams import StreamGraphs
from fxpatch.simulator import graph as simulated

FAILED = "compiled: this size could not be captured"
BUDGET = "compiled: the device has no room for the graphs of this size"
PIECES = 4


def model(x: torch.Tensor) -> torch.Tensor:
    """Four graph pieces and three splitting operators."""
    for place in range(PIECES - 1):
        x = ops.fallible(x.sin(), place) + 1
    return x


def on_musa(n: int) -> tuple[torch.Tensor]:
    return (torch.randn(n, 4).to("musa"),)


@pytest.fixture(autouse=True)
def device(musa: str) -> Iterator[None]:
    """Strict; and afterwards as many graphs and bytes as before, and a device that captures."""
    fxpatch.simulate(musa, strict=True)
    collect()
    torch.musa.empty_cache()
    graphs, allocated, reserved = len(simulated._live), torch.musa.memory_allocated(), torch.musa.memory_reserved()
    yield
    fxpatch.simulate(musa, memory=None, max_live_graphs=None, strict=False)
    collect()
    torch.musa.empty_cache()
    assert not torch.musa.is_current_stream_capturing()
    assert torch.musa.current_stream() == torch.musa.default_stream()
    assert len(simulated._live) == graphs
    assert torch.musa.memory_allocated() == allocated
    assert torch.musa.memory_reserved() == reserved
    x = torch.ones(3, device="musa")
    recording = torch.musa.MUSAGraph()
    with torch.musa.graph(recording):
        y = x + 1
    recording.replay()
    assert y.tolist() == [2, 2, 2]
    recording.reset()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`failing(k)`: from now on, the k-th capture raises inside."""
    original = StreamGraphs.capture
    count = iter(range(10**6))

    def fail_at(place: int) -> None:
        def capture(self: Any, call: Callable[[], Any], pool: Any = None) -> Any:
            if next(count) != place:
                return original(self, call, pool)

            def refused() -> None:
                call()
                raise ValueError(f"capture {place} is refused")

            return original(self, refused, pool)

        monkeypatch.setattr(StreamGraphs, "capture", capture)

    return fail_at


# -- captures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(PIECES * 3))
def test_a_capture_that_raises_costs_one_size(failing: Callable[[int], None], place: int) -> None:
    failing(place)
    runner = runner_of(model, graphs="device")
    report = runner.prepare(*on_musa(5))
    size = (8, 4, 2)[place // PIECES]
    assert {row.size: row.way for row in report.sizes} == {
        8: "captured",
        4: "captured",
        2: "captured",
        size: "compiled",
    }
    assert f"ValueError: capture {place} is refused" in next(row.reason for row in report.sizes if row.size == size)
    assert len(simulated._live) == PIECES * 2
    check(runner, model, on_musa, [8, 4, 2, 6, 3, 1])
    assert runner.counts == {"captured": 4, FAILED: 2}


def test_a_capture_that_raises_is_an_error_where_that_was_asked_for(failing: Callable[[int], None]) -> None:
    failing(PIECES + 1)
    runner = runner_of(model, graphs="device", on_error="raise")
    with pytest.raises(CaptureFailedError, match=f"ValueError: capture {PIECES + 1} is refused"):
        runner.prepare(*on_musa(5))
    assert runner.state == "prepare() has failed with CaptureFailedError"
    collect()
    assert not simulated._live
    report = runner.prepare(*on_musa(5))
    assert {row.way for row in report.sizes} == {"captured"}
    check(runner, model, on_musa, [8, 1])


def test_a_device_with_room_for_ten_graphs(musa: str) -> None:
    fxpatch.simulate(musa, max_live_graphs=10)
    runner = runner_of(model, graphs="device")
    report = runner.prepare(*on_musa(5))
    assert {row.size: row.way for row in report.sizes} == {8: "captured", 4: "captured", 2: "compiled"}
    check(runner, model, on_musa, [8, 4, 2, 6, 3, 1])
    assert runner.counts == {"captured": 4, BUDGET: 2}
    runner.release()
    assert not simulated._live


def profile_with(budget: int) -> Any:
    profile = load_profile("musa")
    return dataclasses.replace(profile, capture=dataclasses.replace(profile.capture, budget=budget))


def test_a_budget_prunes_sizes_before_anything_is_captured() -> None:
    runner = runner_of(model, graphs="device", profile=profile_with(10))
    report = runner.prepare(*on_musa(5))
    assert [row.size for row in report.sizes] == [8, 2]
    assert "4 graphs for each size, and the device has room for 10: 2 of 3 sizes" in str(report)
    check(runner, model, on_musa, [8, 4, 2, 1])
    assert runner.counts == {"captured": 4}


def test_a_budget_below_one_size() -> None:
    runner = runner_of(model, graphs="device", profile=profile_with(3))
    assert "4 pieces, each a graph, and a budget of 3 graphs" in str(runner.prepare(*on_musa(5)))
    check(runner, model, on_musa, [8, 3])
    assert runner.counts == {BUDGET: 2}
    strict = runner_of(model, graphs="device", profile=profile_with(3), on_error="raise")
    with pytest.raises(BudgetError, match="4 pieces, each a graph, and a budget of 3 graphs"):
        strict.prepare(*on_musa(5))


def test_no_memory_while_sizes_are_captured(musa: str) -> None:
    def wide(x: torch.Tensor) -> torch.Tensor:
        return ops.functional(x.repeat(1, 64)).sin()[:, :4]

    def make(n: int) -> tuple[torch.Tensor]:
        return (torch.randn(n, 1 << 10).to("musa"),)

    runner = runner_of(wide, graphs="device", sizes=[8, 512])
    given = make(5)
    torch.musa.empty_cache()
    fxpatch.simulate(musa, memory=torch.musa.memory_reserved() + (48 << 20))
    report = runner.prepare(*given)
    assert {row.size: row.way for row in report.sizes} == {512: "compiled", 8: "captured"}
    assert "OutOfMemoryError" in next(row.reason for row in report.sizes if row.size == 512)
    check(runner, wide, make, [8, 3, 9])
    assert runner.counts == {"captured": 2, FAILED: 1}


# -- splitting operators -----------------------------------------------------------------------------------------------


def refuse(size: int) -> Callable[[torch.Tensor], None]:
    def act(x: torch.Tensor) -> None:
        if x.shape[0] == size:
            raise ValueError(f"no {size} rows")

    return act


@pytest.mark.parametrize("place", range(PIECES - 1))
def test_a_splitting_operator_that_raises_during_a_capture(place: int) -> None:
    runner = runner_of(model, graphs="device")
    with fault(place, refuse(4)):
        report = runner.prepare(*on_musa(6))
    assert {row.size: row.way for row in report.sizes} == {8: "captured", 4: "compiled", 2: "captured"}
    assert "while size 4 was run on the example" in str(report)
    assert "ValueError: no 4 rows" in str(report)
    check(runner, model, on_musa, [8, 4, 2, 3])
    assert runner.counts == {"captured": 2, FAILED: 2}
    strict = runner_of(model, graphs="device", on_error="raise")
    with fault(place, refuse(4)), pytest.raises(CaptureFailedError, match="ValueError: no 4 rows"):
        strict.prepare(*on_musa(6))


@pytest.mark.parametrize("place", range(PIECES - 1))
@pytest.mark.parametrize("graphs", ["device", "recorder", "none"])
def test_a_splitting_operator_that_raises_during_a_call(place: int, graphs: str) -> None:
    runner = runner_of(model, graphs=graphs)
    runner.prepare(*on_musa(6))
    with fault(place, refuse(4)):
        check(runner, model, on_musa, [8, 2])
        with pytest.raises(ValueError, match="no 4 rows"):
            runner(*on_musa(4))
    check(runner, model, on_musa, [4, 8, 3])


def test_a_model_that_raises_on_its_example() -> None:
    runner = runner_of(model, graphs="device")
    with fault(0, refuse(6)):
        assert "ValueError: no 6 rows" in str(runner.prepare(*on_musa(6)))
    check(runner, model, on_musa, [6])
    assert runner.counts == {"original: the model could not be traced, split or compiled": 1}


# -- inputs and parameters ---------------------------------------------------------------------------------------------


def cached(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    cache.mul_(0.5).add_(x[:1].sum(0))
    return ops.functional(x) + cache.sum(0)


def test_a_cache_that_has_moved() -> None:
    runner = runner_of(cached, graphs="device")
    cache = torch.ones(3, 4, device="musa")
    runner.prepare(*on_musa(5), cache)
    assert torch.equal(cache.cpu(), torch.ones(3, 4))
    check(runner, lambda x, c: cached(x, c), lambda n: (*on_musa(n), torch.ones(3, 4, device="musa")), [4, 5])
    moved = "compiled: a tensor that is used in place is at another address than when it was captured"
    assert runner.counts == {moved: 2}
    twin = cache.clone()
    for n in (4, 8, 3):
        (x,) = on_musa(n)
        assert_same(runner(x, cache), cached(x, twin))
        assert_same(cache, twin)
    assert runner.counts == {moved: 2, "captured": 3}
    twin = cache.clone().t().contiguous().t()
    (x,) = on_musa(4)
    assert_same(runner(x, twin), cached(x, cache.clone()))


def test_the_same_address_with_other_strides_has_moved() -> None:
    def striped(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.add_(torch.arange(4, device=cache.device))
        return x + cache.sum(0)

    cache = torch.randn(4, 4).to("musa")
    runner = runner_of(striped, graphs="device")
    runner.prepare(*on_musa(5), cache)
    (x,), twin = on_musa(4), cache.clone()
    assert_same(runner(x, cache.t()), striped(x, twin.t()))
    assert_same(cache, twin)
    assert runner.counts["captured"] == 0


def adds_to(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    total.add_(1)
    return ops.functional(x) * 2 + total


def test_inputs_that_share_memory_in_one_call_only() -> None:
    """Copied to buffers of their own, what is written to one would not be read in the other."""
    runner = runner_of(adds_to, graphs="device", dynamic={"x": 0, "total": 0})
    runner.prepare(*on_musa(5), *on_musa(5))
    (x,) = on_musa(4)
    for other in (x, x.clone()):
        twin = x.clone()
        expected = adds_to(twin, twin if other is x else other.clone())
        assert_same(runner(x, other), expected)
        assert_same(x, twin)
    shared = "original: the model writes to an input whose memory another input shares"
    assert runner.counts == {shared: 1, "captured": 1}


def test_caches_that_are_used_in_place_may_share_memory() -> None:
    def two(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys.add_(1)
        values.mul_(2)
        return ops.functional(x) + keys.sum(0) + values.sum(0)

    both = torch.randn(2, 3, 4).to("musa")
    runner = runner_of(two, graphs="device")
    runner.prepare(*on_musa(5), *both)
    (x,), twin = on_musa(4), both.clone()
    assert_same(runner(x, *both), two(x, *twin))
    assert_same(both, twin)
    assert runner.counts == {"captured": 1}


@pytest.mark.parametrize("prepared", [None, torch.bfloat16])
def test_casts_are_those_of_the_call(prepared: torch.dtype | None) -> None:
    """What was traced casts as the example was cast; under another autocast the model itself runs."""
    weight = torch.randn(4, 4).to("musa")

    def product(x: torch.Tensor) -> torch.Tensor:
        return ops.functional(x @ weight)

    def under(dtype: torch.dtype | None, call: Callable[..., Any], *args: Any) -> Any:
        with torch.autocast("musa", dtype=dtype, enabled=dtype is not None):
            return call(*args)

    runner = runner_of(product, graphs="device")
    under(prepared, runner.prepare, *on_musa(5))
    (x,) = on_musa(4)
    for dtype in (None, torch.bfloat16, torch.float16):
        found, expected = under(dtype, runner, x), under(dtype, product, x)
        assert found.dtype is expected.dtype is (dtype or torch.float32)
        assert_same(found, expected)
    assert runner.counts == {"captured": 1, "original: it is under another autocast than prepare() was": 2}


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.functional(self.linear(x)) + self.linear.weight[0]


def test_weights_that_are_written_need_nothing_and_weights_that_are_replaced_are_found() -> None:
    weighted = Weighted().to("musa")
    runner = runner_of(weighted, graphs="device")
    runner.prepare(*on_musa(5))
    with torch.no_grad():
        weighted.linear.weight.mul_(2)
    assert runner.check_parameters() == []
    check(runner, weighted, on_musa, [4, 3])
    weighted.linear.weight = torch.nn.Parameter(torch.randn(4, 4).to("musa"))
    assert runner.check_parameters() == ["linear.weight"]
    runner.recapture()
    assert runner.check_parameters() == []
    check(runner, weighted, on_musa, [8, 4, 3])
    assert set(runner.counts) == {"captured"}


def test_weights_of_another_dtype_are_refused() -> None:
    weighted = Weighted().to("musa")
    runner = runner_of(weighted, graphs="device")
    runner.prepare(*on_musa(5))
    weighted.half()
    with pytest.raises(
        InputError, match=r"(?s)parameters are not those .*linear.weight: torch.float16.*prepare\(\) again"
    ):
        runner.recapture()


def test_data_that_was_exchanged_is_found() -> None:
    weighted = Weighted().to("musa")
    runner = runner_of(weighted, graphs="device")
    runner.prepare(*on_musa(5))
    (x,) = on_musa(4)
    before = runner(x).clone()
    weighted.linear.weight.data = torch.randn(4, 4).to("musa")
    collect()
    others = [torch.zeros(4, 4, device="musa") for _ in range(20)]
    assert runner.check_parameters() == ["linear.weight"]
    assert_same(runner._made.prepared.replay(4, [x], 4), before)  # type: ignore[union-attr]
    runner.recapture()
    del others
    check(runner, weighted, on_musa, [4, 8])


def test_tied_weights_that_were_untied_are_refused() -> None:
    weighted = Weighted()
    weighted.other = weighted.linear.weight  # type: ignore[assignment]
    runner = runner_of(weighted)
    runner.prepare(torch.randn(5, 4))
    weighted.linear.weight = torch.nn.Parameter(torch.randn(4, 4))
    with pytest.raises(InputError, match="shared by the same names"):
        runner.recapture()


def test_release_and_recapture() -> None:
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    allocated = torch.musa.memory_reserved()
    runner.release()
    torch.musa.empty_cache()
    assert not simulated._live
    assert torch.musa.memory_reserved() < allocated
    check(runner, model, on_musa, [8, 3])
    assert runner.counts == {"compiled: the graphs have been released": 2}
    for _ in range(3):
        runner.recapture()
        assert len(simulated._live) == PIECES * 3
    check(runner, model, on_musa, [8, 3])
    assert runner.counts == {"compiled: the graphs have been released": 2, "captured": 2}


# -- who calls ---------------------------------------------------------------------------------------------------------


def test_a_call_inside_another_capture_runs_the_model() -> None:
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    (x,) = on_musa(4)
    recording = torch.musa.MUSAGraph()
    with torch.musa.graph(recording):
        y = runner(x)
    recording.replay()
    assert_same(y, model(x))
    assert runner.counts == {"original: the caller is capturing a graph itself": 1}
    recording.reset()
    check(runner, model, on_musa, [8, 3])


def test_two_threads_at_once() -> None:
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    inside, done = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []
    (x,) = on_musa(4)

    def wait(_: torch.Tensor) -> None:
        inside.set()
        assert done.wait(20)

    with fault(1, wait):
        other = threading.Thread(target=lambda: found.append(runner(x)))
        other.start()
        assert inside.wait(20)
        for act in (lambda: runner(x), lambda: runner.prepare(x), runner.release, runner.recapture):
            with pytest.raises(BusyError, match="a call while another thread is in it"):
                act()
        done.set()
        other.join(20)
    assert_same(found[0], model(x))
    check(runner, model, on_musa, [8, 3])


@pytest.mark.parametrize("answers", [[True, False, True], [False, False, False]])
def test_another_rank_cannot_capture_a_size(answers: list[bool]) -> None:
    asked: list[bool] = []

    def agree(ok: bool) -> bool:
        asked.append(ok)
        return ok and (len(asked) <= before or answers[len(asked) - before - 1])

    before = 10**6
    runner = runner_of(model, graphs="device", agree=agree)
    runner.prepare(*on_musa(5))
    before = len(asked) - 3  # the last three are about the sizes
    asked.clear()
    report = runner.prepare(*on_musa(5))
    assert asked == [True] * (before + 3)
    assert [row.way for row in report.sizes] == ["captured" if each else "compiled" for each in answers]
    assert len(simulated._live) == PIECES * sum(answers)
    check(runner, model, on_musa, [8, 4, 2])
    assert runner.counts["compiled: another rank could not prepare this"] == answers.count(False)


def test_another_rank_cannot_prepare() -> None:
    runner = runner_of(model, graphs="device", agree=lambda ok: False)
    assert "Another rank could not prepare this." in str(runner.prepare(*on_musa(5)))
    check(runner, model, on_musa, [8, 3])
    assert runner.counts == {"original: the model could not be traced, split or compiled": 2}


def test_another_rank_fails_where_that_is_an_error() -> None:
    runner = runner_of(model, graphs="device", agree=lambda ok: False, on_error="raise")
    with pytest.raises(FxPatchError, match="Another rank could not prepare this"):
        runner.prepare(*on_musa(5))


def test_nothing_is_traced_once_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"], torch._dynamo.utils.counters["frames"]["total"]
    monkeypatch.setattr(torch._dynamo.convert_frame, "trace_frame", None)
    check(runner, model, on_musa, [8, 1, 3, 9])
    assert frames == (
        torch._dynamo.utils.counters["stats"]["unique_graphs"],
        torch._dynamo.utils.counters["frames"]["total"],
    )


def test_a_model_is_prepared_any_number_of_times_and_forgotten() -> None:
    gone = []
    for _ in range(12):  # Dynamo gives up on code that it has traced eight times
        weighted = Weighted().to("musa")
        runner = runner_of(weighted, graphs="device")
        assert {row.way for row in runner.prepare(*on_musa(5)).sizes} == {"captured"}
        gone.append(weakref.ref(weighted))
    del weighted, runner
    collect()
    assert [each() for each in gone] == [None] * 12
