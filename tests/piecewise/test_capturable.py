"""What no graph can hold becomes a splitting point with a reason, or, under `on_error="raise"`, an error; what the
caller names to split at and the graph has not is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from piecewise_models import check, ops, runner_of

from fxpatch.errors import NotCapturableError

RECORDED = {"graphs": "recorder"}


def reads(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def finds(x: torch.Tensor) -> torch.Tensor:
    return x + x.nonzero().sum()


MODELS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "item": (reads, r"item cannot be in a graph.*seen: reads a value on the host \(item\).*split=\['item'\]"),
    "nonzero": (finds, r"nonzero cannot be in a graph.*seen: has a size or number that depends on data"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_nobody_has_named_is_an_error_in_ci(name: str) -> None:
    model, message = MODELS[name]
    with pytest.raises(NotCapturableError, match=f"(?s){message}"):
        runner_of(model, on_error="raise", **RECORDED).prepare(torch.randn(4, 4))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"graphs": "none", "on_error": "raise"}], ids=["fallback", "no graphs"])
def test_and_a_splitting_point_otherwise(name: str, options: dict[str, str]) -> None:
    model, _ = MODELS[name]
    runner = runner_of(model, **{**RECORDED, **options})
    report = runner.prepare(torch.randn(4, 4))
    assert any(piece.reasons for piece in report.pieces)
    check(runner, model, lambda n: (torch.randn(n, 4),), (2, 4, 5))


def test_what_is_named_is_no_error() -> None:
    runner = runner_of(reads, split=["item", lambda node: "on the host" if "item" in str(node.args) else None],
                       on_error="raise", **RECORDED)  # fmt: skip
    report = runner.prepare(torch.randn(4, 4))
    assert "item: splitting operator" in [why for piece in report.pieces for why in piece.reasons]


def test_a_name_that_splits_nothing_is_told() -> None:
    """Lists of splitting operators outlive the operators in them."""
    runner = runner_of(lambda x: ops.functional(x) + 1, split=["piecewise_tests::functional", "softmax", "aten::bmm"])
    notes = runner.prepare(torch.randn(4, 4)).notes
    assert [note for note in notes if "nowhere" in note] == [
        "split='softmax' is nowhere in the graph",
        "split='aten::bmm' is nowhere in the graph",
    ]
