"""What came of a case, as plain data that goes through pipes and into files."""

from __future__ import annotations

from dataclasses import dataclass, field

from opinfo.cases import Case
from opinfo.compare import Verdict

PASSED, FAILED, CRASHED, HUNG, CPU_FAILS = "passed", "failed", "crashed", "hung", "cpu fails"


@dataclass
class Result:
    """The outcome of all samples of a case.

    Args:
        samples: how many were run.
        close: how many of them passed with values that are equal within the tolerance only.
        raised: how many of them passed because the CPU raised the same type of error.
        cpu_fails: how many failed on plain CPU tensors with the same compiler too.
        problems: of the samples that failed, in words.
    """

    case: Case
    outcome: str = PASSED
    samples: int = 0
    failed: int = 0
    close: int = 0
    raised: int = 0
    cpu_fails: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.outcome in (PASSED, CPU_FAILS)

    def add(self, sample: int, verdict: Verdict) -> None:
        """Counts one sample."""
        self.samples += 1
        if not verdict.problems:
            self.close += verdict.close
            self.raised += verdict.raised
        else:
            self.failed += 1
            self.problems.append(f"sample {sample}: {'; '.join(verdict.problems)}"[:1000])
            self.outcome = FAILED

    def add_cpu_failure(self, sample: int, verdict: Verdict) -> None:
        """Counts one sample that the CPU fails too, in the way that `verdict` says."""
        self.samples += 1
        self.cpu_fails += 1
        self.problems.append(f"sample {sample}, on the CPU: {'; '.join(verdict.problems)}"[:1000])
        if self.outcome == PASSED:
            self.outcome = CPU_FAILS

    def gave_out(self, outcome: str, how: str) -> Result:
        """The process ended, or had to be ended, on the way."""
        self.outcome, self.problems = outcome, [*self.problems, how]
        return self
