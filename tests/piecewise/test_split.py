"""Where a graph is cut, why, and what is cut no further."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from piecewise_models import SPLIT, check, ops, runner_of

from fxpatch.piecewise import build
from fxpatch.piecewise.report import PieceRow


def pieces(function: Any, *args: Any, split: Any = SPLIT, **options: Any) -> tuple[PieceRow, ...]:
    runner = runner_of(function, split=split, **options)
    report = runner.prepare(*(args or (torch.randn(5, 4),)))
    assert report.state == "prepared", report
    if not args:
        check(runner, function, lambda n: (torch.randn(n, 4),), [2, 3, 8, 4])
    return report.pieces


def kinds(rows: tuple[PieceRow, ...]) -> list[str]:
    return [row.kind for row in rows]


def test_neighbours_share_a_piece() -> None:
    rows = pieces(lambda x: ops.functional(ops.functional(x.sin())) + ops.expanded(x))
    assert kinds(rows) == ["graph", "split", "graph"]
    assert rows[1].reasons == ("functional: splitting operator",) * 2 + ("expanded: splitting operator",)


def test_taking_a_result_out_stays_with_what_made_it() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        first, second = ops.pair(x.sin())
        return first * second

    assert kinds(pieces(function)) == ["graph", "split", "graph"]


def test_views_are_a_piece_of_their_own_kind() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        left, right = ops.functional(x).chunk(2, -1)
        return ops.functional(left.t().t()) + right.unsqueeze(0)[0]

    assert kinds(pieces(function)) == ["split", "views", "split", "graph"]


@pytest.mark.parametrize("depth", [2, 12])
def test_equal_pieces_are_compiled_once_whatever_the_depth(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.fx.GraphModule] = []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(gm)
        return build._eager(gm, inputs)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(4, 8), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.one(x).chunk(2, -1)
            result = torch.empty_like(q)
            ops.out(q, k, result)
            return x + self.other(result).relu()

    layers = torch.nn.Sequential(*[Layer() for _ in range(depth)])
    runner = runner_of(layers, dynamic={"input": 0}, compiler=compiler)
    report = runner.prepare(torch.randn(5, 4))
    assert kinds(report.pieces).count("graph") == depth + 1
    assert len(compiled) == 3
    check(runner, layers, lambda n: (torch.randn(n, 4),), [2, 3, 8])


def test_equal_pieces_over_shared_and_over_separate_memory_are_not_the_same() -> None:
    """A compiler that is told that two inputs are apart may read one before the other is written."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        apart, other = ops.pair(x)
        ops.functional(x)
        apart.add_(1)
        first = apart * other
        both = ops.functional(x)
        same = both.view(both.shape)
        ops.out(x, x, both)
        both.add_(1)
        return first, both * same

    for compiler in ("eager", "aot_eager"):
        pieces(function, compiler=compiler)


def tagged() -> Any:
    library = torch.library.Library("piecewise_tagged", "FRAGMENT")
    if not hasattr(torch.ops.piecewise_tagged, "op"):
        library.define("op(Tensor x) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
        library.impl("op", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("piecewise_tagged::op", torch.empty_like, lib=library)
    return library


LIBRARY = tagged()
RULES: dict[str, tuple[Any, str]] = {
    "a packet": (ops.functional, "functional: splitting operator"),
    "an overload": (ops.functional.default, "functional: splitting operator"),
    "a name": ("piecewise_tests::functional", "functional: splitting operator"),
    "a name with its overload": ("piecewise_tests::functional.default", "functional: splitting operator"),
    "a function's name": ("softmax", "softmax: splitting operator"),
    "a tag": (torch.Tag.cudagraph_unsafe, "op: tagged cudagraph_unsafe"),
    "a function that gives a reason": (lambda n: "slow" if "softmax" in str(n.target) else None, "softmax: slow"),
}


@pytest.mark.parametrize("what", RULES)
def test_what_splits(what: str) -> None:
    rule, reason = RULES[what]

    def function(x: torch.Tensor) -> torch.Tensor:
        x = ops.functional(x.sin()).cos()
        x = torch.ops.piecewise_tagged.op(x).sin()
        return x.softmax(-1).cos()

    rows = pieces(function, split=[rule])
    assert reason in [why for row in rows for why in row.reasons], rows


LINT: dict[str, tuple[Any, str]] = {
    "a value read on the host": (lambda x: x * x[:1].sum().item(), "reads a value on the host (item)"),
    "an integer read on the host": (lambda x: x * x[:1].sum().int().item(), "reads a value on the host (item)"),
    "sizes that depend on data": (lambda x: x + (x > 9).nonzero().sum(), "has a size or number that depends on data"),
    "a mask": (lambda x: x + x[x > 0].sum(), "has a size or number that depends on data"),
    "a row of a result of unknown size": (
        lambda x: x + (x[:1] + 50).nonzero()[0].float().sum(),
        "has a size or number that depends on data",
    ),
}


@pytest.mark.parametrize("what", LINT)
def test_what_cannot_be_captured_runs_between_graphs(what: str) -> None:
    function, reason = LINT[what]
    assert any(why.endswith(reason) for row in pieces(function, split=[]) for why in row.reasons)


def test_host_tensors_run_between_graphs_of_a_device(musa: str) -> None:
    scale = torch.tensor(2.5)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * scale).cos()

    runner = runner_of(function, split=[], graphs="device")
    report = runner.prepare(torch.randn(5, 4).to(musa))
    assert [why for row in report.pieces for why in row.reasons] == ["mul: has tensors on cpu"]
    check(runner, function, lambda n: (torch.randn(n, 4).to(musa),), [2, 3])
    runner.release()


def test_random_numbers_are_drawn_anew() -> None:
    runner = runner_of(lambda x: torch.nn.functional.dropout(x, 0.5, True) + ops.functional(x))
    runner.prepare(torch.ones(8, 4))
    draws = [runner(torch.ones(8, 4)).clone() for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_regions_that_span_a_split_keep_their_mode() -> None:
    linear = torch.nn.Linear(4, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.functional(linear(x))
            z = linear(y)
        return z.float() + linear(x)

    pieces(function)
