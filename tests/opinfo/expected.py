"""What is known to fail. The rule: `expected_failures.toml` holds for every case, in both directions: a failure that is
not listed is an error, and so is a listed one that passes.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opinfo.cases import DTYPES, STAGES, Case
from opinfo.results import Result

FILE = Path(__file__).with_name("expected_failures.toml")


@dataclass(frozen=True)
class Expected:
    """One entry: an info that fails at these stages in these dtypes, and why."""

    suite: str
    name: str
    stages: tuple[str, ...]
    dtypes: tuple[str, ...]
    reason: str

    def __post_init__(self) -> None:
        unknown = {*self.stages} - {*STAGES} | {*self.dtypes} - {*DTYPES}
        if unknown or not self.stages or not self.dtypes or not self.reason:
            raise ValueError(f"{FILE.name}: {self.name}: unknown {sorted(unknown)}, or nothing named")

    def cases(self) -> Iterator[Case]:
        for stage in self.stages:
            for dtype in self.dtypes:
                yield Case(self.suite, self.name, stage, dtype)


def load(text: str | None = None) -> list[Expected]:
    """The entries of the file."""
    table = tomllib.loads(FILE.read_text() if text is None else text)
    return [
        Expected(suite, name, tuple(entry["stages"]), tuple(entry["dtypes"]), entry["reason"])
        for suite, entries in table.items()
        for entry in entries
        for name in entry["names"]
    ]


@dataclass(frozen=True)
class Judgement:
    """Failures that are not listed; listed cases that passed."""

    unlisted: tuple[Result, ...]
    stale: tuple[Case, ...]

    def __str__(self) -> str:
        lines = [f"{r.case}: {r.outcome}: {'; '.join(r.problems[:2])}" for r in self.unlisted]
        return "\n".join([*lines, *(f"{case}: passes, but is listed in {FILE.name}" for case in self.stale)])

    def __bool__(self) -> bool:
        """Whether there is nothing to complain about."""
        return not self.unlisted and not self.stale


def judge(results: Iterable[Result], expected: Iterable[Expected]) -> Judgement:
    """Compares what came of the cases with what was expected of them."""
    listed = {case for each in expected for case in each.cases()}
    seen = {dataclasses.replace(result.case, samples=0): result for result in results}
    return Judgement(
        unlisted=tuple(result for case, result in sorted(seen.items()) if not result.ok and case not in listed),
        stale=tuple(case for case in sorted(listed & seen.keys()) if seen[case].ok),
    )
