"""shadow=N: the first calls run eagerly as well. What differs is told, returned right, and steps down; nothing is
written twice; and after N calls nothing is left of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from piecewise_models import assert_same, check, fault, ops, runner_of
from torch import nn

import fxpatch
from fxpatch.errors import FxPatchWarning, OptionError
from fxpatch.piecewise.runner import PiecewiseRunner
from fxpatch.piecewise.shadow import AGREES, DIFFERS, RANDOM

REPLAY = "compiled: a replay gave other results than eager, and the compiled pieces did not"
PIECES = "original: the compiled pieces gave other results than eager"


@pytest.fixture(autouse=True)
def strict_device(musa: str) -> Iterator[None]:
    fxpatch.simulate(musa, memory=None, max_live_graphs=None, strict=True)
    yield
    fxpatch.simulate(musa, strict=False)


class Cached(nn.Module):
    """Adds each row to a cache of the caller's and to one of its own, and counts its calls; the last two would show a
    call that is made twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.add_(x.sum(0))
        self.seen.add_(x.tanh().sum(0))
        self.calls.add_(1)
        out = torch.empty_like(x)
        ops.out(x, x, out)
        return out + cache + self.seen


def given(n: int, device: str = "musa") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 4).to(device), torch.zeros(4, device=device)


def row(x: torch.Tensor) -> torch.Tensor:
    return ops.functional(x.sin()) + 1


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on graphs read what an earlier call has left in their input buffers."""

    def now() -> None:
        for captured in found[-1]._made.prepared.captured.values():
            captured.fill = lambda leaves, n: None

    found: list[PiecewiseRunner] = []
    original = PiecewiseRunner.prepare

    def prepare(self: PiecewiseRunner, *args: Any, **kwargs: Any) -> Any:
        found.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PiecewiseRunner, "prepare", prepare)
    return now


@pytest.mark.parametrize("graphs", ["device", "recorder", "none"])
def test_a_right_runner_agrees_and_writes_once(graphs: str) -> None:
    model, twin = Cached().to("musa"), Cached().to("musa")
    runner = runner_of(model, graphs=graphs, shadow=4)
    x, cache = given(8)
    runner.prepare(x, cache)
    for n in (8, 4, 3, 1, 8, 5):
        one, other = given(n)[0], cache.clone()
        with torch.no_grad():
            expected = twin(one, other)
        assert_same(runner(one, cache), expected)
        assert_same(cache, other)
        assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert model.calls.item() == 6
    assert runner.counts[AGREES] == 4
    assert runner.counts[DIFFERS] == 0


def test_nothing_is_left_of_it_after_the_calls() -> None:
    runner, plain = runner_of(row, graphs="device", shadow=2), runner_of(row, graphs="device")
    for each in (runner, plain):
        each.prepare(torch.randn(8, 4).to("musa"))
    assert runner._run != runner._ladder.run
    for _ in range(2):
        runner(torch.randn(8, 4).to("musa"))
    assert (runner._run, plain._run) == (runner._ladder.run, plain._ladder.run)
    assert vars(runner).keys() == vars(plain).keys()
    assert {type(step) for step in runner._made.prepared.captured[8].plan.steps} == {
        type(step) for step in plain._made.prepared.captured[8].plan.steps
    }
    runner(torch.randn(8, 4).to("musa"))
    assert runner.counts == {"captured": 3, AGREES: 2}


def test_a_replay_that_reads_stale_memory_steps_down_to_the_pieces(stale: Callable[[], None]) -> None:
    runner = runner_of(row, graphs="device", shadow=8)
    runner.prepare(torch.randn(8, 4).to("musa"))
    stale()
    x = torch.randn(4, 4).to("musa")
    with pytest.warns(FxPatchWarning, match=r"a replay gave other results than eager.*n = 4, captured.*model's own"):
        assert_same(runner(x), row(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        for n in (4, 3, 2, 7):
            x = torch.randn(n, 4).to("musa")
            assert_same(runner(x), row(x))
    assert runner.counts == {"captured": 3, DIFFERS: 3, AGREES: 2, REPLAY: 2}
    assert {each.way for each in runner.report.sizes} == {"compiled"}
    assert "elements differ" in next(each.reason for each in runner.report.sizes if each.size == 4)
    assert any(note.startswith("shadow: size 4: a replay gave other results") for note in runner.report.notes)


def wrong_compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """Right for two rows, wrong for more."""

    def run(*args: Any) -> Any:
        results = gm(*args)
        return tuple(
            each * 1.001 if isinstance(each, torch.Tensor) and each.dim() and each.shape[0] > 2 else each
            for each in results
        )

    return run


@pytest.mark.parametrize("graphs", ["recorder", "none"])
def test_pieces_that_are_wrong_step_down_to_the_original_function(graphs: str) -> None:
    runner = runner_of(row, graphs=graphs, compiler=wrong_compiler, shadow=4)
    runner.prepare(torch.randn(8, 4))
    x = torch.randn(8, 4)
    with pytest.warns(FxPatchWarning, match="the compiled pieces gave other results than eager"):
        assert_same(runner(x), row(x))
    for n in (8, 6, 2):
        x = torch.randn(n, 4)
        assert_same(runner(x), row(x))
    assert runner.counts[DIFFERS] == 1
    assert runner.counts[AGREES] == 1
    assert runner.counts[PIECES] == 2
    assert {each.size: each.way for each in runner.report.sizes}[8] == "original"
    runner.release()
    x = torch.randn(8, 4)
    assert_same(runner(x), row(x))  # what is known of the pieces stays known
    assert runner.counts[PIECES] == 3


def test_what_is_above_all_sizes_steps_down_too() -> None:
    runner = runner_of(row, graphs="recorder", sizes=[2], compiler=wrong_compiler, shadow=2)
    runner.prepare(torch.randn(8, 4))
    x = torch.randn(5, 4)
    with pytest.warns(FxPatchWarning, match="pieces gave other results"):
        assert_same(runner(x), row(x))
    assert_same(runner(x), row(x))
    assert runner.counts[PIECES] == 1
    assert any("what is above all sizes" in note for note in runner.report.notes)


def test_a_wrong_write_is_a_difference_and_is_mended() -> None:
    class Doubled(Cached):
        """Its compiled form adds to the cache twice."""

    def twice(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            results = gm(*args)
            for each in args:
                if isinstance(each, torch.Tensor) and each.shape == (4,):
                    each.add_(1)
            return results

        return run

    model, twin = Doubled(), Doubled()
    runner = runner_of(model, graphs="none", compiler=twice, shadow=1)
    x, cache = given(4, "cpu")
    runner.prepare(x, cache)
    with pytest.warns(FxPatchWarning, match=r"what is written to|elements differ"):
        found = runner(x, cache)
    other = torch.zeros(4)
    with torch.no_grad():
        assert_same(found, twin(x, other))
    assert_same(cache, other)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_a_way_that_raises_is_a_way_that_differs() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return ops.fallible(x.sin(), 0) + 1

    runner = runner_of(model, graphs="none", shadow=2)
    x = torch.randn(4, 4)
    runner.prepare(x)
    tries = iter(range(10))

    def once(_: torch.Tensor) -> None:
        if next(tries) == 0:
            raise RuntimeError("out of luck")

    with fault(0, once), pytest.warns(FxPatchWarning, match="out of luck"):
        assert_same(runner(x), x.sin() * 1.5 + 1)
    assert runner.counts[DIFFERS] == 1


def test_what_the_model_raises_is_raised_once() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return ops.fallible(x.sin(), 0) + 1

    runner = runner_of(model, graphs="none", shadow=2)
    x = torch.randn(4, 4)
    runner.prepare(x)

    def always(_: torch.Tensor) -> None:
        raise RuntimeError("the model's own")

    with fault(0, always), pytest.raises(RuntimeError, match="the model's own"):
        runner(x)
    assert runner.counts[DIFFERS] == 0
    assert_same(runner(x), x.sin() * 1.5 + 1)


def test_random_numbers_are_the_same_in_both_runs() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)

    runner = runner_of(model, graphs="none", shadow=2)
    x = torch.randn(4, 4)
    runner.prepare(x)
    torch.manual_seed(3)
    found = runner(x)
    torch.manual_seed(3)
    assert_same(found, model(x))
    after = torch.rand(1)
    torch.manual_seed(3)
    runner(x)
    assert torch.rand(1) == after  # as many are drawn as by one call
    assert runner.counts[AGREES] == 2


def test_a_compiler_that_draws_otherwise_is_not_blamed() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)

    def drawing(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            torch.rand(1)
            return gm(*args)

        return run

    runner = runner_of(model, graphs="none", compiler=drawing, split=[], shadow=1, sizes=[2, 4])

    x = torch.randn(4, 4)
    runner.prepare(x)
    runner(x)
    assert runner.counts[RANDOM] + runner.counts[AGREES] == 1
    assert runner.counts[DIFFERS] == 0


def test_calls_that_run_eagerly_anyway_do_not_count() -> None:
    runner = runner_of(row, graphs="recorder", shadow=1)
    runner.prepare(torch.randn(8, 4))
    runner(torch.randn(0, 4))
    runner(torch.randn(9, 4))
    assert runner._run != runner._ladder.run
    runner(torch.randn(8, 4))
    assert runner._run == runner._ladder.run


def test_recapture_begins_anew(stale: Callable[[], None]) -> None:
    runner = runner_of(row, graphs="device", shadow=1)
    runner.prepare(torch.randn(8, 4).to("musa"))
    stale()
    with pytest.warns(FxPatchWarning):
        runner(torch.randn(8, 4).to("musa"))
    runner.recapture()
    assert {each.way for each in runner.report.sizes} == {"captured"}
    x = torch.randn(8, 4).to("musa")
    assert_same(runner(x), row(x))
    assert runner.counts[AGREES] == 1


class Ranks:
    """Another rank, asked along with this one: its answers are given."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, ok: bool) -> bool:
        self.asked.append(ok)
        return ok and (self.answers.pop(0) if self.answers else True)


def test_ranks_step_down_together() -> None:
    ranks = Ranks()
    runner = runner_of(row, graphs="recorder", shadow=2, agree=ranks)
    runner.prepare(torch.randn(8, 4))
    ranks.asked.clear()
    ranks.answers = [True, False, True]  # comparable there; differs there; its pieces agree
    x = torch.randn(8, 4)
    with pytest.warns(FxPatchWarning, match="on another rank"):
        assert_same(runner(x), row(x))
    assert ranks.asked == [True, True, True]
    assert {each.size: each.way for each in runner.report.sizes}[8] == "compiled"
    ranks.answers = [False]  # the other rank runs the original function: nobody runs it twice
    ranks.asked.clear()
    x = torch.randn(4, 4)
    assert_same(runner(x), row(x))
    assert ranks.asked == [True]
    ranks.asked.clear()
    runner(x)
    assert ranks.asked == [True, True]


@pytest.mark.parametrize("wrong", [-1, True, 1.0])
def test_how_many_calls_is_a_number(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"shadow="):
        runner_of(row, shadow=wrong)


def test_a_function_that_is_not_traced_is_refused() -> None:
    with pytest.raises(OptionError, match="would be written twice"):
        runner_of(row, front_end="break", shadow=1)


def test_a_module_that_is_not_traced_is_shadowed() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = [torch.zeros(4)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total[0].add_(x.sum(0))
            return x.sin() + 1

    model = Marked()
    runner = runner_of(model, graphs="recorder", front_end="break", shadow=2, split=[])
    x = torch.randn(8, 4)
    runner.prepare(x)
    before = model.total[0].clone()
    assert_same(runner(x), x.sin() + 1)
    assert_same(model.total[0], before + x.sum(0))
    assert runner.counts[AGREES] == 1


def test_what_an_object_of_the_models_holds_is_written_once() -> None:
    class Kept:
        def __init__(self) -> None:
            self.layers = [torch.zeros(4)]

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = Kept()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.layers[0].add_(x.sum(0))
            return x.sin() + self.kept.layers[0]

    model = Keeping()
    runner = runner_of(model, graphs="recorder", front_end="break", shadow=1, split=[])
    x = torch.randn(8, 4)
    runner.prepare(x)
    before = model.kept.layers[0].clone()
    runner(x)
    assert_same(model.kept.layers[0], before + x.sum(0))
    assert runner.counts[AGREES] == 1


def test_float32_results_of_a_bfloat16_model_are_not_blamed() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(8):
            y = y + x * 0.37
        return y.float()

    def rounds_less(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return lambda *args: gm(*[each.float() if isinstance(each, torch.Tensor) else each for each in args])

    runner = runner_of(model, graphs="recorder", compiler=rounds_less, shadow=1, split=[])
    x = torch.randn(8, 4).bfloat16()
    runner.prepare(x)
    runner(x)
    assert (runner.counts[AGREES], runner.counts[DIFFERS]) == (1, 0)


def test_a_check_of_random_calls() -> None:
    runner = runner_of(row, graphs="recorder", shadow=5)
    runner.prepare(torch.randn(8, 4))
    check(runner, row, lambda n: (torch.randn(n, 4),), [8, 7, 2, 1, 4, 3, 9, 8])
