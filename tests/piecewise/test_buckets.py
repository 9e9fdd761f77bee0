"""Sizes to capture: looked up, thinned, refused."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_configs import builtin_profiles
from fxpatch.errors import BudgetError, FxPatchError, SizesError
from fxpatch.piecewise.buckets import MOST, Buckets, buckets

some_sizes = st.lists(st.integers(2, 3000), min_size=1, max_size=60, unique=True)


@given(some_sizes, st.data())
def test_of_is_the_smallest_size_that_fits(sizes: list[int], data: st.DataObject) -> None:
    chosen = buckets(sizes, profile_sizes=[8])
    n = data.draw(st.integers(0, max(sizes) + 5))
    assert chosen.of(n) == min((size for size in sizes if size >= n), default=None)
    if n <= chosen.largest:
        assert chosen.table[n] == chosen.of(n)
    assert len(chosen.table) == chosen.largest + 1


@given(some_sizes, st.integers(1, 400), st.integers(1, 40))
def test_thinning_keeps_order_ends_and_count(sizes: list[int], budget: int, pieces: int) -> None:
    if budget < pieces:
        with pytest.raises(BudgetError, match=f"{pieces} pieces, each a graph, and a budget of {budget} graphs"):
            buckets(sizes, profile_sizes=[8], budget=budget, pieces=pieces)
        return
    room = budget // pieces
    chosen = buckets(sizes, profile_sizes=[8], budget=budget, pieces=pieces)
    assert len(chosen.sizes) == min(room, len(sizes))
    assert list(chosen.sizes) == sorted(chosen.sizes)
    assert chosen.largest == max(sizes)
    if room > 1:
        assert chosen.sizes[0] == min(sizes)
    assert sorted({*chosen.sizes, *chosen.pruned}) == sorted(sizes)
    assert not {*chosen.sizes} & {*chosen.pruned}
    assert bool(chosen.pruned) == bool(chosen.reason)
    assert buckets(chosen, profile_sizes=[8], budget=budget, pieces=pieces) == chosen


@given(some_sizes, st.integers(2, 60))
def test_thinning_is_even(sizes: list[int], room: int) -> None:
    ordered = sorted(sizes)
    places = [ordered.index(size) for size in buckets(sizes, profile_sizes=[8], budget=room).sizes]
    gaps = {after - before for before, after in pairwise(places)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


@given(st.integers(1, 300), st.integers(1, 64), st.floats(1.01, 8))
def test_geometric_sizes(units: int, align: int, ratio: float) -> None:
    chosen = Buckets.geometric(max=units * align, align=align, ratio=ratio)
    assert chosen.largest == units * align
    assert all(size % align == 0 for size in chosen.sizes)
    assert all(b <= max(a * ratio, a) + align for a, b in pairwise(chosen.sizes))


def test_geometric_by_example() -> None:
    assert Buckets.geometric(max=96, align=8).sizes == (8, 16, 32, 64, 96)
    assert Buckets.geometric(max=8, align=1).sizes == (2, 4, 8)
    assert Buckets.geometric(max=1, align=1).sizes == (1,)
    assert Buckets.geometric(max=12, align=3, ratio=2.5).sizes == (3, 9, 12)
    assert Buckets.geometric(max=32, align=8, ratio=1.01).sizes == (8, 16, 24, 32)
    assert Buckets.geometric(max=10, align=1, ratio=1.5).sizes == (2, 3, 4, 6, 9, 10)


def test_auto_by_example() -> None:
    """Up to the largest call: the profile's sizes below it, and doubled sizes above the profile's."""
    assert buckets("auto", profile_sizes=[2, 4], largest=20).sizes == (2, 4, 8, 16, 20)
    assert buckets("auto", profile_sizes=[2, 4, 8], largest=4).sizes == (2, 4)
    assert buckets("auto", profile_sizes=[8], largest=20).sizes == (8, 16, 20)
    assert buckets("auto", profile_sizes=[2, 4, 8], largest=7).sizes == (2, 4, 7)


def test_limits_that_just_fit() -> None:
    assert MOST == 4_194_304
    assert Buckets((MOST,)).of(MOST) == MOST
    assert buckets([8, 4], profile_sizes=[8], largest=8) == Buckets((4, 8))
    assert buckets([1, 2], profile_sizes=[8], least=1) == Buckets((1, 2))
    assert buckets([2, 4], profile_sizes=[8]) == Buckets((2, 4), (), "")
    assert buckets([2, 4], profile_sizes=[8], budget=1).sizes == (4,)
    assert buckets([2, 4, 8, 16, 32, 64], profile_sizes=[8], budget=4).sizes == (2, 8, 16, 64)


def test_a_reason_is_told_once() -> None:
    all_sizes = Buckets((2, 4, 8, 16, 32))
    assert all_sizes.keep(3, "few").keep(2, "few").reason == "few"
    assert all_sizes.keep(3, "a").keep(2, "b").reason == "a; b"
    assert all_sizes.keep(3, "b").keep(2, "a").reason == "b; a"
    assert all_sizes.keep(5, "few") is all_sizes


def test_buckets_are_values() -> None:
    one = Buckets((2, 4), (8,), "why")
    assert repr(one) == "Buckets(sizes=(2, 4), pruned=(8,), reason='why')"
    assert {one: 1}[Buckets((2, 4), (8,), "why")] == 1
    with pytest.raises(FrozenInstanceError):
        one.sizes = (2,)  # type: ignore[misc]


@given(st.integers(1, 5000))
def test_auto_has_a_size_for_every_call_up_to_the_largest(largest: int) -> None:
    profile = builtin_profiles()["cuda"].capture.sizes
    chosen = buckets("auto", profile_sizes=profile, largest=largest)
    assert chosen.largest == max(largest, 2)
    assert chosen.of(largest) is not None
    assert chosen.of(largest) < 2 * max(largest, 2)
    assert chosen.sizes[0] == 2


def test_auto_is_the_profile_thinned_to_its_budget() -> None:
    for profile in builtin_profiles().values():
        capture = profile.capture
        assert buckets("auto", profile_sizes=capture.sizes).sizes == capture.sizes
        if capture.budget:
            chosen = buckets("auto", profile_sizes=capture.sizes, budget=capture.budget, pieces=400)
            assert len(chosen.sizes) == capture.budget // 400
            assert (chosen.sizes[0], chosen.largest) == (capture.sizes[0], capture.sizes[-1])


def test_one_row_is_padded_to_two() -> None:
    chosen = buckets([8, 1, 4], profile_sizes=[8])
    assert (chosen.sizes, chosen.pruned) == ((2, 4, 8), (1,))
    assert chosen.of(1) == 2
    assert "Dynamo makes a graph of its own for 1" in chosen.reason
    assert buckets([1], profile_sizes=[8]).sizes == (2,)
    assert buckets("auto", profile_sizes=[2, 4], largest=1).sizes == (2,)


def test_what_was_left_out_is_told() -> None:
    chosen = buckets([2, 4, 8, 16, 32], profile_sizes=[8], budget=31, pieces=10)
    assert (chosen.sizes, chosen.pruned) == ((2, 8, 32), (4, 16))
    assert chosen.reason == "10 graphs for each size, and the device has room for 31: 3 of 5 sizes"
    only = buckets([2, 4, 8], profile_sizes=[8], budget=10, pieces=10)
    assert (only.sizes, only.pruned) == ((8,), (2, 4))
    both = buckets(buckets([1, 4, 8], profile_sizes=[8]), profile_sizes=[8], budget=2)
    assert (both.sizes, both.pruned) == ((2, 8), (1, 4))
    assert both.reason.count(";") == 1


def test_a_model_without_graphs_needs_no_budget() -> None:
    assert buckets([2, 4], profile_sizes=[8], budget=1, pieces=0).sizes == (2, 4)


@pytest.mark.parametrize(
    ("sizes", "more", "seen"),
    [
        ([], {}, "no sizes"),
        ([4, 0], {}, "a size of 0"),
        ([4, -8], {}, "a size of -8"),
        ([4, 8, 4], {}, "4 twice"),
        ([4, 8.0], {}, "8.0, a float"),
        ([4, True], {}, "True, a bool"),
        (["4"], {}, "'4', a str"),
        ([MOST + 1], {}, f"a size of {MOST + 1}"),
        ([4, 16], {"largest": 8}, "a size of 16 with largest=8"),
        ("all", {}, "sizes='all'"),
        (64, {}, "sizes=64"),
        (None, {}, "sizes=None"),
        ([4], {"budget": 0}, "budget=0"),
        ([4], {"pieces": -1}, "pieces=-1"),
        ([4], {"largest": 0}, "largest=0"),
        ([4], {"least": None}, "least=None"),
        ([4], {"least": 0}, "least=0"),
        ([4], {"pieces": None}, "pieces=None"),
        ([4], {"budget": True}, "budget=True"),
        ([4], {"budget": 2.0}, "budget=2.0"),
        ([8, 4, 4, 8], {}, "4 twice"),
    ],
)
def test_sizes_that_make_no_sense(sizes: object, more: dict[str, object], seen: str) -> None:
    with pytest.raises(SizesError, match=re.escape(f"seen: {seen}")) as caught:
        buckets(sizes, profile_sizes=[8], **more)
    assert isinstance(caught.value, FxPatchError)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"max": 100, "align": 8}, "take max=104"),
        ({"max": 0}, "correct the arguments"),
        ({"max": 8, "align": -8}, "correct the arguments"),
        ({"max": 8, "ratio": 1.0}, "take 2, or 1.25"),
        ({"max": 8, "ratio": float("nan")}, "take 2, or 1.25"),
        ({"max": 8, "ratio": float("inf")}, "take 2, or 1.25"),
        ({"max": 8, "ratio": 0.5}, "take 2, or 1.25"),
        ({"max": 8, "align": 0}, "correct the arguments"),
        ({"max": 8.0}, "correct the arguments"),
        ({"max": True, "align": 1}, "correct the arguments"),
    ],
)
def test_geometric_arguments_that_make_no_sense(options: dict[str, float], hint: str) -> None:
    with pytest.raises(SizesError, match=re.escape(hint)):
        Buckets.geometric(**options)


def test_buckets_are_ascending_and_nothing_is_smaller_than_nothing() -> None:
    with pytest.raises(SizesError, match="ascending sizes"):
        Buckets((8, 4))
    with pytest.raises(SizesError, match="-1 elements"):
        Buckets((4, 8)).of(-1)
    assert Buckets((4, 8)).of(0) == 4
