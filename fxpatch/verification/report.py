"""What `verify` found: one row for each stage, direction and input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from fxpatch.difference import Difference
from fxpatch.errors import WrongResultError
from fxpatch.verification.operators import Operator


class State(StrEnum):
    """What became of a stage."""

    AGREES = "agrees"
    DIFFERS = "differs"
    FAILED = "failed"  # it raised, or could not be compiled
    UNDECIDED = "undecided"  # eager disagrees with itself
    UNSAFE = "unsafe"  # it was not run: it might have taken the process down
    CANNOT_RUN = "cannot run"  # this device, torch or model has no such stage


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        stage: what was compared with eager.
        direction: `"forward"`, without gradients, or `"backward"`: results and gradients of a training graph.
        example: the number of the input.
        state: what became of it.
        reason: why, in words.
        seconds: compiling and running; and for what differs, finding out where.
        graphs: how many Dynamo made of the model.
        difference: what is wrong.
        layer: the first layer that is, by its name in the model.
        operator: the first operator that is.
    """

    stage: str
    direction: str
    example: int
    state: State
    reason: str = ""
    seconds: float = 0.0
    graphs: int = 0
    difference: Difference | None = None
    layer: str = ""
    operator: Operator | None = None


@dataclass(frozen=True)
class Verification:
    """`str(report)` is a readable table, `report.json()` has the same content.

    Attributes:
        model, device, torch_version: what was verified, and where.
        rows: in the order in which they were run.
        notes: what else is to be known.
    """

    model: str
    device: str
    torch_version: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all that can run here agrees with eager, and something besides eager did run."""
        return not self.wrong and any(row.state is State.AGREES and row.stage not in _NO_STAGES for row in self.rows)

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The rows that are neither right nor impossible here."""
        return tuple(row for row in self.rows if row.state not in (State.AGREES, State.CANNOT_RUN))

    def raise_if_wrong(self) -> None:
        """Raises:
        WrongResultError: not all that can run here agrees with eager.
        """
        if self.ok:
            return
        first = next((row for row in self.wrong if row.state is State.DIFFERS), (*self.wrong, *self.rows)[0])
        place = f" in {first.layer}" if first.layer else ""
        operator = f", first at {first.operator.operator}" if first.operator else ""
        raise WrongResultError(
            f"{self.model}: {first.stage} ({first.direction}) {first.state}{place}{operator}.",
            seen=str(first.difference or first.reason),
            expected="what the model does when it is run eagerly",
            hint=_ADVICE[first.state],
        )

    def __str__(self) -> str:
        bad = len(self.wrong)
        word = (
            "all that can run here agrees with eager"
            if self.ok
            else f"{bad} of {len(self.rows)} do not agree with eager"
        )
        if not self.ok and not bad:
            word = "nothing could run here"
        several = len({row.example for row in self.rows}) > 1
        lines = [f"verified {self.model} on {self.device}, torch {self.torch_version}: {word}"]
        width = max((len(row.stage) for row in self.rows), default=0)
        for row in self.rows:
            number = f"input {row.example}  " if several else ""
            graphs = f", {row.graphs} graph{'s' * (row.graphs != 1)}" if row.graphs else ""
            lines.append(
                f"  {number}{row.stage:{width}}  {row.direction:8}  {row.state:10}  ({row.seconds:.1f} s{graphs})"
                + (f"  {row.reason}" if row.reason else "")
            )
            lines += [f"      {line}" for line in _details(row)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def json(self) -> str:
        """The report as a JSON object; `rows` is a list in the order of the runs. No value is NaN or infinite."""
        return json.dumps(_finite({"ok": self.ok, **asdict(self)}), indent=2, allow_nan=False)


_NO_STAGES = ("eager twice", "fakes")  # that these agree says nothing about compiled code
_ADVICE = {
    State.DIFFERS: "print the report: it names the layer and the operator; run that part eagerly, and report it",
    State.FAILED: "look at the error in the report; the stages before it tell which part of the compiler it is",
    State.UNDECIDED: "put the model into eval(), or make it deterministic, and verify again",
    State.UNSAFE: "correct the fake kernel or the schema that the report names, and verify again",
    State.AGREES: "ask for a stage that can run here",
    State.CANNOT_RUN: "ask for a stage that can run here",
}


def _details(row: Row) -> list[str]:
    lines = [] if row.difference is None else [str(row.difference)]
    if row.layer:
        lines.append(f"first wrong layer: {row.layer}")
    if row.operator is not None:
        first, *rest = str(row.operator).splitlines()
        lines += [f"first wrong operator: {first}", *rest]
    return lines


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value
