"""Random models through the runner, replayed in random order, equal the models themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise_models import MIXING, RETURNS, ROWWISE, WIDTH, RandomModel, Step, assert_same, runner_of

import fxpatch

EXAMPLES = max(4, settings.default.max_examples // 33)
LARGEST = 9


@st.composite
def models(draw: st.DrawFn, *, mixing: bool) -> RandomModel:
    numbers = st.integers(0, 11)
    kinds = st.sampled_from([*ROWWISE, *MIXING] if mixing else [*ROWWISE])
    steps = draw(st.lists(st.builds(Step, kinds, numbers, numbers), min_size=1, max_size=8))
    if mixing:
        where = draw(st.integers(0, len(steps)))
        steps.insert(where, Step(draw(st.sampled_from([*MIXING])), draw(numbers), draw(numbers)))
    picks = draw(st.lists(numbers, max_size=2))
    return RandomModel(tuple(steps), tuple(picks), draw(st.sampled_from([*RETURNS])))


sizes = st.lists(st.integers(1, LARGEST), min_size=1, max_size=4, unique=True)
calls = st.lists(st.integers(0, LARGEST + 2), min_size=3, max_size=10)
seeds = st.integers(0, 2**16)


def compare(model: RandomModel, device: str, ns: list[int], example: int, seed: int, **options: Any) -> Any:
    """Calls a runner and the model, with all that both have written; returns the runner."""
    random = torch.Generator().manual_seed(seed)
    model = model.to(device)
    twin = copy.deepcopy(model)
    cache = torch.ones(3, WIDTH, device=device)
    twin_cache = cache.clone()
    runner = runner_of(model, **options)
    x = torch.randn(example, WIDTH, generator=random).to(device)
    before = x.clone()
    runner.prepare(x, cache)
    assert_same((x, cache, dict(model.named_buffers())), (before, twin_cache, dict(twin.named_buffers())))
    assert runner.state == "prepared", runner.report
    for n in ns:
        x = torch.randn(n, WIDTH, generator=random).to(device)
        twin_x = x.clone()
        with torch.no_grad():
            expected = twin(twin_x, twin_cache)
        assert_same(runner(x, cache), expected)
        assert_same((x, cache, dict(model.named_buffers())), (twin_x, twin_cache, dict(twin.named_buffers())))
    assert sum(runner.counts.values()) == len(ns)
    return runner


def fitting(sizes: list[int], ns: list[int]) -> int:
    """How many calls a captured size serves."""
    return sum(1 <= n <= max(2, *sizes) for n in ns)


@settings(max_examples=EXAMPLES)
@given(models(mixing=False), sizes, calls, st.integers(2, LARGEST), seeds)
def test_recorded(model: RandomModel, sizes: list[int], ns: list[int], example: int, seed: int) -> None:
    runner = compare(model, "cpu", ns, example, seed, sizes=sizes)
    assert runner.counts["captured"] == fitting(sizes, ns), runner.report


@settings(max_examples=EXAMPLES)
@given(models(mixing=True), sizes, calls, st.integers(2, LARGEST), seeds)
def test_recorded_where_rows_look_at_one_another(
    model: RandomModel, sizes: list[int], ns: list[int], example: int, seed: int
) -> None:
    compare(model, "cpu", ns, example, seed, sizes=sizes)


@settings(max_examples=EXAMPLES)
@given(models(mixing=False), sizes, calls, st.integers(2, LARGEST), seeds)
def test_captured_on_the_simulated_device(
    musa: str, model: RandomModel, sizes: list[int], ns: list[int], example: int, seed: int
) -> None:
    fxpatch.simulate(musa, strict=True)
    try:
        runner = compare(model, musa, ns, example, seed, sizes=sizes, graphs="device")
        runner.release()
    finally:
        fxpatch.simulate(musa, strict=False)
    assert runner.counts["captured"] == fitting(sizes, ns), runner.report


@settings(max_examples=EXAMPLES)
@given(models(mixing=True), sizes, calls, st.integers(2, LARGEST), seeds)
def test_captured_where_rows_look_at_one_another(
    musa: str, model: RandomModel, sizes: list[int], ns: list[int], example: int, seed: int
) -> None:
    fxpatch.simulate(musa, strict=True)
    try:
        compare(model, musa, ns, example, seed, sizes=sizes, graphs="device").release()
    finally:
        fxpatch.simulate(musa, strict=False)


@settings(max_examples=max(4, EXAMPLES // 3))
@given(models(mixing=True), calls, st.integers(2, LARGEST), seeds, st.sampled_from(["none", "recorder"]))
def test_compiled_with_aot_eager(model: RandomModel, ns: list[int], example: int, seed: int, graphs: str) -> None:
    compare(model, "cpu", ns, example, seed, graphs=graphs, compiler="aot_eager")


@pytest.mark.slow
@settings(max_examples=4)
@given(models(mixing=False), calls, st.integers(2, LARGEST), seeds)
def test_compiled_with_inductor(model: RandomModel, ns: list[int], example: int, seed: int) -> None:
    compare(model, "cpu", ns, example, seed, graphs="none", compiler="inductor")


@pytest.mark.parametrize("kind", MIXING)
def test_only_exact_sizes_are_replayed_where_rows_look_at_one_another(kind: str) -> None:
    model = RandomModel((Step("one", 0, 0), Step(kind, 1, 0)), (), "one")
    runner = compare(model, "cpu", [2, 3, 4, 5, 8, 1], 5, 0)
    assert runner.counts["captured"] == 3
    assert runner.counts["compiled: padding changes the results, and n is no captured size"] == 2
    assert runner.counts["original: padding changes the results, and n is no captured size"] == 1
    assert "only exact sizes are replayed: " in str(runner.report)


@pytest.mark.parametrize("kind", ROWWISE)
def test_padding_is_used_where_it_changes_nothing(kind: str) -> None:
    model = RandomModel((Step("one", 0, 0), Step(kind, 1, 0)), (1,), "tuple")
    runner = compare(model, "cpu", [2, 3, 4, 5, 8, 1], 5, 0)
    assert runner.counts == {"captured": 6}, runner.report
