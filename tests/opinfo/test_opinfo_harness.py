"""The harness can fail: every kind of wrong device is found, every kind of death survived, the list kept true."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opinfo import expected, table
from opinfo.cases import Case, applies, chosen, infos
from opinfo.compare import Verdict, differences, observe
from opinfo.expected import Expected, judge
from opinfo.mirror import mirror
from opinfo.plan import complete, part
from opinfo.pool import Worker, run_all
from opinfo.results import CPU_FAILS, FAILED, PASSED, Result

_FAULTY = (sys.executable, "-m", "opinfo.faulty")


# -- one comparison ---------------------------------------------------------------------------------


def _verdict(mine: Callable[..., Any], theirs: Callable[..., Any], *arguments: torch.Tensor) -> str:
    here, there = mirror(arguments, "cpu"), mirror(arguments, "cpu")
    return "; ".join(
        differences(observe(lambda: mine(*here), here), observe(lambda: theirs(*there), there), "cpu").problems
    )


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("mine", "theirs", "problem"),
    [
        (lambda x: x + 1, lambda x: x + 1.1, "result 0: Tensor-likes are not close"),
        (lambda x: x + 1, lambda x: (x + 1).double(), "result 0: dtype torch.float64, expected torch.float32"),
        (lambda x: x + 1, lambda x: (x + 1)[:1], "result 0: shape (1, 3), expected (2, 3)"),
        (lambda x: x + 1, lambda x: (x + 1).mT.contiguous().mT, "result 0: strides (1, 2), expected (3, 1)"),
        (lambda x: x + 1, lambda x: (x + 1).to("meta"), "result 0: device meta, expected cpu"),
        (lambda x: x + 1, lambda x: (x + 1).requires_grad_(), "result 0: requires_grad True, expected False"),
        (lambda x: x.mT, lambda x: x.mT.clone(), "shares memory as {}, expected {'result 0': ('argument 0', 0, True)}"),
        (lambda x: x[1:], lambda x: x[:1], "shares memory as {'result 0': ('argument 0', 0, True)}"),
        (lambda x: x.detach().zero_(), lambda x: x.zero_(), ""),
        (lambda x: x.zero_(), lambda x: torch.zeros_like(x), "argument 0: Tensor-likes are not close"),
        (lambda x: x.sum().item(), lambda x: x.sum().item() + 1, ", expected "),
        (lambda x: (x, x + 1), lambda x: [x, x + 1], "returned "),
        (lambda x: x.unbind(), lambda x: x.unbind()[:1], "returned "),
        (lambda x: _raise(ValueError("a")), lambda x: x, "no error, expected ValueError: a"),
        (lambda x: x, lambda x: _raise(ValueError("a")), "ValueError: a, expected no error"),
        (lambda x: _raise(ValueError("a")), lambda x: _raise(TypeError("b")), "TypeError: b, expected ValueError: a"),
        (lambda x: _raise(ValueError("a")), lambda x: _raise(ValueError("b")), ""),
        (lambda x: x / 0 * 0, lambda x: x / 0 * 0, ""),
    ],
)
def test_what_differs_is_said(mine: Callable[..., Any], theirs: Callable[..., Any], problem: str) -> None:
    said = _verdict(mine, theirs, torch.arange(6.0).reshape(2, 3))
    assert problem in said
    assert bool(said) == bool(problem)


@pytest.mark.parametrize(
    ("a", "b", "exact"),
    [
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        (float("inf"), float("inf"), True),
        (1.0, 1.0 + 2**-23, False),
    ],
)
def test_close_is_not_exact(a: float, b: float, exact: bool) -> None:
    verdict = differences(observe(lambda: torch.tensor([a, 1.0])), observe(lambda: torch.tensor([b, 1.0])), "cpu")
    assert verdict == Verdict(close=not exact)


@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_a_copy_has_the_same_storages_and_geometry(musa: str, device: str) -> None:
    """Also where `.to` would make dense what was not, and part what shared memory."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = [base[1:, ::2], base.mT, base[0, :1].expand(3, 4), torch.tensor(1.5), torch.empty(0, 3), base[:2]]
    copies, name = mirror((tensors, "cpu"), device)
    assert name == torch.device(device)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.device.type == device
        assert (copy.shape, copy.stride(), copy.storage_offset()) == (
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset(),
        )
        assert copy.tolist() == tensor.tolist()
        assert copy.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    copies[0].fill_(7)
    assert copies[1][0, 1].item() == 7
    assert base[1, 0] == 6


# -- a wrong device -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> dict[tuple[str, str], Result]:
    """What comes of a few cases on a device that is wrong on purpose."""
    stages = {
        "forward": ("sin", "cos", "tan", "ceil", "atan", "asin", "transpose", "abs"),
        "variants": ("neg", "exp", "abs"),
        "backward": ("sigmoid", "abs"),
        "aot_eager": ("sin", "nn.functional.gaussian_nll_loss"),
    }
    cases = [Case("op", name, stage, "float32", 2) for stage, names in stages.items() for name in names]
    results = run_all(cases, "musa", limit=lambda case: 120 if case.name != "asin" else 3, command=_FAULTY)
    return {(result.case.name, result.case.stage): result for result in results}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "outcome", "problem"),
    [
        ("sin", "forward", "failed", r"result 0: Tensor-likes are not close"),
        ("cos", "forward", "failed", r"result 0: dtype torch.float64, expected torch.float32"),
        ("tan", "forward", "failed", r"result 0: strides"),
        ("ceil", "forward", "failed", r"ValueError: no such kernel, expected no error"),
        ("transpose", "forward", "failed", r"shares memory as \{\}"),
        ("neg", "variants", "failed", r"argument 0: Tensor-likes are not close"),
        ("exp", "variants", "failed", r"argument \d+: Tensor-likes are not close"),
        ("sigmoid", "backward", "failed", r"result 0: Tensor-likes are not close"),
        ("sin", "aot_eager", "failed", r"result 0: Tensor-likes are not close"),
        ("nn.functional.gaussian_nll_loss", "aot_eager", "cpu fails", r"on the CPU: UserError: .*data-dependent"),
        ("atan", "forward", "crashed", r"SIGABRT: .*Fatal Python error"),
        ("asin", "forward", "hung", r"no result after 3 seconds"),
    ],
)
def test_a_wrong_kernel_is_a_failure(
    faulty: dict[tuple[str, str], Result], name: str, stage: str, outcome: str, problem: str
) -> None:
    result = faulty[name, stage]
    assert result.outcome == outcome
    assert re.search(problem, " ".join(result.problems), re.DOTALL)


@pytest.mark.slow
def test_a_crash_takes_no_other_case_along(faulty: dict[tuple[str, str], Result]) -> None:
    assert {faulty["abs", stage].outcome for stage in ("forward", "variants", "backward")} == {PASSED}


def test_a_worker_that_cannot_start_is_a_crash() -> None:
    case = Case("op", "abs", "forward", "float32", 1)
    (result,) = run_all([case], "musa", workers=1, command=(sys.executable, "-c", "raise SystemExit(3)"))
    assert result.outcome == "crashed"
    assert result.problems == ["the worker does not start: exit status 3: "]
    assert not result.ok


@pytest.mark.slow
def test_what_an_operator_prints_is_not_a_reply() -> None:
    code = """
import os
from opinfo import eager, worker
run = eager.run
eager.run = lambda case, device: (os.write(1, b"printed\\n"), run(case, device))[1]
worker.main("cpu")
"""
    worker = Worker("cpu", (sys.executable, "-c", code))
    try:
        assert worker.run(Case("op", "abs", "forward", "float32", 1), limit=60).outcome == PASSED
    finally:
        worker.end()


# -- the list -------------------------------------------------------------------------------------------


def _result(outcome: str, name: str = "abs") -> Result:
    return Result(Case("op", name, "forward", "float32", 3), outcome)


def test_the_list_holds_in_both_directions() -> None:
    listed = [Expected("op", "abs", ("forward",), ("float32",), "a reason")]
    assert judge([_result(FAILED)], listed)
    assert judge([_result(PASSED, "sin"), _result(CPU_FAILS, "cos")], listed)
    assert "op abs forward float32: passes, but is listed in expected_failures.toml" in str(
        judge([_result(PASSED)], listed)
    )
    assert not judge([_result(PASSED)], listed)
    for outcome in ("failed", "crashed", "hung"):
        verdict = judge([_result(outcome, "sin"), _result(FAILED)], listed)
        assert not verdict
        assert str(verdict).startswith(f"op sin forward float32: {outcome}")


@pytest.mark.parametrize("stage", ["forwards", ""])
def test_an_entry_for_nothing_is_refused(stage: str) -> None:
    with pytest.raises(ValueError, match=r"expected_failures.toml: abs: unknown"):
        expected.load(f'[[op]]\nnames = ["abs"]\nstages = ["{stage}"]\ndtypes = ["float32"]\nreason = "none"')


def test_every_entry_names_a_case_of_the_complete_run() -> None:
    cases = {dataclasses.replace(case, samples=0) for case in complete()}
    listed = [case for each in expected.load() for case in each.cases()]
    assert len(listed) == len(set(listed))
    assert [str(case) for case in listed if case not in cases] == []


def test_the_part_is_of_the_complete_run_and_has_every_operator() -> None:
    cases = {dataclasses.replace(case, samples=0) for case in complete()}
    few = part(expected.load())
    assert {dataclasses.replace(case, samples=0) for case in few} <= cases
    assert {case.stage for case in few} == {case.stage for case in cases}
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    assert {case.name for case in few if case.suite == "op" and case.stage == "forward"} == {
        name for name, info in infos("op").items() if any(applies("op", info, "forward", dtype) for dtype in dtypes)
    }
    assert {case.name for case in few if case.suite == "module" and case.stage == "forward"} == {*infos("module")}


@pytest.mark.parametrize(
    ("total", "limit", "taken"),
    [(5, 0, {0, 1, 2, 3, 4}), (2, 3, {0, 1}), (9, 1, {0}), (9, 3, {0, 4, 8}), (0, 2, set())],
)
def test_samples_are_taken_evenly(total: int, limit: int, taken: set[int]) -> None:
    assert chosen(total, limit) == taken


# -- the document -----------------------------------------------------------------------------------------


def test_the_document_reaches_the_goals_and_names_every_reason() -> None:
    text = table.FILE.read_text()
    for each in expected.load():
        assert f"| `{each.name}` | {', '.join(each.stages)} |" in text
        assert each.reason in text
    assert "Crashes of the process: 0." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| op |")]
    goals = {"forward": 99.5, "variants": 99.0, "backward": 99.0}
    assert {stage for _, stage, *_ in rows} >= {*goals, "aot_eager", "inductor"}
    assert [row for row in rows if float(row[-1]) < goals.get(row[1], 97.0)] == []
