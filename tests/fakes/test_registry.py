"""A fake kernel is registered where the operator exists, has none and hides nothing; and can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fake_kernels import Absent, AlreadyHad, RefusedHidden, Registered, adapter, register_fake_if_exists, unregister


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[torch.library.Library]:
    library = torch.library.Library("fake_test", "DEF")
    yield library
    library._destroy()


def halve(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def defined(library: torch.library.Library, name: str = "halve") -> Any:
    library.define(f"{name}(Tensor x) -> Tensor")
    library.impl(name, lambda x: x[..., : x.shape[-1] // 2].clone(), "CPU")
    return getattr(torch.ops.fake_test, name)


def test_it_traces_while_registered_and_not_afterwards(library: torch.library.Library) -> None:
    halves = defined(library)
    x = torch.randn(4, 6)
    compiled = torch.compile(lambda x: halves(x) + 1, backend="aot_eager", fullgraph=True)
    outcome = register_fake_if_exists("fake_test::halve")(halve)
    assert isinstance(outcome, Registered)
    torch.testing.assert_close(compiled(x), x[:, :3] + 1)
    unregister(outcome)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"fake_test\.halve"):
        compiled(x)


def test_an_overload_is_found_by_its_name(library: torch.library.Library) -> None:
    library.define("halve.wide(Tensor x, int n) -> Tensor")
    assert isinstance(register_fake_if_exists("fake_test::halve")(halve), Absent)
    assert isinstance(register_fake_if_exists("fake_test::halve.wide")(halve), Registered)


def test_an_absent_operator_is_said_to_be_absent() -> None:
    outcome = register_fake_if_exists("no_such_vendor::op")(halve)
    assert isinstance(outcome, Absent)
    assert outcome.reason == "not registered: import the library that brings it first, then register again"


def test_a_fake_that_is_there_is_left_alone(library: torch.library.Library) -> None:
    """torch 2.13's own default would replace it."""
    halves = defined(library)
    assert isinstance(register_fake_if_exists("fake_test::halve")(halve), Registered)
    again = register_fake_if_exists("fake_test::halve")(lambda x: x)
    assert isinstance(again, AlreadyHad)
    assert "has a fake kernel from" in again.reason
    assert halves(torch.empty(2, 4, device="meta")).shape == (2, 2)


@pytest.mark.parametrize("operator", ["aten::mm", "aten::matmul", "aten::add.Tensor"])
def test_torchs_own_operators_need_none(operator: str) -> None:
    overload = operator if "." in operator else f"{operator}.default"
    outcome = register_fake_if_exists(overload)(halve)
    assert isinstance(outcome, AlreadyHad)
    assert "has a kernel for" in outcome.reason


def test_a_hidden_mutation_is_refused(library: torch.library.Library) -> None:
    """The silent bug: with a trivial fake, the call that fills `out` is deleted from compiled code."""
    library.define("fill(Tensor x, Tensor out) -> ()")
    library.impl("fill", lambda x, out: out.copy_(x * 2) and None, "CPU")
    outcome = register_fake_if_exists("fake_test::fill")(lambda x, out: None)
    assert isinstance(outcome, RefusedHidden)
    assert "returns nothing and declares no mutation" in outcome.reason
    assert "Declare what it mutates in its schema" in outcome.reason


def test_a_declared_mutation_needs_none(library: torch.library.Library) -> None:
    library.define("fill(Tensor x, Tensor(a!) out) -> ()")
    outcome = register_fake_if_exists("fake_test::fill")(lambda x, out: None)
    assert isinstance(outcome, AlreadyHad)
    assert "torch makes its fake kernel" in outcome.reason


@pytest.mark.parametrize("operator", ["halve", "fake_test.halve", "::halve", "a::b c", "a::", ""])
def test_a_malformed_name(operator: str) -> None:
    with pytest.raises(ValueError, match=r"expected: 'namespace::name' or 'namespace::name\.overload'"):
        register_fake_if_exists(operator)


def test_a_torch_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_NAMES", ("_library.gone",))
    with pytest.raises(RuntimeError, match=r"no torch\._library\.gone\n  expected: it, as in torch 2.11 to 2.15"):
        register_fake_if_exists("aten::mm")
