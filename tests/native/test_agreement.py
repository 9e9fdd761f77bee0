"""What counts as the same result: rounding does, a factor does not; and copies that keep what a kernel could notice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpatch.native.agreement import TOLERANCES, compare
from fxpatch.native.copies import Saved, same_memory

FLOATS = list(TOLERANCES)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_passes_and_a_factor_does_not(dtype: torch.dtype) -> None:
    exact = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = exact.to(dtype)
    assert compare(rounded, rounded.clone(), TOLERANCES)[1] is None
    once_more = (exact * (1 + torch.finfo(dtype).eps * 0.1)).to(dtype)
    assert compare(rounded, once_more, TOLERANCES)[1] is None
    for factor in (1.1, 0.9, -1.0):
        assert compare(rounded, (exact * factor).to(dtype), TOLERANCES)[1] is not None, factor


def test_a_systematic_error_within_the_rounding_is_seen() -> None:
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    deviation, wrong = compare(exact.bfloat16(), (exact * 1.015).bfloat16(), TOLERANCES)
    assert wrong is not None
    assert wrong.startswith("all of it off by a factor of 1.01")
    assert deviation.relative < 0.03


@pytest.mark.parametrize(
    ("native", "optimized", "wrong"),
    [
        (torch.ones(3), torch.ones(4), "shape (4,), native (3,)"),
        (torch.ones(3), torch.ones(3).double(), "dtype torch.float64, native torch.float32"),
        (torch.ones(3), torch.ones(3, device="meta"), "device device(type='meta'), native device(type='cpu')"),
        (torch.ones(2, 3), torch.ones(3, 2).t(), "strides (1, 2), native (3, 1)"),
        (torch.ones(3, 2).t(), torch.ones(2, 3), None),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), None),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), None),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), "inf or nan in other places"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]), "(1 where native is finite)"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 integers differ, by up to 1"),
        (torch.tensor([True]), torch.tensor([False]), "1 of 1 integers differ"),
        (torch.zeros(3), torch.full((3,), 1e-3), "3 of 3 elements off"),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), "1 of 2 elements off"),
        (torch.empty(0), torch.empty(0), None),
        (3, 3, None),
        (3, 3.0, "3.0 of type float, native int"),
        ("a", "b", "'b', native 'a'"),
        (math.nan, math.nan, None),
        (None, torch.ones(1), "of type Tensor, native NoneType"),
    ],
)
def test_what_differs_is_said(native: Any, optimized: Any, wrong: str | None) -> None:
    _, said = compare(native, optimized, TOLERANCES)
    assert said is None if wrong is None else wrong in str(said)


@given(st.data())
def test_copies_keep_geometry_values_and_shared_memory(data: st.DataObject) -> None:
    storage = torch.arange(512, dtype=torch.float32)
    tensors = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        tensors.append(storage.as_strided(shape, strides, data.draw(st.integers(0, 300))))
    saved = Saved({"all": tensors, "n": 3})
    fresh = saved.fresh()
    copies = fresh.tree["all"]
    for original, copy in zip(tensors, copies, strict=True):
        assert torch.equal(original, copy)
        assert (original.shape, original.stride()) == (copy.shape, copy.stride())
        assert original.storage_offset() % 64 == copy.storage_offset() % 64
        assert not same_memory(original, copy)
        assert not copy._is_view()
    assert all(same_memory(copies[0], other) or not other.numel() for other in copies) or not copies[0].numel()
    for base in fresh.bases:
        base.fill_(-1)
    assert not (storage == -1).any()
    saved.refill(fresh)
    for original, copy in zip(tensors, copies, strict=True):
        assert torch.equal(original, copy)
