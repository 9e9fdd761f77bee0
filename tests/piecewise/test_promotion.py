"""A runner promotes the optimized forwards that hold, and the native path is not in its graph."""

from __future__ import annotations

import pytest
import torch

import fxpatch


class Gate(torch.nn.Module):
    """`kind`: what its optimized forward does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.calls: list[str] = []

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.nn.functional.silu(a) * b

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        if self.kind == "wrong":
            return torch.nn.functional.silu(a) * b * 1.1
        if self.kind == "reads":
            return torch.sigmoid(a) * a * b * (1.0 if float(a.sum()) == float(a.sum()) else 2.0)
        return torch.sigmoid(a) * a * b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_native(x)


class Layer(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.gate = torch.nn.Linear(8, 16), Gate(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.softmax(self.gate(self.linear(x)), -1)


@pytest.fixture
def model(musa: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*map(Layer, ("good", "wrong", "reads"))).to(musa)


def runner_of(model: torch.nn.Module, **options: str) -> fxpatch.PiecewiseRunner:
    return fxpatch.PiecewiseRunner(
        model,
        dynamic={"input": 0},
        split=["softmax"],
        sizes=[2, 4],
        compiler="eager",
        on_error="raise",
        **options,  # type: ignore[arg-type]
    )


def functions_in(runner: fxpatch.PiecewiseRunner) -> list[str]:
    assert runner._made.prepared is not None
    graph = runner._made.prepared.traced.gm.graph  # type: ignore[attr-defined]
    return [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes]


def test_those_that_hold_are_traced_and_the_others_stay_native(model: torch.nn.Module, musa: str) -> None:
    runner = runner_of(model, native="any_speed")
    report = runner.prepare(torch.randn(4, 8, device=musa))
    chosen = {each.operator: each.chosen for each in report.operators}
    assert chosen == {"0.gate": "optimized", "1.gate": "native", "2.gate": "native"}
    assert "1.gate: native" in str(report)
    names = functions_in(runner)
    assert names.count("silu") == 2, "the native path of the promoted one is not in the graph"
    assert names.count("sigmoid") == 1
    for n in (1, 2, 3, 4):
        x = torch.randn(n, 8, device=musa)
        with torch.no_grad():
            torch.testing.assert_close(runner(x).cpu(), model(x).cpu())
    assert not [name for layer in model for name in vars(layer.gate) if name == "forward"], "the modules are as before"


def test_kept_as_it_is(model: torch.nn.Module, musa: str) -> None:
    runner = runner_of(model, native="keep")
    assert runner.prepare(torch.randn(4, 8, device=musa)).operators == ()
    assert functions_in(runner).count("silu") == 3


def test_one_that_only_fails_in_a_later_capture_is_demoted_alone(
    model: torch.nn.Module, musa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial passed; the capture of the whole model does not, with this one in it."""
    from fxpatch.piecewise import promotion

    original = promotion.promote
    monkeypatch.setattr(promotion, "promote", lambda *a, **k: original(*a, **{**k, "capture": None}))
    model[2].gate.kind = "good"
    good = Gate.forward_musa

    def forward_musa(self: Gate, x: torch.Tensor) -> torch.Tensor:
        return good(self, x) + (torch.zeros((), device=x.device) if self is not model[2].gate else failing(x))

    monkeypatch.setattr(Gate, "forward_musa", forward_musa)
    runner = runner_of(model, native="any_speed")
    report = runner.prepare(torch.randn(4, 8, device=musa))
    by_name = {each.operator: each for each in report.operators}
    assert by_name["0.gate"].chosen == "optimized"
    assert by_name["2.gate"].chosen == "native"
    assert "found by bisection" in by_name["2.gate"].reason
    assert [row.way for row in report.sizes] == ["captured", "captured"]


@torch.library.custom_op("promotion::failing", mutates_args=())
def failing(x: torch.Tensor) -> torch.Tensor:
    """An operator that no capture takes, and of which nobody says so."""
    if torch.musa.is_current_stream_capturing():
        raise RuntimeError("operation not permitted when stream is capturing")
    return torch.zeros_like(x[..., :8])


@failing.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x[..., :8])
