"""compare(): what is the same, what is not, where and by how much; against torch.testing and by construction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpatch.difference import Difference, compare
from fxpatch.tolerance import EXACT, TOLERANCES, Tolerance

FLOATS = [dtype for dtype in TOLERANCES if dtype.is_floating_point]
NAN, INF = math.nan, math.inf


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_every_tolerance_is_wider_than_a_unit_and_narrower_than_an_eighth(dtype: torch.dtype) -> None:
    found, eps = TOLERANCES[dtype], torch.finfo(dtype).eps
    assert found.rtol >= eps
    assert found.scale >= min(eps, 3.2e-2)
    if torch.finfo(dtype).bits > 8:
        assert max(found.rtol, found.scale) < 0.125


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str
)
def test_rtol_is_the_default_of_torch_testing(dtype: torch.dtype) -> None:
    from torch.testing._comparison import default_tolerances

    rtol, atol = default_tolerances(dtype)
    assert TOLERANCES[dtype].rtol == rtol
    assert TOLERANCES[dtype].scale >= atol


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float8_and_all_others_are_compared(dtype: torch.dtype) -> None:
    one = tensor(1, 2, 4, 0.5).to(dtype)
    assert compare(one, one.clone()) is None
    other = tensor(1, 2, 4, 1).to(dtype)
    found = compare(other, one)
    assert found is not None
    assert (found.kind, found.index, found.absolute, found.elements, found.of) == ("numbers", (3,), 0.5, 1, 4)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
def test_values_of_any_size_are_compared_by_their_own_scale(magnitude: float) -> None:
    right = torch.linspace(-1, 1, 101, dtype=torch.float64).float() * magnitude
    assert compare(right * (1 + 1e-6), right) is None
    assert compare(right + 5e-6 * magnitude, right) is None
    assert compare(right + 1e-4 * magnitude, right) is not None
    wrong = right.clone()
    wrong[7] *= 1.001
    found = compare(wrong, right)
    assert found is not None
    assert found.index == (7,)
    assert found.relative == pytest.approx(1e-3, rel=1e-3)
    assert found.times > 1


def test_a_small_wrong_gradient_is_found_where_a_fixed_atol_is_blind() -> None:
    right = torch.full((4,), 1e-6)
    torch.testing.assert_close(right * 2, right)  # 1e-5 is more than all of it
    assert compare(right * 2, right) is not None


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.integers(0, 7), st.sampled_from([1, -1]))
def test_the_worst_element_is_named(values: list[float], place: int, sign: int) -> None:
    right = tensor(*values)
    place %= len(values)
    wrong = right.clone()
    wrong[place] += sign * (1 + right.abs().max())
    found = compare(wrong, right)
    assert found is not None
    assert found.index == (place,)
    assert found.elements == 1
    assert found.absolute == float((wrong.double() - right.double())[place].abs())
    assert compare(right, right.clone()) is None


@pytest.mark.parametrize(
    ("seen", "expected", "kind"),
    [
        (tensor(NAN, 1), tensor(NAN, 1), None),
        (tensor(NAN, 1), tensor(1, NAN), "nan"),
        (tensor(1, 1), tensor(NAN, 1), "nan"),
        (tensor(INF, 1), tensor(INF, 1), None),
        (tensor(-INF, 1), tensor(INF, 1), "inf"),
        (tensor(3e38, 1), tensor(INF, 1), "inf"),
        (tensor(INF, 1), tensor(NAN, 1), "nan"),
        (tensor(-0.0, 1), tensor(0.0, 1), None),
        (1 / tensor(-0.0, 1), 1 / tensor(0.0, 1), "inf"),
        (tensor(INF, NAN), tensor(INF, NAN), None),
        (tensor(), tensor(), None),
        (tensor(0, 0), tensor(0, 0), None),
        (tensor(1e-30, 0), tensor(0, 0), "numbers"),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), None),
        (torch.tensor([2**62 + 1]), torch.tensor([2**62]), "numbers"),  # no float64 holds these apart
        (torch.tensor([True]), torch.tensor([False]), "numbers"),
        (torch.tensor([1j]), torch.tensor([1j + 1]), "numbers"),
        (torch.tensor([1.0]), torch.tensor([1]), "dtype"),
        (torch.ones(2), torch.ones(2, 1), "shape"),
        (torch.ones(2, device="meta"), torch.ones(2), "device"),
        (torch.ones(2, 3), torch.ones(3, 2).t(), "strides"),
        (torch.ones(1, 3).t().t(), torch.ones(3, 1).t(), None),  # one row lies anywhere
        (torch.ones(2).to_sparse(), torch.ones(2), "strides"),
        (torch.ones(1), 1.0, "value"),
        (None, torch.ones(1), "value"),
        (1, True, "value"),
        (NAN, NAN, None),
        ("a", "b", "value"),
        ([1, 2], [1, 2, 3], "structure"),
        ([1], (1,), "structure"),
        ({"a": 1}, {"b": 1}, "structure"),
        ([], [], None),
    ],
)
def test_what_counts(seen: Any, expected: Any, kind: str | None) -> None:
    found = compare(seen, expected)
    assert (found and found.kind) == kind
    assert found is None or str(found)


def test_the_place_in_a_tree_is_told() -> None:
    seen = {"a": [torch.ones(2), torch.zeros(2, 2)]}
    expected = {"a": [torch.ones(2), torch.tensor([[0.0, 0.0], [7.0, 0.0]])]}
    found = compare(seen, expected)
    assert found == Difference("numbers", "['a'][1]", "0", "7", (1, 0), 7.0, 1.0, found.times if found else 0, 1, 4)
    assert str(found).startswith("['a'][1]: 1 of 4 elements differ, at [1, 0] 0, expected 7: 7, 1 of it, ")
    assert str(found).endswith("times what is allowed")


def test_a_wrong_dtype_comes_before_wrong_numbers() -> None:
    found = compare([torch.zeros(1), torch.ones(1)], [torch.ones(1), torch.ones(1).double()])
    assert found is not None
    assert found.kind == "dtype"
    assert str(found) == "[1]: dtype torch.float32, expected torch.float64"


def test_strides_can_be_left_out() -> None:
    assert compare(torch.ones(2, 3), torch.ones(3, 2).t(), strides=False) is None


def test_a_dtype_without_tolerance_is_exact() -> None:
    one = torch.ones(2)
    assert compare(one + 1e-7, one, {}) is not None
    assert compare(one, one, {torch.float32: EXACT}) is None


@pytest.mark.parametrize("terms", [10, 1000, 100_000])
@pytest.mark.parametrize("signed", [False, True])
def test_sums_in_another_order_stay_within_the_square_root_of_their_terms(terms: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(terms)
    values = torch.rand(64, terms, generator=generator) - (0.5 if signed else 0)
    one = torch.zeros(64)
    step = max(1, terms // 1000)  # one after the other, in blocks where there are many
    for block in values.split(step, dim=1):
        one += block.sum(1)
    assert compare(one, values.flip(1).double().sum(1).float(), roundings=terms) is None


def test_more_roundings_allow_more_and_never_less() -> None:
    before = Tolerance(1e-3, 4e-3)
    assert before.after(1, 1e-3) == before
    assert before.after(100, 1e-3).scale == pytest.approx(2e-2)
    one = torch.ones(8)
    wrong = one + 3e-5
    assert compare(wrong, one) is not None
    assert compare(wrong, one, roundings=100_000) is None
    assert compare(one * 2, one, roundings=100_000) is not None
