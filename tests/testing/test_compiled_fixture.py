"""The fixture `compiled`: what passes, what it notices, and that it compiles at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxpatch.testing.compiled import Compiled, assert_same

inductor = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "pointwise": (lambda x, y: {"sum": x + y, "list": [x.t(), 3]}, lambda: (torch.randn(4, 3), torch.randn(3))),
    "strides": (lambda x: x.relu(), lambda: (torch.randn(6, 4).t()[::2],)),
    "mutation": (lambda x: x[:, 0].add_(1), lambda: (torch.ones(3, 2),)),
    "gradients": (lambda x, y: (x * y).sin(), lambda: (torch.randn(3, requires_grad=True), torch.randn(3))),
    "shared memory": (lambda x, y: (y.mul_(2), x + 1), lambda: (lambda base: (base, base[1:]))(torch.ones(4))),
    "module": (
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.GELU()),
        lambda: (torch.randn(5, 4, requires_grad=True),),
    ),
    "attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda: (torch.randn(1, 2, 5, 8, requires_grad=True),),
    ),
}


@pytest.mark.parametrize("compiled_backend", ["eager", "aot_eager", inductor], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_what_is_right_passes(compiled: Callable[..., Compiled], accelerator: str, case: str) -> None:
    function, arguments = CASES[case]
    torch.manual_seed(0)
    result = compiled(function).check(*arguments())
    leaves = torch.utils._pytree.tree_leaves(result)
    assert {x.device.type for x in leaves if isinstance(x, torch.Tensor)} == {accelerator}


def _by_device(right: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: right(x) if x.device.type == "cpu" else wrong(x)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "value": (_by_device(lambda x: x + 1, lambda x: x + 1.01), "not close"),
    "dtype": (_by_device(lambda x: x + 1, lambda x: (x + 1).double()), "dtype is torch.float64"),
    "shape": (_by_device(lambda x: x + 1, lambda x: (x + 1)[None]), r"shape is \(1, 3, 2\)"),
    "strides": (_by_device(lambda x: x + 1, lambda x: (x + 1).t().contiguous().t()), r"strides is \(1, 3\)"),
    "structure": (_by_device(lambda x: x + 1, lambda x: [x + 1]), "on musa is a"),
    "constant": (_by_device(lambda x: (x + 1, 1), lambda x: (x + 1, 2)), r"result\[1\] is 2 on musa, and 1 on"),
    "mutation": (_by_device(lambda x: x.detach().add_(1), lambda x: x.detach() + 1), "argument, after the call,"),
    "gradient": (_by_device(lambda x: x * 2, lambda x: x.detach() * 2), "requires_grad is False"),
    "its value": (_by_device(lambda x: x * 2, lambda x: x + x.detach()), r"gradient\['\[0\]\[0\]'\]"),
    "host": (_by_device(lambda x: x + 1, lambda x: (x + 1).cpu()), "device is cpu"),
}


@pytest.mark.parametrize("compiled_backend", ["eager"], indirect=True)
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_noticed(compiled: Callable[..., Compiled], what: str) -> None:
    function, message = WRONG[what]
    with pytest.raises(AssertionError, match=message):
        compiled(function).check(torch.randn(3, 2, requires_grad=True))


@pytest.mark.parametrize("compiled_backend", ["eager"], indirect=True)
def test_a_buffer_that_is_not_written_is_noticed(compiled: Callable[..., Compiled]) -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type == "cpu":
                self.calls.add_(1)
            return x * 2

    with pytest.raises(AssertionError, match=r"buffer\['calls'\]"):
        compiled(Counts()).check(torch.ones(2))


@pytest.mark.parametrize("compiled_backend", ["eager"], indirect=True)
def test_a_graph_break_is_an_error_unless_asked_for(compiled: Callable[..., Compiled]) -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(breaks).check(torch.ones(2))
    compiled(breaks, fullgraph=False).check(torch.ones(2))


@pytest.mark.parametrize("compiled_backend", ["aot_eager"], indirect=True)
def test_it_compiles_once_under_an_installation_of_its_own(compiled: Callable[..., Compiled], accelerator: str) -> None:
    from fxpatch.installer import current

    installation = current()
    assert installation is not None
    assert installation.facts.device == accelerator
    torch._dynamo.utils.counters.clear()
    double = compiled(lambda x: x * 2)
    x = torch.ones(3, device=accelerator)
    assert double(x).tolist() == double(x).tolist() == [2, 2, 2]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nothing_stays_installed_between_tests() -> None:
    from fxpatch.installer import current

    assert current() is None


def test_values_that_are_no_tensors_are_compared() -> None:
    assert_same("result", [float("nan"), "a"], [float("nan"), "a"], "musa")
    with pytest.raises(AssertionError, match=r"result\[1\] is 'b' on musa, and 'a' on the CPU"):
        assert_same("result", [1, "b"], [1, "a"], "musa")
