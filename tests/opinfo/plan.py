"""How much is run. The complete run takes every OpInfo and every sample eagerly; compilers take seconds where eager
takes milliseconds, so they get a few samples each, and Inductor every sixth info. The part for CI has the same stages
over the same infos, with fewer samples. Nothing is drawn at random: what is run today is run tomorrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from opinfo.cases import Case, cases
from opinfo.expected import Expected

EVERY_INDUCTOR = 6


def complete() -> list[Case]:
    """All there is: the run behind docs/operators.md."""
    return [
        *_cases("op", ("forward", "variants"), ("float32", "bfloat16", "int64")),
        *_cases("op", ("backward",), ("float32",)),
        *_cases("module", ("forward", "backward"), ("float32",)),
        *_cases("op", ("aot_eager", "aot_eager_backward"), ("float32",), samples=2),
        *_cases("module", ("aot_eager", "aot_eager_backward"), ("float32",), samples=2),
        *_inductor(EVERY_INDUCTOR),
    ]


def part(expected: Iterable[Expected]) -> list[Case]:
    """The part for CI. What is expected to fail is run as in the complete run, so that passing means something."""
    few = [
        *_cases("op", ("forward", "variants", "backward"), ("float32",), samples=2),
        *_cases("op", ("forward",), ("bfloat16", "int64"), samples=1),
        *_cases("module", ("forward", "backward"), ("float32",), samples=2),
        *_every(30, _cases("op", ("aot_eager", "aot_eager_backward"), ("float32",), samples=2)),
        *_every(10, _cases("module", ("aot_eager", "aot_eager_backward"), ("float32",), samples=2)),
        *_inductor(14 * EVERY_INDUCTOR),
    ]
    named = {case for each in expected for case in each.cases()}
    asked = {dataclasses.replace(case, samples=0) for case in few}
    return [case for case in few if dataclasses.replace(case, samples=0) not in named] + [
        case for case in complete() if dataclasses.replace(case, samples=0) in named & asked
    ]


def _cases(suite: str, stages: Iterable[str], dtypes: Iterable[str], samples: int = 0) -> list[Case]:
    return [case for stage in stages for dtype in dtypes for case in cases(suite, stage, dtype, samples)]


def _inductor(step: int) -> list[Case]:
    return [
        case
        for suite in ("op", "module")
        for case in _every(step, _cases(suite, ("inductor", "inductor_backward"), ("float32",), samples=1))
    ]


def _every(step: int, those: list[Case]) -> list[Case]:
    return those[::step]
