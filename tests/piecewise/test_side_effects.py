"""What a model changes besides tensors is an error of the trace; what it sets back is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fxpatch.errors import TraceError
from fxpatch.piecewise.runner import PiecewiseRunner


class Settings:
    """An object that models change."""

    def __init__(self) -> None:
        self.flag: object = None
        self.seen: list[int] = []
        self.table: dict[str, int] = {}


SETTINGS = Settings()


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    assert vars(SETTINGS) == vars(Settings())  # neither by a refused trace nor by a replay
    torch._dynamo.reset()


def sets(x: torch.Tensor) -> torch.Tensor:
    SETTINGS.flag = True
    return x + 1


def keeps_a_tensor(x: torch.Tensor) -> torch.Tensor:
    SETTINGS.flag = x * 2
    return x + 1


def appends(x: torch.Tensor) -> torch.Tensor:
    SETTINGS.seen.append(1)
    return x + 1


def stores(x: torch.Tensor) -> torch.Tensor:
    SETTINGS.table["calls"] = 1
    return x + 1


def adds_an_attribute(x: torch.Tensor) -> torch.Tensor:
    SETTINGS.new = None  # the constant that a missing attribute would be mistaken for
    return x + 1


class Counts(torch.nn.Module):
    """Its state in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 1


def sets_back(x: torch.Tensor) -> torch.Tensor:
    SETTINGS.flag = True
    try:
        return x + 1
    finally:
        SETTINGS.flag = None


def works_on_its_own(x: torch.Tensor) -> torch.Tensor:
    mine = Settings()
    mine.seen.append(1)
    mine.flag = x
    return mine.flag + len(mine.seen)


def runner_of(model: Callable[..., object]) -> PiecewiseRunner:
    options = {"compiler": "eager", "graphs": "recorder", "on_error": "raise"}
    return PiecewiseRunner(model, dynamic={"x": 0}, sizes=[2, 4], **options)


@pytest.mark.parametrize(
    "model",
    [sets, keeps_a_tensor, appends, stores, adds_an_attribute, Counts()],
    ids=lambda each: getattr(each, "__name__", "Counts"),
)
def test_a_change_that_a_replay_would_not_make_is_refused(model: Callable[..., object]) -> None:
    with pytest.raises(TraceError, match="it changes what is no tensor"):
        runner_of(model).prepare(torch.ones(3))


@pytest.mark.parametrize("model", [sets_back, works_on_its_own])
def test_what_is_set_back_or_its_own_is_no_change(model: Callable[..., object]) -> None:
    runner = runner_of(model)
    runner.prepare(torch.ones(3))
    for n in (4, 1, 3):
        assert torch.equal(runner(torch.full((n,), 2.0)), torch.full((n,), 3.0))
    assert runner.counts == {"captured": 3}
