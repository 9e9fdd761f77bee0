"""What verify() could overlook, and where it could see faults that are none: each was once so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from planted import WIDTH, network, rows
from torch import nn

import fxpatch
from fxpatch.difference import compare
from fxpatch.piecewise.roundings import roundings
from fxpatch.piecewise.runner import PiecewiseRunner
from fxpatch.verification.report import Row, State, Verification

Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def changing(change: Callable[[torch.Tensor], torch.Tensor], number: int | None = None) -> Backend:
    """A backend that changes the graph's floating results, or the one with this number."""

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def wanted(i: int, value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.is_floating_point() and number in (None, i)

        return lambda *args: tuple(change(each) if wanted(i, each) else each for i, each in enumerate(gm(*args)))

    return backend


def verified(model: Callable[..., Any], inputs: Any, backend: Backend, **options: Any) -> Row:
    given: dict[str, Any] = {"stages": [], "backward": False, "locate": False, **options}
    return row_of(fxpatch.verify(model, inputs, backends={"mine": backend}, **given), "mine")


def row_of(report: Verification, stage: str, direction: str = "forward") -> Row:
    (row,) = (row for row in report.rows if (row.stage, row.direction) == (stage, direction))
    return row


half_more = changing(lambda each: each * 1.5)
right = changing(lambda each: each)

# -- what was not looked at --------------------------------------------------------------------------------------------


def test_nothing_is_right_where_nothing_was_compiled() -> None:
    @torch.compiler.disable
    def untraced(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    report = fxpatch.verify(untraced, rows(), stages=["aot_eager"])
    assert not report.ok
    assert "nothing could run here" in str(report)
    with pytest.raises(fxpatch.errors.WrongResultError):
        report.raise_if_wrong()
    assert not fxpatch.verify(torch.sin, rows(), stages=["captured"]).ok  # the CPU captures nothing


def test_a_model_that_returns_and_writes_nothing_is_undecided() -> None:
    kept: list[torch.Tensor] = []

    def silent(x: torch.Tensor) -> None:
        kept[:] = [x * 2]

    report = fxpatch.verify(silent, rows(), stages=[], backends={"mine": half_more})
    assert row_of(report, "eager twice").state is State.UNDECIDED
    assert "returns nothing that can be compared" in row_of(report, "eager twice").reason
    assert not report.ok


def test_a_tensor_that_takes_the_place_of_a_buffer_is_compared() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.average = self.average * 0.9 + x.mean(0)
            return x + 1

    model = Average()
    row = verified(model, rows(), changing(lambda each: each * 1.5 if each.dim() == 1 else each))
    assert row.difference is not None
    assert "average" in row.difference.where
    assert not model.average.any()


class Cache:
    """Not known to pytree."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


def test_what_is_put_into_arguments_is_compared() -> None:
    def into_dict(x: torch.Tensor, into: dict[str, torch.Tensor]) -> torch.Tensor:
        into["double"] = x * 2
        return x + 1

    def into_object(x: torch.Tensor, into: Cache) -> torch.Tensor:
        into.keys.append(x * 2)
        return x + 1

    for model, into in ((into_dict, {}), (into_object, Cache())):
        rows_ = [verified(model, (rows(), into), changing(lambda each: each * 1.5, number)) for number in (0, 1)]
        assert [row.state for row in rows_] == [State.DIFFERS] * 2
        assert any(row.difference and row.difference.where.startswith("argument") for row in rows_)
        assert verified(model, (rows(), into), right).state is State.AGREES


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("wrap", [Slotted, lambda x: x.numpy(), lambda x: numpy.float32(x.sum().item())])
def test_results_that_are_no_tensors_are_compared(wrap: Callable[[torch.Tensor], Any]) -> None:
    def model(x: torch.Tensor) -> Any:
        return wrap(x * 2)

    assert verified(model, rows(), half_more).state is State.DIFFERS
    assert verified(model, rows(), right).state is State.AGREES


def test_a_copy_in_the_place_of_a_view_is_a_difference() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.add_(1).view(-1), y * 2

    row = verified(model, (rows(), rows()), changing(torch.clone))
    assert str(row.difference) == "result[0]: memory of its own, expected that of argument [0]"
    assert verified(model, (rows(), rows()), right).state is State.AGREES


def test_a_backend_that_is_wrong_from_its_second_call_on_is_found() -> None:
    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept: list[Any] = []

        def run(*args: Any) -> Any:
            kept.append(gm(*args))
            return tuple(each * (1 if len(kept) == 1 else 1.01) for each in kept[-1])

        return run

    row = verified(torch.sin, rows(), backend, locate=True)
    assert row.state is State.DIFFERS
    assert "its first call agrees, and its second does not" in row.reason


@pytest.mark.parametrize("where", ["model", "layer", "wrapped"])
def test_what_is_compiled_already_is_not_taken_for_eager(where: str) -> None:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(first, torch.compile(second, backend=half_more) if where == "wrapped" else second)
    if where != "wrapped":
        {"model": model, "layer": second}[where].compile(backend=half_more)
    report = fxpatch.verify(model, rows(), stages=["aot_eager"], backward=False, reference="float64")
    report.raise_if_wrong()  # the wrong backend has no part in it


class Held:
    """Holds a module and is called."""

    def __init__(self) -> None:
        self.model = network(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


_held = Held()
_global = _held.model


def through_a_global(x: torch.Tensor) -> torch.Tensor:
    return _global(x)


@pytest.mark.parametrize("model", [_held, _held.forward, through_a_global])
def test_what_an_object_holds_and_a_global_reaches_is_the_models(model: Callable[..., Any]) -> None:
    report = fxpatch.verify(model, rows(), stages=["codegen"])
    report.raise_if_wrong()
    assert row_of(report, "codegen", "backward").state is State.AGREES
    assert _global.calls.item() == 0


class Remembering(nn.Module):
    """Keeps its past in an object, in a list, and in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.cache, self.past = Cache(), [torch.zeros(WIDTH)]
        self.cache.keys.append(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.keys[0].add_(1)
        self.cache.keys.append(x.mean(0))
        self.cache.length = len(self.cache.keys)
        self.past.append(x.mean(0) * 2)
        return self.linear(x) + sum(self.cache.keys) + sum(self.past)


def test_what_a_models_objects_remember_is_put_back() -> None:
    model = Remembering()
    fxpatch.verify(model, rows(), stages=["codegen"], backward=False).raise_if_wrong()
    assert list(vars(model.cache)) == ["keys"]
    assert [len(model.cache.keys), len(model.past)] == [1, 1]
    assert not model.cache.keys[0].any()


def test_what_is_written_to_a_models_objects_is_compared() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = Cache()
            self.cache.keys.append(torch.zeros(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache.keys[0].add_(x.sum(0))
            return x + 1

    def dropping(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return lambda *args: gm(*copy.deepcopy(args))

    row = verified(Counting(), rows(), dropping)
    assert row.difference is not None
    assert row.difference.where == "state ['tensor 0 in its objects']"


# -- what is allowed ---------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A bfloat16 model that sums in float32, as every Llama does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = x.float()
            x = x + layer((y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype))
        return x


def test_sums_in_float32_do_not_hide_what_is_wrong_in_bfloat16() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Normed().bfloat16(), torch.randn(64, 256).bfloat16()
    graphs: list[torch.fx.GraphModule] = []
    torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward)(x)
    found = roundings(graphs, backward=True)
    assert found[torch.bfloat16] < 256
    assert found[torch.float32] > 8 * 256
    backends = {"mine": changing(lambda each: each * 1.03), "right": right}  # so many roundings could explain it
    report = fxpatch.verify(model, x, stages=[], backends=backends, backward=False, locate=False)
    assert row_of(report, "mine").state is State.DIFFERS
    assert "further from float64 than eager" in row_of(report, "mine").reason
    assert row_of(report, "right").state is State.AGREES


def test_float32_results_of_bfloat16_are_as_inexact_as_that_where_nobody_decides() -> None:
    graphs: list[torch.fx.GraphModule] = []
    x = rows(64).bfloat16()
    torch.compile(lambda x: (x * 3 + 1).float(), backend=lambda gm, _: graphs.append(gm) or gm.forward)(x)
    expected = torch.ones(4)
    assert compare(expected * 1.01, expected, roundings=roundings(graphs, backward=False)) is not None
    assert compare(expected * 1.01, expected, roundings=roundings(graphs, backward=False, decided=False)) is None


def test_a_float_may_be_off_as_a_float32_may() -> None:
    assert compare(1.0000001, 1.0) is None
    found = compare([1.001], [1.0])
    assert found is not None
    assert (found.kind, found.where) == ("numbers", "[0]")
    assert compare(1.0000001, 1.0, {}) is not None


def test_nested_tensors_are_compared() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    fxpatch.verify(lambda x: x * 2, (x,), stages=["aot_eager"]).raise_if_wrong()
    found = compare(x * 2, x * 3)
    assert found is not None
    assert (found.kind, found.where) == ("numbers", ".values()")


# -- what is no fault --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reshape", [lambda y: y.unsqueeze_(0), lambda y: y.t_()])
def test_a_shape_that_is_changed_in_place_is_no_lie(reshape: Callable[[torch.Tensor], Any]) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        reshape(y)
        return y + 1

    report = fxpatch.verify(model, rows(), stages=["aot_eager"])
    report.raise_if_wrong()


def test_a_default_device_changes_nothing(musa: str) -> None:
    try:
        torch.set_default_device(musa)
        report = fxpatch.verify(network(1).to(musa), rows_on(musa), stages=["aot_eager"], reference="float64")
    finally:
        torch.set_default_device(None)
    report.raise_if_wrong()


def rows_on(device: str) -> torch.Tensor:
    with torch.device("cpu"):
        return rows().to(device)


def test_an_expanded_argument_is_captured(musa: str) -> None:
    x = rows(1).to(musa).expand(4, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()).to(musa)
    report = fxpatch.verify(model, (x,), stages=["captured"], runner={"compiler": "eager"}, backward=False)
    assert row_of(report, "captured").state is State.AGREES


def test_graphs_that_never_read_a_calls_indices_are_found(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PiecewiseRunner.prepare

    def prepare(self: PiecewiseRunner, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        for each in self._made.prepared.captured.values():
            each.fill = lambda leaves, n: None
        return made

    model = nn.Sequential(nn.Embedding(16, WIDTH), nn.Linear(WIDTH, WIDTH)).to(musa)
    ids = torch.arange(3, 15).reshape(4, 3).to(musa)
    options: Any = {"stages": ["captured"], "runner": {"compiler": "eager"}, "backward": False, "locate": False}
    assert row_of(fxpatch.verify(model, ids, **options), "captured").state is State.AGREES
    monkeypatch.setattr(PiecewiseRunner, "prepare", prepare)
    assert row_of(fxpatch.verify(model, ids, **options), "captured").state is State.DIFFERS
