"""The decision table: applied, taken back, searched by bisection, shown."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection

import operators_zoo as zoo
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxpatch.native import Decision, Decisions, Deviation, find_operators
from fxpatch.native.bisection import culprits


def made(count: int) -> Decisions:
    """A model of `count` operators, all promoted."""
    operators = find_operators(zoo.Model(*[zoo.Good] * count), "musa")
    error = Deviation(1e-6, 2e-7)
    passed = ("optimized", "passed", error, 2.0, "replay")
    rows = [Decision(op.name, op.kind, op.optimized_name, *passed) for op in operators]
    return Decisions(operators, rows)


def ran(decisions: Decisions) -> list[str]:
    """Which forward each operator runs now."""
    return [op.module.forward.__name__.removeprefix("forward_") for op in decisions.operators.values()]


def test_apply_runs_the_promoted_and_only_them() -> None:
    decisions = made(3)
    decisions.demote("layers.1", "because")
    before = ran(decisions)
    with decisions.apply():
        assert ran(decisions) == ["musa", "native", "musa"]
        with decisions.apply({"layers.2"}):
            assert ran(decisions) == ["native", "native", "musa"]
        assert ran(decisions) == ["musa", "native", "musa"]
    assert ran(decisions) == before
    with pytest.raises(KeyError, match=r"not promoted: layers\.1"), decisions.apply({"layers.1"}):
        pass
    assert ran(decisions) == before


def test_demote_keeps_what_was_measured() -> None:
    decisions = made(2)
    decisions.demote("layers.0", "the capture of size 8 failed")
    row = decisions["layers.0"]
    assert (row.chosen, row.reason, row.speed) == ("native", "the capture of size 8 failed", 2.0)
    assert decisions.promoted == ("layers.1",)
    with pytest.raises(KeyError):
        decisions.demote("layers.9", "")


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_bisect_finds_one(count: int) -> None:
    for guilty in range(count):
        decisions = made(count)
        found = decisions.bisect(lambda names, bad=f"layers.{guilty}": bad in names, "the capture of size 4")
        assert found.culprits == (f"layers.{guilty}",)
        assert found.tries <= 4 + count.bit_length()
        assert decisions[f"layers.{guilty}"].reason == "breaks the capture of size 4: found by bisection"
        assert len(decisions.promoted) == count - 1
        assert str(found).startswith(f"broken by layers.{guilty}: demoted; works with the others optimized (")


def test_bisect_finds_two_and_no_more() -> None:
    for pair in itertools.combinations(range(9), 2):
        decisions, bad = made(9), {f"layers.{n}" for n in pair}
        found = decisions.bisect(lambda names, bad=bad: bool(bad & names))
        assert set(found.culprits) == bad
        assert set(decisions.promoted) == {f"layers.{n}" for n in range(9)} - bad


def test_bisect_of_two_that_fail_only_together_demotes_one() -> None:
    decisions = made(8)
    found = decisions.bisect(lambda names: {"layers.2", "layers.5"} <= names)
    assert found.culprits == ("layers.5",)
    assert decisions["layers.5"].reason == "breaks a later capture, together with layers.2: found by bisection"


def test_bisect_blames_nobody_for_what_fails_anyway() -> None:
    decisions = made(4)
    found = decisions.bisect(lambda names: True)
    assert (found.culprits, found.fails_without) == ((), True)
    assert str(found) == "fails with every operator native too: no optimized forward is to blame (2 tries)"
    assert len(decisions.promoted) == 4
    found = decisions.bisect(lambda names: False)
    assert str(found) == "does not fail with the promoted operators (1 try)"
    assert not found.fails_without


def test_a_search_that_is_interrupted_keeps_what_it_found() -> None:
    decisions = made(8)

    def failing(names: set[str]) -> bool:
        if "layers.6" not in names:
            raise ConnectionError("a rank has gone")
        return True

    with pytest.raises(ConnectionError):
        decisions.bisect(failing)
    assert len(decisions.promoted) == 8


@given(conflicts=st.lists(st.frozensets(st.integers(0, 11), min_size=1, max_size=3), min_size=1, max_size=4))
def test_after_a_search_it_works_and_each_culprit_is_needed(conflicts: list[frozenset[int]]) -> None:
    names = [str(n) for n in range(12)]
    conflicts_by_name = [{str(n) for n in conflict} for conflict in conflicts]

    def fails(some: Collection[str]) -> bool:
        return any(conflict <= set(some) for conflict in conflicts_by_name)

    blamed: list[tuple[str, tuple[str, ...]]] = []
    found = culprits(names, fails, lambda name, along: blamed.append((name, along)))
    assert not fails(set(names) - set(found.culprits))
    for name, along in blamed:
        assert fails({name, *along})
        assert not fails(set(along))


def test_the_table_as_text_and_as_json() -> None:
    decisions = made(2)
    decisions.demote("layers.1", "differs from native")
    assert str(decisions) == (
        "operator         chosen     error          speed         reason\n"
        "layers.0 (Good)  optimized  1e-06 / 2e-07  2.00x replay  passed\n"
        "layers.1 (Good)  native     1e-06 / 2e-07  2.00x replay  differs from native"
    )
    rows = json.loads(json.dumps(decisions.rows()))
    assert rows[1] == {
        "operator": "layers.1", "kind": "Good", "optimized": "forward_musa", "chosen": "native",
        "reason": "differs from native", "error": {"absolute": 1e-6, "relative": 2e-7}, "speed": 2.0,
        "measured": "replay",
    }  # fmt: skip
    empty = Decisions([], [])
    assert str(empty) == "no operators with a native and an optimized forward"
