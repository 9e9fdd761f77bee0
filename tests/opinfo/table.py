"""docs/operators.md. The rule: nothing in it is written by hand, and no time or machine is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from opinfo.cases import COMPILED, DTYPES, STAGES, Case
from opinfo.eager import OTHER_ALGORITHM
from opinfo.expected import Expected
from opinfo.plan import EVERY_INDUCTOR
from opinfo.results import CPU_FAILS, CRASHED, HUNG, PASSED, Result

FILE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"

_HEAD = """\
# Operators on the simulated device

Written by `make opinfo`. Every OpInfo and ModuleInfo that ships in the torch wheel, on the simulated device against the
CPU: values, dtypes, shapes, strides, shared memory, written arguments, errors. An info passes if all its samples do.

- `variants`: in place, and `out=` into memory that fits, that has other strides, and that is empty.
- `aot_eager`, `inductor`: `torch.compile(fullgraph=True)` on the device against the CPU's *eager* results, a few
  samples for each info; with Inductor one, for every {every}th info. What fails in the same comparison when it is
  compiled for the CPU counts as the CPU's failure, in a column of its own, and is left out of the percentage.
- close: values are the same bits, except in so many samples, where they are within a tolerance.
- raise: samples that passed because the device raises the type of error that the CPU raises.
"""

_WHY_CLOSE = {
    **OTHER_ALGORITHM,
    "linalg.lstsq": "LAPACK's result differs from call to call, on the CPU as well",
    **dict.fromkeys(
        ("nn.RNN", "nn.LSTM", "nn.GRU", "nn.LSTMCell", "nn.GRUCell"),
        "torch goes through time in another loop on devices that are not the CPU, with fused cells",
    ),
}


def markdown(results: Sequence[Result], expected: Iterable[Expected]) -> str:
    """The whole document."""
    lines = [_HEAD.format(every=EVERY_INDUCTOR), f"torch {torch.__version__.partition('+')[0]}.", ""]
    lines += ["| suite | stage | dtype | infos | samples | passed | failed | CPU fails | close | raise | % |"]
    lines += ["|---|---|---|" + "--:|" * 8, *_rows(results)]
    lines += ["", "Crashes of the process: " + str(sum(r.outcome in (CRASHED, HUNG) for r in results)) + ".", ""]
    lines += ["## What fails, and why", "", *_reasons(expected), ""]
    lines += ["## What is close, not the same, eagerly", "", *_close(results), ""]
    lines += ["## What torch cannot compile for the CPU either", "", _not_compiled(results), ""]
    lines += ["## What the CPU refuses in every sample, and so does the device", "", _raising(results), ""]
    return "\n".join(lines)


def _rows(results: Sequence[Result]) -> Iterable[str]:
    def row(case: Case) -> tuple[int, int, int]:
        return ("op", "module").index(case.suite), STAGES.index(case.stage), [*DTYPES].index(case.dtype)

    for _, group in groupby(sorted(results, key=lambda r: row(r.case)), key=lambda r: row(r.case)):
        those = list(group)
        case, passed = those[0].case, sum(r.outcome == PASSED for r in those)
        cpu = sum(r.outcome == CPU_FAILS for r in those)
        percent = 100 * passed / max(1, len(those) - cpu)
        counts = (len(those), sum(r.samples for r in those), passed, len(those) - passed - cpu, cpu)
        counts += (sum(r.close for r in those), sum(r.raised for r in those))
        cells = [case.suite, case.stage, case.dtype, *counts, f"{percent:.2f}"]
        yield f"| {' | '.join(map(str, cells))} |"


def _reasons(expected: Iterable[Expected]) -> Iterable[str]:
    yield "| info | stages | dtypes | reason |"
    yield "|---|---|---|---|"
    for each in expected:
        yield f"| `{each.name}` | {', '.join(each.stages)} | {', '.join(each.dtypes)} | {each.reason} |"


def _close(results: Iterable[Result]) -> Iterable[str]:
    yield "| info | why |"
    yield "|---|---|"
    names = {r.case.name.partition(":")[0] for r in results if r.close and r.case.stage not in COMPILED}
    for name in sorted(names):
        yield f"| `{name}` | {_WHY_CLOSE.get(name, 'not known')} |"


def _not_compiled(results: Iterable[Result]) -> str:
    return ", ".join(sorted({f"`{r.case.name}`" for r in results if r.outcome == CPU_FAILS})) + "."


def _raising(results: Iterable[Result]) -> str:
    those = (r for r in results if r.case.stage == "forward" and r.raised and r.raised == r.samples)
    return ", ".join(sorted({f"`{r.case.name}`" for r in those})) + "."
