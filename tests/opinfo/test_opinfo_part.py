"""A fixed part of the operator suites: every operator and module eagerly, with few samples, and some compiled."""

from __future__ import annotations

import dataclasses

import pytest

from opinfo import expected, plan, worker
from opinfo.cases import COMPILED, STAGES
from opinfo.expected import judge
from opinfo.pool import run_all
from opinfo.results import Result

EAGER = [stage for stage in STAGES if stage not in COMPILED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", EAGER)
def test_a_few_operators_in_this_process(musa: str, stage: str) -> None:
    """The quick part of this file: every fortieth operator, one sample."""
    cases = [case for case in plan.part([]) if case.stage == stage and case.suite == "op"][::40]
    results = [worker.run(dataclasses.replace(case, samples=1), musa) for case in cases]
    assert len(results) >= 9
    assert judge(results, expected.load()).unlisted == ()


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """What came of the part; it is run once."""
    return run_all(plan.part(expected.load()), "musa")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_fails_is_what_is_listed(results: list[Result], stage: str) -> None:
    here = [result for result in results if result.case.stage == stage]
    assert len(here) >= 5
    judgement = judge(here, expected.load())
    assert judgement, str(judgement)


@pytest.mark.slow
def test_nothing_crashes_or_hangs(results: list[Result]) -> None:
    assert [str(result.case) for result in results if result.outcome in ("crashed", "hung")] == []


@pytest.mark.slow
def test_errors_are_rare(results: list[Result]) -> None:
    """Both sides raising the same proves little; if the harness made a wrong call, that is what would be seen."""
    assert sum(result.raised for result in results) < 0.01 * sum(result.samples for result in results)
