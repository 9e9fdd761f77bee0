"""What is shown while sizes are captured: each size with its graphs and the memory that is reserved, and the end."""

from __future__ import annotations

import io

import pytest
import torch

import fxpatch
from fxpatch.piecewise.progress import Step, words


def prepare(musa: str, progress: object, **options: object) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(-1), torch.nn.Linear(4, 4)).to(musa)
    runner = fxpatch.PiecewiseRunner(
        model,
        dynamic={"input": 0},
        sizes=[2, 4, 8],
        split=["softmax"],
        compiler="eager",
        progress=progress,
        **options,
    )  # type: ignore[arg-type]
    runner.prepare(torch.randn(8, 4, device=musa))


def test_a_function_is_told_before_each_capture_and_at_the_end(musa: str) -> None:
    steps: list[Step] = []
    prepare(musa, steps.append)
    assert [(step.done, step.of, step.size, step.graphs) for step in steps] == [
        (0, 3, 8, 2),
        (1, 3, 4, 2),
        (2, 3, 2, 2),
        (3, 3, 0, 2),
    ]
    reserved = [step.reserved or 0 for step in steps]
    assert reserved[0] < reserved[-1]
    assert reserved == sorted(reserved)


def test_a_function_that_raises_keeps_no_other_rank_waiting(musa: str) -> None:
    """Its error comes once every size has been decided on, as many times as where nothing was raised."""
    asked: list[list[bool]] = [[], []]

    def fails(step: Step) -> None:
        raise ZeroDivisionError(f"at size {step.size}")

    prepare(musa, False, agree=lambda ok: asked[0].append(ok) or ok)
    with pytest.raises(ZeroDivisionError, match="at size 8"):
        prepare(musa, fails, agree=lambda ok: asked[1].append(ok) or ok)
    assert asked[0] == asked[1] != []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_a_bar_where_somebody_looks(
    musa: str, monkeypatch: pytest.MonkeyPatch, progress: bool | None, terminal: bool, shown: bool
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    prepare(musa, progress)
    assert ("3/3" in stderr.getvalue() and "captured" in stderr.getvalue()) == shown
    assert shown or not stderr.getvalue()


def test_a_step_in_words() -> None:
    assert words(Step(0, 3, 128, 33, 3 << 29)) == "size 128, 33 graphs, 1.50 GiB reserved"
    assert words(Step(3, 3, 0, 33, None)) == "captured"
