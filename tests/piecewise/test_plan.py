"""What is held between replays and what is not: the rule whose absence corrupted other engines, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from garbage import collect
from piecewise_models import assert_same, check, ops, runner_of
from torch.utils._python_dispatch import TorchDispatchMode

import fxpatch
from fxpatch.piecewise import plan


@pytest.fixture(autouse=True)
def strict(musa: str) -> Iterator[None]:
    fxpatch.simulate(musa, strict=True)
    yield
    fxpatch.simulate(musa, strict=False)


def model(x: torch.Tensor) -> torch.Tensor:
    """Results of splitting operators that are read by later pieces, and again after others have run."""
    first = ops.functional(x + 1)
    y = first.tanh()
    second = ops.functional(y)
    third, fourth = ops.pair(second.sin())
    return first + second * third - fourth.exp()


def on_musa(n: int) -> tuple[torch.Tensor]:
    return (torch.randn(n, 4).to("musa"),)


def test_results_of_splitting_operators_are_held() -> None:
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    check(runner, model, on_musa, [8, 2, 5, 3, 1, 4, 7, 8])
    assert runner.counts == {"captured": 8}
    runner.release()


@pytest.mark.parametrize("held", [True, False])
def test_what_splitting_operators_return_must_not_be_held_weakly(monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """The rule, broken: bridges go as what graphs write does. Then a replay writes to memory that may be another's,
    which the strict device finds. The same change with `held` is right."""
    original = plan._Recorder._split
    kept: list[Any] = []

    def broken(self: Any, piece: Any, call: Any) -> None:
        count = len(self.kept)
        original(self, piece, call)
        kept.extend(self.kept[count:] if held else [])
        del self.kept[count:]
        self.written_by_graph.update(piece.outputs)
        bridges = [self.held(number) for number in piece.outputs]
        self.steps[-1] = plan._step(piece.gm, call, [self.held(number) for number in piece.inputs], bridges)

    monkeypatch.setattr(plan._Recorder, "_split", broken)
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    assert {row.way for row in runner.report.sizes} == {"captured"}
    if not held:
        with pytest.raises(RuntimeError, match="memory that is no longer owned"):
            runner(*on_musa(8))
        runner.release()
        return
    check(runner, model, on_musa, [8, 2, 5, 3, 1, 4, 7, 8])
    runner.release()


def bytes_of(weak: bool) -> int:
    """What a runner of a deep model reserves for its graphs."""

    fxpatch.simulate("musa", strict=False)  # which takes long over this much memory

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            y = torch.empty_like(x)
            ops.out(x.sin(), x.cos(), y)
            x = y.tanh()
        return x

    collect()
    torch.musa.empty_cache()
    before = torch.musa.memory_reserved()
    runner = runner_of(deep, graphs="device", weak=weak, dynamic={"x": 0}, sizes=[32, 64, 128, 256])
    runner.prepare(torch.randn(60, 256).to("musa"))
    collect()
    torch.musa.empty_cache()
    used = torch.musa.memory_reserved() - before
    x = torch.randn(100, 256).to("musa")
    assert_same(runner(x), deep(x))
    assert runner.counts == {"captured": 1}
    runner.release()
    return used


def test_sizes_share_what_graphs_write() -> None:
    weak, strong = bytes_of(True), bytes_of(False)
    assert weak * 2 < strong, (weak, strong)


def test_results_outlive_the_runner() -> None:
    runner = runner_of(model, graphs="device")
    runner.prepare(*on_musa(5))
    for n in (8, 3):
        (x,) = on_musa(n)
        y = runner(x)
        expected = model(x)
        if n == 3:
            del runner
            collect()
            torch.musa.empty_cache()
        others = [torch.zeros(64, 64, device="musa") for _ in range(20)]
        assert_same(y, expected)
        del others


def test_clone_outputs_gives_results_that_the_next_call_leaves_alone() -> None:
    for clone in (True, False):
        runner = runner_of(model, graphs="device", clone_outputs=clone)
        runner.prepare(*on_musa(5))
        (x,), (other,) = on_musa(4), on_musa(4)
        y = runner(x)
        kept = y.clone()
        runner(other)
        assert torch.equal(y, kept) is clone
        runner.release()


@pytest.mark.parametrize("graphs", ["device", "recorder"])
def test_what_is_added_in_place_is_added_once_at_capture(graphs: str) -> None:
    """A warm-up and a replay run the piece twice: an index would be out of the table."""
    table = torch.randn(5, 4).to("musa")

    def indexed(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        index = ops.functional(at)
        index += 1
        ops.functional(index.float())
        return x + table[index]

    def make(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 4).to("musa"), (torch.arange(n) % 2 + 1).clamp(max=1).to("musa")

    runner = runner_of(indexed, graphs=graphs, dynamic={"x": 0, "at": 0})
    runner.prepare(*make(5))
    assert {row.way for row in runner.report.sizes} == {"captured"}, runner.report
    check(runner, indexed, make, [2, 3, 8, 1])
    runner.release()


def test_a_step_for_each_graph_and_each_splitting_piece_and_none_for_views() -> None:
    def viewed(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = ops.functional(x.sin())  # graph, split
        left, right = y.view(-1, 2, 2).unbind(1)  # views
        return ops.functional(left), right.cos(), y.t()[0]  # split, graph, views

    runner = runner_of(viewed, graphs="device", dynamic={"x": 0})
    runner.prepare(*on_musa(5))
    kinds = [piece.kind for piece in runner.report.pieces]
    assert kinds.count("views") >= 1
    steps = runner._made.prepared.captured[8].plan.steps
    assert len(steps) == sum(kind != "views" for kind in kinds)
    assert runner._made.prepared.captured[8].plan.graphs == kinds.count("graph")
    check(runner, viewed, on_musa, [8, 2, 3])
    runner.release()


def test_an_out_style_operator_is_called_without_a_copy() -> None:
    def styled(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        ops.out(x.sin(), x, y)
        return y.cos()

    runner = runner_of(styled, graphs="device")
    runner.prepare(*on_musa(5))
    plan_of_8 = runner._made.prepared.captured[8].plan
    assert len(plan_of_8.steps) == 3
    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        plan_of_8.steps[1]()
    assert calls == ["piecewise_tests.out.default"]
    runner.release()
