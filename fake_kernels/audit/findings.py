"""What an audit says: findings, and the report they make.

A finding says how sure it is: most of what can be wrong with a fake kernel can be shown without hardware, and what
cannot (which strides does the real kernel give?) has to say so instead of guessing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from fake_kernels.audit.rules import RULES, Level


class Confidence(StrEnum):
    """SHOWN: a run or the source shows it. LIKELY: by convention. ASK_KERNEL: only the real kernel can tell."""

    SHOWN = "shown"
    LIKELY = "likely"
    ASK_KERNEL = "only the kernel can tell"


@dataclass(frozen=True, order=True)
class Finding:
    """One mistake at one operator. `evidence` is code to run, with what it gives; `file` and `line` are the fake's.

    Args:
        operator: with its namespace and overload.
        rule: a key of `RULES`.
        message: what is wrong, in one sentence.
        confidence: one of `Confidence`: shown here, or a question to the real kernel.
    """

    operator: str
    rule: str
    message: str
    confidence: str = Confidence.SHOWN
    evidence: str = ""
    file: str = ""
    line: int = 0

    @property
    def level(self) -> Level:
        """The level of the rule."""
        return RULES[self.rule].level

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the level."""
        return {**asdict(self), "level": str(self.level)}


_VOLATILE = re.compile(r"0x[0-9a-f]{6,}|\d{4}-\d\d-\d\d[-T ][\d:.]+|PID:\s*\d+")


def stable(text: str) -> str:
    """The first line of an error text, at most 300 characters, without what changes from run to run (addresses,
    times)."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return _VOLATILE.sub("...", lines[0] if lines else "")[:300]


@dataclass(frozen=True)
class Report:
    """All findings on one namespace, in a stable order.

    `operators` counts overloads; `states` maps each overload to `probed`, `not probed`, `no fake`, `no kernel of its
    own` (composite, or torch makes its fake), `crash` or `hang`; `versions` has torch and the modules imported on
    request.

    Args:
        namespace: as in `torch.ops.NAMESPACE`.
        findings: all of them.
        versions: module -> version.
    """

    namespace: str
    findings: tuple[Finding, ...]
    states: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)

    def worst(self) -> Level | None:
        """The highest level among the findings; None without findings."""
        return max((finding.level for finding in self.findings), default=None)

    def counts(self) -> dict[str, int]:
        """Findings for each rule that has any, in the order of `RULES`."""
        return {rule: n for rule in RULES if (n := sum(f.rule == rule for f in self.findings))}


def make_report(
    namespace: str, findings: Sequence[Finding], states: dict[str, str], versions: dict[str, str]
) -> Report:
    """A report whose order does not depend on which worker answered first; of equal messages one is kept, the shortest
    call with it."""
    shortest: dict[tuple[str, str, str], Finding] = {}
    for finding in sorted(findings, key=lambda f: (len(f.evidence), f)):
        shortest.setdefault((finding.operator, finding.rule, finding.message), finding)
    return Report(namespace, tuple(sorted(shortest.values())), dict(sorted(states.items())), versions)
