"""Every known miscompile is found and named, and its healthy twin is not."""

from __future__ import annotations

import pytest
import torch
from corpus import CASES, Case

import fxpatch
from fxpatch.errors import WrongResultError
from fxpatch.verification.report import State

NAMES = [case.wrong.__name__ if case.wrong.__name__ != "<lambda>" else case.operator for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_miscompile_is_found_and_its_twin_is_not(case: Case) -> None:
    inputs = case.inputs()
    before = [each.clone() for each in inputs]
    stages = [each for each in case.stages if each != "fakes"]
    report = fxpatch.verify(case.wrong, inputs, stages=stages or ["aot_eager"], backward=False)
    assert all(map(torch.equal, inputs, before))
    assert not report.ok
    found = {row.stage: row for row in report.rows if row.state is State.DIFFERS}
    assert set(found) == set(case.stages), str(report)
    named = [row.operator for row in found.values() if row.operator is not None]
    assert named, str(report)
    for operator in named:
        assert case.operator in (operator.operator, *(each.split(" (")[0] for each in operator.written)), str(report)
        assert operator.certain
        assert "corpus.py:" in operator.line
    with pytest.raises(WrongResultError, match="differs"):
        report.raise_if_wrong()
    if stages == []:
        assert {row.state for row in report.rows if row.stage == "aot_eager"} == {State.UNSAFE}
    twin = fxpatch.verify(case.right, inputs, stages=stages or ["aot_eager"], backward=False)
    assert twin.ok, str(twin)
    twin.raise_if_wrong()
