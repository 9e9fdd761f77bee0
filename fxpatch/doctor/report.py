"""What the doctor found: plain data, and as JSON with a stable schema. `table` and `html` show the same to people.

The schema is in docs/doctor.md. A field is never renamed or removed without another number in `schema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fxpatch.doctor.probe import STAGES, State
from fxpatch.doctor.processes import Ended

SCHEMA = 1
_OUTPUT_LINES = 12
_OURS = re.compile(r'fxpatch/doctor/(child|zygote)\.py", line|"<frozen runpy>", line|^Extension modules: ')
_CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


@dataclass(frozen=True)
class Attempt:
    """One process that ran a probe.

    Args:
        installed: after `fxpatch.install()`.
        state: "ok", "broken" or "not applicable".
        found: what it found, or why it is not applicable; empty where broken.
        error: what is wrong; its first line says the most. Empty where nothing is.
        traceback: the last lines of where.
        output: the last lines that it wrote to stdout and stderr.
        applied: the patches that were applied, by their names.
        seconds: from its fork to its end.
    """

    installed: bool
    state: str
    found: str = ""
    error: str = ""
    traceback: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    applied: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Line:
    """One probe, and what became of it.

    Args:
        name, stage, title: of the probe.
        state: a value of `State`.
        found: what it found in the end; empty where broken.
        error: what is wrong without fxpatch where repaired, and with it where broken; empty where nothing is.
        why: why it matters.
        todo: what to do; empty where nothing is to be done.
        applied: the patches that repaired it, and those applied beside them.
        attempts: one without `fxpatch.install()`, and where that was broken, one with it.
    """

    name: str
    stage: str
    title: str
    state: str
    found: str
    error: str
    why: str
    todo: str
    applied: tuple[str, ...]
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class Report:
    """All of it.

    Args:
        device: the device type.
        simulated: whether it is `fxpatch.simulate`'s.
        imports: the modules that were imported for it.
        model: `module:function`, or empty.
        versions: of python, torch, fxpatch and the imported packages.
        notes: what else a reader has to know.
        lines: one for each probe, in the order of the stages.
        seconds: wall clock, from beginning to end.
        pictures: what the HTML page draws, see `pictures.measure`; None where none were asked for.
        schema: of the JSON.
    """

    device: str
    simulated: bool
    imports: tuple[str, ...]
    model: str
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    lines: tuple[Line, ...]
    seconds: float
    pictures: Mapping[str, Any] | None = None
    schema: int = field(default=SCHEMA)

    @property
    def counts(self) -> dict[str, int]:
        """How many lines there are of each state, all states included."""
        return {state.value: sum(line.state == state.value for line in self.lines) for state in State}

    @property
    def stages(self) -> dict[str, list[Line]]:
        """The lines of each stage that has some."""
        found = {stage: [line for line in self.lines if line.stage == stage] for stage in STAGES}
        return {stage: lines for stage, lines in found.items() if lines}

    def json(self) -> str:
        """A JSON object, ASCII, indented; keys in the order of docs/doctor.md."""
        content = asdict(self)
        head = {"schema": content.pop("schema"), "device": content.pop("device"), "counts": self.counts}
        return json.dumps({**head, **content}, indent=2)


def attempt(installed: bool, ended: Ended) -> Attempt:
    """What one process has come to: it counts as broken unless it answered, whatever it answered before it died."""
    said: Mapping[str, Any] = ended.answer or {}
    error, state = said.get("error", ""), said.get("state", State.BROKEN.value)
    if ended.how:
        state = State.BROKEN.value
        error = f"{ended.how[0].upper()}{ended.how[1:]}" + (f", after: {error}" if error else "")
    elif ended.answer is None:
        state, error = State.BROKEN.value, "It ended without an answer"
    broken = state == State.BROKEN.value
    return Attempt(
        installed=installed,
        state=state,
        found="" if broken else plain(str(said.get("found", ""))),
        error=plain(error) if broken else "",
        traceback=tuple(map(plain, said.get("traceback", ()))),
        output=_output(ended.output),
        applied=tuple(said.get("applied", ())),
        seconds=round(ended.seconds, 3),
    )


def line(probe: Mapping[str, Any], attempts: Sequence[Attempt], last: Mapping[str, Any] | None) -> Line:
    """What the attempts come to.

    Args:
        probe: described, as in a zygote's greeting.
        attempts: one, or one without `fxpatch.install()` and one with it.
        last: what the last process said.
    """
    first, final = attempts[0], attempts[-1]
    broken = State.BROKEN.value
    state = final.state
    if first.state == broken and final.state != broken:
        # "not applicable" once fxpatch is there would leave the first failure unanswered
        state = State.REPAIRED.value if final.state == State.OK.value else broken
    said: Mapping[str, Any] = (last or {}) if final.state == broken else {}
    return Line(
        name=probe["name"],
        stage=probe["stage"],
        title=probe["title"],
        state=state,
        found="" if state == broken else final.found,
        error=final.error or first.error,
        why=plain(said.get("why") or probe["why"]),
        todo=_todo(state, plain(said.get("todo") or probe["todo"])),
        applied=final.applied if state == State.REPAIRED.value else (),
        attempts=tuple(attempts),
    )


def plain(text: str) -> str:
    """Text that can be printed and encoded anywhere: no terminal's control codes, no halves of characters."""
    return _CONTROL.sub("", text.replace("\r\n", "\n")).encode("utf-8", "replace").decode()


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((each.strip() for each in text.splitlines() if each.strip()), "")


def _output(text: str) -> tuple[str, ...]:
    """The last lines, without those that say how a crashed process came to the probe."""
    told = "\n".join(each for each in plain(text).splitlines() if not _OURS.search(each))
    return tuple(told.strip().splitlines()[-_OUTPUT_LINES:])


def _todo(state: str, advice: str) -> str:
    if state == State.BROKEN.value:
        return advice
    return "call fxpatch.install() before torch.compile" if state == State.REPAIRED.value else ""
