"""verify(): healthy models pass; each planted fault is found, and its layer and operator named; and nobody notices."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted import Network, network, rows, wrong_at, wrong_backward, wrong_decomposition
from torch import nn

import fxpatch
from fxpatch.errors import InputError, OptionError, WrongResultError
from fxpatch.verification.report import Row, State, Verification

FAST = ("interpreter", "codegen", "aot_eager")


def only(report: Verification, stage: str, direction: str = "forward") -> Row:
    (row,) = (row for row in report.rows if (row.stage, row.direction) == (stage, direction))
    return row


def states(report: Verification) -> dict[str, str]:
    return {f"{row.stage} {row.direction}": str(row.state) for row in report.rows}


def fingerprint(model: nn.Module) -> tuple[Any, list[torch.Tensor]]:
    """All that a user could notice: what has to be the same object or value, and tensors."""
    plain, tensors = [], []
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        plain.append((name, id(module), module.training, hooks, sorted(vars(module))))
        for held in (module._parameters, module._buffers):
            plain += [(key, id(each), each.requires_grad, id(each.grad)) for key, each in held.items()]
            tensors += [each.detach().clone() for each in held.values()]
            tensors += [each.grad.clone() for each in held.values() if each.grad is not None]
    return plain, tensors


# -- what is right -----------------------------------------------------------------------------------------------------


def test_a_healthy_model_agrees_and_is_left_as_it_was() -> None:
    model, x = network(2).train(), rows().requires_grad_()
    model(x).sum().backward()
    model.layers[0].register_forward_hook(lambda module, args, result: result * 1)
    model.calls.fill_(41)
    before = fingerprint(model)
    given, grad = x.detach().clone(), x.grad
    numbers = torch.get_rng_state(), random.getstate()
    report = fxpatch.verify(model, (x,), stages=(*FAST, "captured"))
    report.raise_if_wrong()
    assert report.ok
    assert states(report) == {
        **{f"{stage} {way}": "agrees" for stage in ("eager twice", "fakes", *FAST) for way in ("forward", "backward")},
        "captured forward": "cannot run",
        "captured backward": "cannot run",
    }
    assert only(report, "captured").reason == "no argument is on an accelerator, and the CPU captures no graphs"
    assert only(report, "captured", "backward").reason == "device graphs compute without gradients"
    after = fingerprint(model)
    assert after[0] == before[0]
    assert all(map(torch.equal, after[1], before[1]))
    assert torch.equal(x, given)
    assert x.grad is grad
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]


@pytest.mark.slow
def test_inductor_agrees_with_a_healthy_model() -> None:
    report = fxpatch.verify(network(1), (rows(),), stages=["inductor"])
    report.raise_if_wrong()
    assert only(report, "inductor").state is only(report, "inductor", "backward").state is State.AGREES


def test_several_inputs_are_verified_each_with_the_same_compiled_code() -> None:
    report = fxpatch.verify(network(1), [(rows(4),), {"x": rows(6)}, rows(9)], stages=["aot_eager"], backward=False)
    report.raise_if_wrong()
    rows_ = [row for row in report.rows if row.stage == "aot_eager"]
    assert [row.example for row in rows_] == [0, 1, 2]
    assert rows_[0].graphs == 1
    assert rows_[-1].graphs >= 2
    assert "input 2  aot_eager" in str(report)


def test_a_wrong_answer_for_one_input_only_is_found() -> None:
    def for_long(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return lambda *args: tuple(
            each * 2 if isinstance(each, torch.Tensor) and each.dim() == 2 and each.shape[0] == 6 else each
            for each in gm(*args)
        )

    report = fxpatch.verify(
        network(1), [(rows(4),), (rows(6),)], stages=[], backends={"mine": for_long}, backward=False, locate=False
    )
    assert [row.state for row in report.rows if row.stage == "mine"] == [State.AGREES, State.DIFFERS]


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_an_operator_behind_the_wrong_layer_is_not_certain() -> None:
    """The mistake is made only where the whole graph is compiled: no part of it shows which operator it is."""
    report = fxpatch.verify(network(4), (rows(),), stages=[], backends={"mine": wrong_at(1, 4)}, backward=False)
    row = only(report, "mine")
    assert row.layer == "layers.1.act"
    assert row.operator is not None
    assert row.operator.node == "silu_3"
    assert not row.operator.certain
    assert "(layers.1.act is wrong before it: the mistake is made only in a graph with both)" in str(report)


def test_one_wrong_layer_of_twelve_is_named_and_so_is_its_operator() -> None:
    report = fxpatch.verify(network(12), (rows(),), stages=[], backends={"mine": wrong_at(7)}, backward=False)
    row = only(report, "mine")
    assert row.state is State.DIFFERS
    assert row.layer == "layers.7.act"
    assert row.operator is not None
    assert row.operator.operator == "silu"
    assert row.operator.certain
    assert row.operator.shapes == "float32[4, 16] -> float32[4, 16]"
    assert row.operator.tries <= 12
    assert row.difference is not None
    text = str(report)
    for part in ("1 of 3 do not agree", "first wrong layer: layers.7.act", "first wrong operator: silu", "0.01 of it"):
        assert part in text
    with pytest.raises(WrongResultError, match=r"Network: mine \(forward\) differs in layers.7.act, first at silu"):
        report.raise_if_wrong()
    assert json.loads(report.json())["rows"][-1]["operator"]["operator"] == "silu"


def test_a_wrong_decomposition_is_named() -> None:
    backends = {"mine": wrong_decomposition()}
    report = fxpatch.verify(network(2), rows(), stages=["aot_eager"], backends=backends, backward=False)
    assert states(report)["aot_eager forward"] == "agrees"
    row = only(report, "mine")
    assert (row.state, row.layer) == (State.DIFFERS, "layers.0.norm")
    assert row.operator is not None
    assert row.operator.operator == "layer_norm"


def test_a_gradient_that_is_wrong_only_in_the_backward_is_found() -> None:
    report = fxpatch.verify(network(3), rows(), stages=["aot_eager"], backends={"mine": wrong_backward(1)})
    assert only(report, "mine").state is State.AGREES
    row = only(report, "mine", "backward")
    assert row.state is State.DIFFERS
    assert row.difference is not None
    assert row.difference.where.startswith("gradient")
    assert row.layer == "layers.1.act"
    assert row.operator is not None
    assert row.operator.operator == "silu"


def test_a_wrong_gradient_of_an_argument_is_found() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 1.01

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return gm(*[Wrong.apply(each) if each.requires_grad else each for each in args])

        return run

    report = fxpatch.verify(torch.sin, rows().requires_grad_(), stages=[], backends={"mine": backend})
    assert only(report, "mine").state is State.AGREES
    row = only(report, "mine", "backward")
    assert row.difference is not None
    assert row.difference.where == "gradient ['argument [0]']"


def test_what_is_written_to_arguments_and_buffers_is_compared() -> None:
    def dropping(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return lambda *args: gm(*copy.deepcopy(args))

    model, x = network(1), rows()
    report = fxpatch.verify(model, (x,), stages=[], backends={"mine": dropping}, backward=False)
    difference = only(report, "mine").difference
    assert difference is not None
    assert difference.where == "state [\"['calls']\"]" or "calls" in difference.where

    def into(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    report = fxpatch.verify(into, (x, torch.zeros_like(x)), stages=[], backends={"mine": dropping})
    difference = only(report, "mine").difference
    assert difference is not None
    assert difference.where == "argument ['[1]']"
    assert only(report, "mine").operator is not None


def test_a_backend_that_raises_has_failed() -> None:
    def broken(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no such instruction")

    report = fxpatch.verify(network(1), rows(), stages=[], backends={"mine": broken}, backward=False)
    assert only(report, "mine").state is State.FAILED
    assert "no such instruction" in only(report, "mine").reason
    with pytest.raises(WrongResultError, match="failed"):
        report.raise_if_wrong()


def test_a_model_that_dynamo_does_not_trace_is_not_said_to_agree() -> None:
    @torch.compiler.disable
    def untraced(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    report = fxpatch.verify(untraced, rows(), stages=["aot_eager"])
    assert only(report, "aot_eager").state is State.CANNOT_RUN
    assert "traces nothing" in only(report, "aot_eager").reason


def test_graph_breaks_are_verified_graph_by_graph() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.silu(x)
        torch._dynamo.graph_break()
        return torch.nn.functional.silu(y.cos()) + 1

    def second(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        if any(node.target == "cos" for node in gm.graph.nodes):
            return wrong_at(0)(gm, example_inputs)
        return gm.forward

    report = fxpatch.verify(model, rows(), stages=FAST, backends={"mine": second})
    assert only(report, "aot_eager").state is State.AGREES
    assert only(report, "aot_eager").graphs == 2
    row = only(report, "mine")
    assert row.operator is not None
    assert row.operator.operator == "silu"
    assert "y.cos()" in row.operator.line


# -- who is right ------------------------------------------------------------------------------------------------------


def test_a_model_that_disagrees_with_itself_says_nothing_about_a_compiler() -> None:
    calls = iter(range(1000))

    def model(x: torch.Tensor) -> torch.Tensor:
        return x + next(calls)

    report = fxpatch.verify(model, rows(), stages=["aot_eager"], backends={"mine": wrong_at(0)})
    own = only(report, "eager twice")
    assert own.state is State.UNDECIDED
    assert "eager disagrees with itself" in own.reason
    assert "no compiler is to blame" in own.reason
    assert State.DIFFERS not in {row.state for row in report.rows if row.stage != "fakes"}
    assert not report.ok
    with pytest.raises(WrongResultError, match="undecided"):
        report.raise_if_wrong()


def test_dropout_gets_the_same_random_numbers_in_every_run() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    report = fxpatch.verify(model, rows(), stages=FAST)
    report.raise_if_wrong()
    assert any("draws random numbers" in note for note in report.notes)


def test_a_compiler_that_draws_in_another_order_is_not_blamed() -> None:
    def drawing(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            torch.rand(3)
            return gm(*args)

        return run

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    report = fxpatch.verify(model, rows(), stages=[], backends={"mine": drawing}, backward=False)
    assert only(report, "eager twice").state is State.AGREES
    assert only(report, "mine").state is State.UNDECIDED
    assert "eager with others differs as well" in only(report, "mine").reason
    assert not report.ok


class Deep(nn.Module):
    """Rounds to bfloat16 often: compiled code that does not is nearer to the truth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(24):
            y = y + x * 0.37
        return y - 24 * 0.37 * x


def in_float32(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    return lambda *args: tuple(each.bfloat16() for each in gm(*[arg.float() for arg in args]))


def test_rounding_is_told_from_being_wrong() -> None:
    x = rows(64).bfloat16()
    table: dict[torch.dtype, Any] = {}  # everything has to be equal
    both = {"fewer roundings": in_float32}
    strict = fxpatch.verify(Deep(), x, stages=[], backends=both, tolerances=table, reference=None, locate=False)
    assert only(strict, "fewer roundings").state is State.DIFFERS
    told = fxpatch.verify(Deep(), x, stages=[], backends=both, tolerances=table)
    row = only(told, "fewer roundings")
    assert row.state is State.AGREES
    assert row.reason == "rounding only: as near to float64 as eager is"

    def wrong(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            (result,) = in_float32(gm, example_inputs)(*args)
            result[5, 3] += 50  # eager is off by up to 1
            return (result,)

        return run

    one = fxpatch.verify(Deep(), x, stages=[], backends={"mine": wrong}, tolerances=table, locate=False)
    assert only(one, "mine").state is State.DIFFERS


@pytest.mark.parametrize("kind", ["cpu", "float64"])
def test_eager_is_compared_with_the_reference_that_was_asked_for(musa: str, kind: str) -> None:
    model = network(1).to(musa)
    report = fxpatch.verify(model, rows().to(musa), stages=["aot_eager"], reference=kind, backward=True)
    report.raise_if_wrong()
    assert states(report)[f"eager, {kind} forward"] == "agrees"
    assert states(report)[f"eager, {kind} backward"] == "agrees"

    class Wrong(Network):
        """Is wrong on the device alone."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.01 if x.device.type == "musa" else 1)

    model = Wrong(1).to(musa)
    report = fxpatch.verify(model, rows().to(musa), stages=["aot_eager"], reference=kind, backward=False)
    assert states(report)["aot_eager forward"] == "agrees"
    row = only(report, f"eager, {kind}")
    assert row.state is State.DIFFERS
    assert "eager itself is wrong on this device" in row.reason


def test_a_model_without_a_reference_says_so() -> None:
    weight = torch.ones(8)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * weight

    report = fxpatch.verify(model, rows(), stages=[], backends={}, reference="cpu")
    row = only(report, "eager, cpu")
    assert row.state is State.CANNOT_RUN
    assert "function that holds tensors" in row.reason


# -- device graphs -----------------------------------------------------------------------------------------------------


def test_a_captured_model_agrees(musa: str) -> None:
    model = network(2).to(musa)
    report = fxpatch.verify(model, rows().to(musa), stages=["captured"], runner={"compiler": "eager"}, backward=False)
    report.raise_if_wrong()
    assert only(report, "captured").state is State.AGREES


def test_a_graph_that_reads_stale_memory_is_found(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpatch.simulator.graph import Graph

    original, count = Graph.record, iter(range(10**6))

    def forgetful(self: Graph, run: Any, name: str, *rest: Any, **more: Any) -> None:
        """Forgets to launch silu in graphs: its result is what was in that memory."""
        original(self, (lambda: None) if "silu" in name else run, name, *rest, **more)
        next(count)

    monkeypatch.setattr(Graph, "record", forgetful)
    model = network(3).to(musa)
    report = fxpatch.verify(model, rows().to(musa), stages=["captured"], runner={"compiler": "eager"}, backward=False)
    assert next(count) > 10
    row = only(report, "captured")
    assert row.state is State.DIFFERS, str(report)
    assert row.layer == "layers.0.act"
    assert row.operator is not None
    assert row.operator.operator == "silu"


def test_a_device_that_captures_nothing_says_why(musa: str) -> None:
    report = fxpatch.verify(
        network(1).to(musa), torch.randn(1, 8).to(musa), stages=["captured"], runner={"compiler": "eager"}
    )
    assert "no argument has two rows or more" in only(report, "captured").reason
    assert only(report, "captured").state is State.CANNOT_RUN


# -- the door ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "given", "options", "message"),
    [
        (InputError, 3, {}, "a int"),
        (InputError, [], {}, "empty list"),
        (InputError, {1: 2}, {}, "a dict"),
        (InputError, (iter([1]), (x for x in ())), {}, "cannot be copied"),
        (OptionError, (), {"stages": ["eager"]}, "one of 'interpreter', 'codegen'"),
        (OptionError, (), {"reference": "gpu"}, "one of 'auto', 'cpu', 'float64', None"),
        (OptionError, (), {"backends": {"inductor": "eager"}}, "not yet a stage's"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    error: type[Exception], given: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        fxpatch.verify(torch.sin, given, **options)


def test_what_the_model_raises_is_raised_and_the_model_put_back() -> None:
    model = network(1)

    def fails(module: nn.Module, args: Any) -> None:
        model.calls.add_(5)
        raise ValueError("not today")

    handle = model.layers[0].register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="not today"):
        fxpatch.verify(model, rows())
    handle.remove()
    assert model.calls.item() == 0


def test_a_compiled_module_is_verified_itself() -> None:
    report = fxpatch.verify(torch.compile(network(1), backend="eager"), rows(), stages=["aot_eager"], backward=False)
    assert report.model == "Network"
    report.raise_if_wrong()
    report = fxpatch.verify(torch.compile(torch.sin, backend="eager"), rows(), stages=["aot_eager"])
    report.raise_if_wrong()
    assert only(report, "aot_eager").graphs == 1


def test_a_report_is_json_without_infinities() -> None:
    report = fxpatch.verify(torch.sin, rows(), stages=[], backends={"mine": lambda gm, _: lambda x: (x.long(),)})
    found = json.loads(report.json())
    assert found["ok"] is False
    assert found["rows"][-1]["difference"]["kind"] == "dtype"
    assert found["rows"][-1]["difference"]["times"] == "inf"
