"""What a runner is asked that makes no sense: typed errors that say what was seen, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from piecewise_models import assert_same, check, ops, runner_of

from fxpatch.errors import (
    BusyError,
    CompileError,
    FxPatchError,
    InputError,
    NoProfileError,
    NotPreparedError,
    OptionError,
    SizesError,
    SplitError,
)


def model(x: torch.Tensor, y: torch.Tensor | None = None, scale: float = 2.0) -> torch.Tensor:
    return ops.functional(x) * scale + (0 if y is None else y)


def prepared(**options: Any) -> Any:
    runner = runner_of(model, **options)
    runner.prepare(torch.randn(5, 4))
    return runner


X = torch.zeros(5, 4)
MAKING: dict[str, tuple[type[FxPatchError], Callable[[], Any], str]] = {
    "a dynamic dimension that is not there": (
        InputError,
        lambda: runner_of(model, dynamic={"x": 2}).prepare(X),
        r"`dynamic` does not fit.*seen: dimension 2 of x, which is \[5, 4\].*expected: a dimension it has.*to do: give",
    ),
    "a dynamic parameter that is not there": (
        InputError,
        lambda: runner_of(model, dynamic={"z": 0}).prepare(X),
        r"seen: z: no such parameter.*expected: some of x, y, scale",
    ),
    "a dynamic parameter that is no tensor": (
        InputError,
        lambda: runner_of(model, dynamic={"x": 0, "scale": 0}).prepare(X),
        r"seen: scale: no tensor in the example",
    ),
    "nothing dynamic": (
        InputError,
        lambda: runner_of(model, dynamic={}).prepare(X),
        r"seen: no dynamic dimension.*expected: one size, n",
    ),
    "dynamic dimensions of two sizes": (
        InputError,
        lambda: runner_of(model, dynamic={"x": (0, 1)}).prepare(X),
        r"seen: x.shape\[0\] = 5, x.shape\[1\] = 4.*expected: one size, n, in all dynamic dimensions",
    ),
    "an example of one row": (
        InputError,
        lambda: runner_of(model).prepare(X[:1]),
        r"The example is too short.*seen: n = 1.*at least 2 elements.*a size of 1 is traced as a constant",
    ),
    "an example that lacks an argument": (
        InputError,
        lambda: runner_of(model).prepare(),
        r"seen: missing a required argument: 'x'",
    ),
    "no sizes": (SizesError, lambda: runner_of(model, sizes=[]).prepare(X), r"seen: no sizes.*expected: at least one"),
    "a negative size": (
        SizesError,
        lambda: runner_of(model, sizes=[4, -2]).prepare(X),
        r"seen: a size of -2.*sizes above 0",
    ),
    "a size twice": (
        SizesError,
        lambda: runner_of(model, sizes=[4, 2, 4]).prepare(X),
        r"seen: 4 twice.*each size once",
    ),
    "a size that is no int": (
        SizesError,
        lambda: runner_of(model, sizes=[4.0]).prepare(X),
        r"seen: 4.0, a float.*write int\(size\)",
    ),
    "an unknown splitting operator": (
        SplitError,
        lambda: runner_of(model, split=["piecewise_tests::nothing"]).prepare(X),
        r"This cannot split a graph.*seen: 'piecewise_tests::nothing'.*to do: import the library that registers",
    ),
    "an unknown overload": (
        SplitError,
        lambda: runner_of(model, split=["piecewise_tests::functional.other"]).prepare(X),
        r"seen: 'piecewise_tests::functional.other'",
    ),
    "no rule": (SplitError, lambda: runner_of(model, split=[3]).prepare(X), r"seen: 3.*a function of a node"),
    "an unknown compiler": (
        CompileError,
        lambda: runner_of(model, compiler="nvcc").prepare(X),
        r"no compiler of pieces.*seen: 'nvcc'.*expected: one of 'inductor', 'aot_eager', 'eager'",
    ),
    "an unknown way for inputs": (
        OptionError,
        lambda: runner_of(model, inputs="borrow"),
        r"A runner cannot have inputs='borrow'.*expected: one of 'copy', 'static'",
    ),
    "unknown graphs": (
        OptionError,
        lambda: runner_of(model, graphs="cuda"),
        r"graphs='cuda'.*'device', 'recorder', 'none'",
    ),
    "an unknown way with errors": (
        OptionError,
        lambda: runner_of(model, on_error="warn"),
        r"on_error='warn'.*'fallback', 'raise'",
    ),
    "an example on no device with a profile": (
        NoProfileError,
        lambda: runner_of(model).prepare(X.to("meta")),
        r"which compile profile is meant.*seen: tensors on meta.*pass profile=",
    ),
    "static inputs that are too short": (
        InputError,
        lambda: runner_of(model, inputs="static").prepare(X),
        r"seen: n = 5.*expected: 8: with inputs='static' graphs read the example's own memory",
    ),
    "a call before prepare": (
        NotPreparedError,
        lambda: runner_of(model)(X),
        r"has not been prepared.*seen: prepare\(\) has not been called.*call runner.prepare\(\*\*example\) once",
    ),
    "recapture before prepare": (NotPreparedError, lambda: runner_of(model).recapture(), r"nothing to capture again"),
}
CALLING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another dtype": (lambda r: r(X.double()), r"seen: x is torch.float64, and was torch.float32"),
    "another device": (lambda r: r(X.to("meta")), r"seen: x is on meta, and was on cpu"),
    "another rank": (lambda r: r(X[0]), r"seen: x has 1 dimensions, and had 2"),
    "another static size": (lambda r: r(X[:, :3]), r"seen: x is \[5, 3\], and has to be \[n, 4\]"),
    "no tensor": (lambda r: r(3), r"seen: x is a int, and was a tensor"),
    "another structure": (lambda r: r([X]), r"seen: arguments in the form"),
    "another constant": (
        lambda r: r(X, scale=3.0),
        r"seen: scale is 3.0.*expected: 2.0: what is no tensor is a constant",
    ),
    "a constant of another type": (lambda r: r(X, scale=2), r"seen: scale is 2"),
    "a tensor for None": (lambda r: r(X, X), r"seen: y is "),
    "an unknown argument": (lambda r: r(X, z=1), r"seen: got an unexpected keyword argument 'z'"),
}


@pytest.mark.parametrize("what", MAKING)
@pytest.mark.parametrize("on_error", ["fallback", "raise"])
def test_a_request_that_makes_no_sense(what: str, on_error: str) -> None:
    kind, act, words = MAKING[what]
    with pytest.raises(kind, match=f"(?s){words}") as caught:
        act()
    assert caught.type is kind
    assert all((caught.value.seen, caught.value.expected, caught.value.hint))


@pytest.mark.parametrize("what", CALLING)
def test_a_call_that_was_not_prepared(what: str) -> None:
    act, words = CALLING[what]
    runner = prepared()
    with pytest.raises(InputError, match=f"(?s)This call is not the one that was prepared.*{words}"):
        act(runner)
    check(runner, model, lambda n: (torch.randn(n, 4),), [4, 3])
    assert runner.counts == {"captured": 2}


def test_n_above_the_largest_size_is_counted() -> None:
    runner = prepared()
    check(runner, model, lambda n: (torch.randn(n, 4),), [9, 100, 8])
    assert runner.counts == {"captured": 1, "original: n is above the largest size": 2}


def test_no_rows_are_counted() -> None:
    runner = prepared()
    check(runner, model, lambda n: (torch.randn(n, 4),), [0])
    assert runner.counts == {"original: n is 0, and in a padded call the model would see a row": 1}


def test_a_failed_prepare_leaves_a_runner_that_says_so_and_can_be_prepared() -> None:
    runner = prepared()
    with pytest.raises(InputError, match="The example is too short"):
        runner.prepare(X[:1])
    with pytest.raises(NotPreparedError, match=r"seen: prepare\(\) has failed with InputError"):
        runner(X)
    runner.prepare(X)
    check(runner, model, lambda n: (torch.randn(n, 4),), [4])


def test_a_model_that_calls_its_own_runner() -> None:
    runner = prepared()
    from piecewise_models import fault

    def again(x: torch.Tensor) -> None:
        runner(x)

    nested = runner_of(lambda x: ops.fallible(x, 7))
    nested.prepare(X)
    with (
        fault(7, lambda x: nested(x)),
        pytest.raises(BusyError, match="one call at a time: its graphs work in the same memory"),
    ):
        nested(X)
    with fault(7, again):
        nested(X)


class Opaque:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("on_error", ["fallback", "raise"])
def test_outputs_that_are_no_tensor_tree(on_error: str) -> None:
    def opaque(x: torch.Tensor) -> Opaque:
        return Opaque(x + 1)

    runner = runner_of(opaque, on_error=on_error)
    words = r"(?s)What the model returns cannot be told from its graph.*an? Opaque.*register the class"
    if on_error == "raise":
        with pytest.raises(FxPatchError, match=words.split(".*")[0]):
            runner.prepare(X)
        return
    assert "not prepared" in runner.prepare(X).state
    assert torch.equal(runner(X).x, X + 1)
    assert runner.counts == {"original: the model could not be traced, split or compiled": 1}


UNTRACEABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "a branch on data": (lambda x: x + 1 if x.sum() > 0 else x - 1, "data-dependent"),
    "a branch on n": (lambda x: x + 1 if x.shape[0] > 4 else x - 1, "5 <= x.size()[0]"),
    "a size that has to be divisible": (
        lambda x: x.view(x.shape[0] // 5, 5, 4) + 1,
        "satisfy the generated guard (4*x.size()[0]) == (20*(x.size()[0] // 5))",
    ),
    "a constant size": (lambda x: x + torch.ones(5, 4), "constant"),
    "a list outside": (lambda x: (LIST.append(x), x + 1)[1], "changes what is no tensor"),
}
LIST: list[torch.Tensor] = []


@pytest.mark.parametrize("what", UNTRACEABLE)
def test_what_one_graph_cannot_say_for_every_n_runs_as_it_is(what: str) -> None:
    function, words = UNTRACEABLE[what]
    runner = runner_of(function)
    report = runner.prepare(torch.ones(5, 4))
    assert report.state == "not prepared: calls go to the original function"
    assert words in str(report)
    with pytest.raises(FxPatchError, match="cannot be traced whole"):
        runner_of(function, on_error="raise").prepare(torch.ones(5, 4))
    check(runner, function, lambda n: (torch.ones(n, 4),), [5])


def test_a_list_of_one_tensor_is_an_argument_like_another(musa: str) -> None:
    """It has one leaf, as a tensor has, and is none."""
    runner = runner_of(lambda x, cache: x + cache[0], graphs="none")
    x, cache = torch.randn(3, 4).to(musa), [torch.randn(4).to(musa)]
    runner.prepare(x, cache)
    assert_same(runner(x, cache), x + cache[0])
    with pytest.raises(InputError):
        runner(x, cache[0])
