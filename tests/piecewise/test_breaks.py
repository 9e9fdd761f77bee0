"""The run-time front end: marked code runs between captures at every replay, on real values, and what it cannot keep
raises instead of being replayed wrongly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxpatch
from fxpatch.errors import BreakChangedError, TraceError

CALLS: list[int] = []


@fxpatch.eager_on_graph
def attention(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Reads a value on the host, which no graph can."""
    longest = int(lengths.max())
    CALLS.append(longest)
    return q * longest


@fxpatch.eager_on_graph
def in_place(q: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(q.sum(-1, keepdim=True).expand_as(q) + float(q[0, 0] > 0))


class Model(torch.nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
        for layer in self.layers:
            x = attention(layer(x).tanh(), lengths)
            out = torch.empty_like(x)
            in_place(x, out)
            x = x + 0.1 * out
        return {"y": x + 1, "n": x.shape[0], "kept": [x]}


def prepared(model: Any, device: str, **options: Any) -> fxpatch.PiecewiseRunner:
    runner = fxpatch.PiecewiseRunner(
        model, dynamic={"x": 0}, front_end="break", sizes=[2, 4, 8], on_error="raise", **options
    )
    runner.prepare(torch.randn(5, 8, device=device), torch.tensor([1, 2, 3], device=device))
    return runner


@pytest.mark.parametrize("graphs", ["device", "recorder", "none"])
def test_replays_equal_eager_for_every_n_in_any_order(musa: str, graphs: str) -> None:
    torch.manual_seed(0)
    model = Model().to(musa)
    runner = prepared(model, musa, graphs=graphs)
    for n in (1, 8, 2, 3, 7, 4, 5, 6, 9, 1, 8):
        x, lengths = torch.randn(n, 8, device=musa), torch.tensor([n, 2, 1], device=musa)
        with torch.no_grad():
            expected = model(x, lengths)
            found = runner(x, lengths)
        assert found["n"] == n
        torch.testing.assert_close(found["y"].cpu(), expected["y"].cpu())
        torch.testing.assert_close(found["kept"][0].cpu(), expected["kept"][0].cpu())
    captured = runner.counts["captured"]
    assert captured == (0 if graphs == "none" else 10)


def test_the_break_runs_as_often_as_it_is_called_and_the_rest_is_replayed(musa: str) -> None:
    model = Model(layers=4).to(musa)
    runner = prepared(model, musa)
    assert [(row.size, row.graphs) for row in runner.report.sizes] == [(8, 9), (4, 9), (2, 9)]
    launched: list[str] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: launched.append("python"))
    CALLS.clear()
    runner(torch.randn(3, 8, device=musa), torch.tensor([7, 2, 1], device=musa))
    assert CALLS == [7, 7, 7, 7]
    assert launched == [], "a replay does not run the model's Python"


def test_outside_of_a_runner_it_is_what_it_was(musa: str) -> None:
    x = torch.ones(2, device=musa)
    assert attention(x, torch.tensor([3], device=musa)).tolist() == [3, 3]
    assert attention.__name__ == "attention"


def test_a_break_that_returns_another_number_raises_and_does_not_go_on_with_the_old_one(musa: str) -> None:
    @fxpatch.eager_on_graph
    def count(x: torch.Tensor) -> int:
        return int((x > 0).sum())

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + count(x)

    runner = fxpatch.PiecewiseRunner(model, dynamic={"x": 0}, front_end="break", sizes=[4], on_error="raise")
    runner.prepare(torch.ones(4, device=musa))
    assert runner(torch.ones(4, device=musa)).tolist() == [6, 6, 6, 6]
    with pytest.raises(
        BreakChangedError, match=r"count returned something else.*\n  seen: 0\n  expected: 4: what follow"
    ):
        runner(-torch.ones(4, device=musa))


def test_a_break_that_returns_another_shape_raises(musa: str) -> None:
    @fxpatch.eager_on_graph
    def positive(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]

    runner = fxpatch.PiecewiseRunner(
        lambda x: x + positive(x).sum(), dynamic={"x": 0}, front_end="break", sizes=[4], on_error="raise"
    )
    runner.prepare(torch.ones(4, device=musa))
    with pytest.raises(BreakChangedError, match=r"a result of shape \[0\]\n  expected: \[4\]"):
        runner(-torch.ones(4, device=musa))


def test_an_error_in_a_break_ends_the_capture_and_the_device_is_usable(musa: str) -> None:
    fail = True

    @fxpatch.eager_on_graph
    def sometimes(x: torch.Tensor) -> torch.Tensor:
        if fail and torch.musa.is_current_stream_capturing() is False and len(CALLS) > 3:
            raise ZeroDivisionError("in a break")
        CALLS.append(0)
        return x

    CALLS.clear()
    runner = fxpatch.PiecewiseRunner(lambda x: sometimes(x * 2) + 1, dynamic={"x": 0}, front_end="break", sizes=[4])
    report = runner.prepare(torch.ones(4, device=musa))
    assert "ZeroDivisionError: in a break" in report.sizes[0].reason
    assert not torch.musa.is_current_stream_capturing()
    fail = False
    runner.prepare(torch.ones(4, device=musa))
    assert runner(torch.ones(3, device=musa)).tolist() == [3, 3, 3]


def test_a_result_that_cannot_be_cut_is_refused(musa: str) -> None:
    runner = fxpatch.PiecewiseRunner(
        lambda x: {"y": x, "why": object()}, dynamic={"x": 0}, front_end="break", sizes=[4], on_error="raise"
    )
    with pytest.raises(TraceError, match=r"seen: result 1 is a object that is neither a tensor nor always the same"):
        runner.prepare(torch.ones(4, device=musa))


def test_a_call_is_made_as_the_example_was() -> None:
    """Decorators look at what is named in a call, and put in what is not: transformers' do."""

    def decorated(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            assert "scale" in kwargs, "by its name"
            kwargs.setdefault("shift", 3.0)  # a TypeError where it is given by position
            return function(*args, **kwargs)

        return call

    @decorated
    def model(
        x: torch.Tensor, *more: torch.Tensor, scale: float = 1.0, shift: float = 0.0, **named: torch.Tensor
    ) -> Any:
        return x * scale + shift + sum(more) + sum(named.values())

    runner = fxpatch.PiecewiseRunner(
        model,
        dynamic={"x": 0, "more": 0, "named": 0},
        front_end="break",
        sizes=[4],
        graphs="recorder",
        on_error="raise",
    )
    runner.prepare(torch.ones(4), torch.ones(4), scale=2.0, other=torch.ones(4))
    for n in (1, 3, 4):
        x = torch.randn(n)
        assert torch.equal(runner(x, x, scale=2.0, other=x), model(x, x, scale=2.0, other=x))
