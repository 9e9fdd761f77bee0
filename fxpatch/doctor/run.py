"""The examination: every probe in a process of its own, without fxpatch and where that is broken with it.

Two zygotes work side by side. One loop waits for both: no threads, so that an interrupt ends everything.
"""

from __future__ import annotations

import fnmatch
import os
import selectors
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from fxpatch import errors
from fxpatch.doctor.crew import Crew
from fxpatch.doctor.probe import State, Subject
from fxpatch.doctor.processes import JOBS, Ended, Zygote
from fxpatch.doctor.report import Attempt, Line, Report, attempt, line, plain
from fxpatch.doctor.zygote import AUTOLOAD
from fxpatch.errors import DoctorError, FxPatchError, OptionError

PROBES = "fxpatch.doctor.probes"
_READY_S = 120.0
_FACTS_LIMIT_S = 60.0
_PICTURES_LIMIT_S = 60.0

Progress = Callable[[int, int, str], None]
"""How many of the probes are done, how many there are, and the one that is begun."""


def examine(
    subject: Subject,
    *,
    only: str = "*",
    limit_s: float | None = None,
    pictures: bool = False,
    progress: Progress = lambda done, total, name: None,
    probes: str = PROBES,
) -> Report:
    """Runs the probes on one device.

    Args:
        subject: its `device` may be empty: the one that a process has by itself.
        only: shell pattern for the names, or the stages, of the probes to run.
        limit_s: seconds for each process instead of the probe's own limit; exact, where that is longer on a machine
            that is busy with other things.
        pictures: measure what the HTML page draws.
        progress: called before each process, and at the end.
        probes: the module that has `PROBES`.

    Raises:
        UnknownDeviceError, VendorModuleError, DeviceNameTakenError, TorchTooOldError: there is no such device.
        OptionError: no probe matches `only`, or there is no such model.
        DoctorError: no process comes to the point where a probe could begin.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fxpatch-doctor-", ignore_cleanup_errors=True))
        crew = Crew(probes, folder, JOBS)
        stack.callback(crew.close)
        common = {"subject": asdict(subject), "autoload": os.environ.get(AUTOLOAD), "ready_s": _READY_S}
        common["patient"] = limit_s is None
        facts = facts_of(crew.zygotes[0].ask({**common, "kind": "facts", "limit_s": _FACTS_LIMIT_S}))
        notes = []
        if not subject.device:
            notes.append(_chosen(facts))
            subject = replace(subject, device=facts["device"])
            common["subject"] = asdict(subject)
        greeting = crew.zygotes[0].greeting
        assert greeting is not None
        wanted = chosen_of(greeting["probes"], only)
        run = _Run(crew, common, wanted, limit_s, progress)
        run.all()
        measured = None
        if pictures:
            progress(len(wanted), len(wanted), "pictures")
            measured = _measured(run.once({**common, "kind": "pictures", "limit_s": limit_s or _PICTURES_LIMIT_S}))
    return Report(
        device=subject.device,
        simulated=subject.simulated,
        imports=subject.imports,
        model=subject.model,
        versions=facts["versions"],
        notes=tuple(notes),
        lines=tuple(run.lines[probe["name"]] for probe in wanted),
        seconds=round(time.monotonic() - begun, 3),
        pictures=measured,
    )


class _Run:
    """The probes that are to be run, those that are, and the lines of those that were."""

    def __init__(
        self,
        crew: Crew,
        common: Mapping[str, Any],
        wanted: Sequence[Mapping[str, Any]],
        limit_s: float | None,
        progress: Progress,
    ) -> None:
        self.crew, self.common, self.limit_s, self.progress = crew, common, limit_s, progress
        self.total = len(wanted)
        # those that may take long come first, so that none is alone at the end
        self.waiting = deque(sorted(wanted, key=lambda probe: -float(probe["limit_s"])))
        self.busy: dict[Zygote, Mapping[str, Any]] = {}
        self.attempts: dict[str, list[Attempt]] = {probe["name"]: [] for probe in wanted}
        self.lines: dict[str, Line] = {}

    def all(self) -> None:
        """Until every probe has its line.

        Raises:
            DoctorError: no process could be asked, before the first has answered.
        """
        while len(self.lines) < self.total:
            try:
                self.crew.mend()
            except DoctorError as error:
                if not any(self.attempts.values()):
                    raise
                self._give_up(error)
                break
            for zygote in self.crew.zygotes:
                if zygote.greeting is not None and zygote not in self.busy and self.waiting:
                    self._begin(zygote)
            for zygote in self._readable():
                try:
                    ended = zygote.receive()
                except DoctorError as error:
                    self.crew.not_started(error)
                    continue
                if ended is not None and zygote in self.busy:
                    self._take(self.busy.pop(zygote), ended)
        self.progress(self.total, self.total, "")

    def once(self, request: Mapping[str, Any]) -> Ended:
        """One request, when all the others are done."""
        try:
            self.crew.mend()
            return self.crew.zygotes[0].ask(request)
        except DoctorError as error:
            return _not_asked(error)

    def _readable(self) -> list[Zygote]:
        """Those that have something to say, or should have said it by now."""
        with selectors.DefaultSelector() as selector:
            for zygote in self.crew.zygotes:
                selector.register(zygote, selectors.EVENT_READ)
            awaited = [zygote for zygote in self.crew.zygotes if zygote in self.busy or zygote.greeting is None]
            first = min(zygote.deadline for zygote in awaited)
            said = {key.fileobj for key, _ in selector.select(max(0.0, first - time.monotonic()) + 0.01)}
        now = time.monotonic()
        return [
            zygote for zygote in self.crew.zygotes if zygote in said or (zygote in awaited and now > zygote.deadline)
        ]

    def _begin(self, zygote: Zygote) -> None:
        probe = self.waiting.popleft()
        self.progress(len(self.lines), self.total, probe["name"])
        zygote.send(
            {
                **self.common,
                "kind": "probe",
                "probe": probe["name"],
                "install": bool(self.attempts[probe["name"]]),
                "limit_s": self.limit_s or probe["limit_s"],
            }
        )
        self.busy[zygote] = probe

    def _take(self, probe: Mapping[str, Any], ended: Ended) -> None:
        attempts = self.attempts[probe["name"]]
        attempts.append(attempt(bool(attempts), ended))
        if attempts[-1].state == State.BROKEN.value and probe["installs"] and len(attempts) == 1:
            self.waiting.appendleft(probe)
        else:
            self.lines[probe["name"]] = line(probe, attempts, ended.answer)

    def _give_up(self, why: DoctorError) -> None:
        """What has no line is broken, as far as anybody knows: what has been found must not be lost."""
        for probe in self.waiting:
            attempts = self.attempts[probe["name"]]
            attempts.append(attempt(bool(attempts), _not_asked(why)))
            self.lines[probe["name"]] = line(probe, attempts, {"todo": why.hint})


def _not_asked(why: DoctorError) -> Ended:
    return Ended(None, f"not asked: {why.what} {why.seen}")


def chosen_of(known: Sequence[Mapping[str, Any]], only: str) -> list[Mapping[str, Any]]:
    """The probes whose name or stage matches a shell pattern.

    Raises:
        OptionError: none does.
    """
    wanted = [probe for probe in known if any(fnmatch.fnmatchcase(probe[key], only) for key in ("name", "stage"))]
    if not wanted:
        raise OptionError(
            "No probe is to be run.",
            seen=f"the pattern {only!r}",
            expected=f"one that matches a name or stage: {', '.join(probe['name'] for probe in known)}",
            hint="leave the pattern out for all probes",
        )
    return wanted


def facts_of(ended: Ended) -> dict[str, Any]:
    """What a process said of its device and versions.

    Raises:
        FxPatchError: what the request cannot be met with; `examine` says which.
    """
    if ended.answer is None or ended.how:
        raise DoctorError(
            "No probe can begin: a process that only imports what it was told to does not get through that.",
            seen="; ".join(filter(None, [ended.how or "no answer", plain(ended.output).strip()[-2000:]])),
            expected="the imports, or the simulated device, to succeed",
            hint="run `python -X faulthandler -c 'import MODULE'` for each --import, and mend what it reports",
        )
    error = ended.answer.get("error")
    if error is not None:
        kind: type[FxPatchError] = getattr(errors, error["type"])
        raise kind(error["what"], seen=error["seen"], expected=error["expected"], hint=error["hint"])
    return ended.answer


def _chosen(facts: Mapping[str, Any]) -> str:
    if facts["device"] == "cpu":
        return "this process has no accelerator, so the CPU was examined: --import a vendor's package, or --simulate"
    return f"{facts['device']} is the accelerator that this process has"


def _measured(ended: Ended) -> dict[str, Any]:
    """The pictures' data, or for all of them why there is none."""
    tried = attempt(True, ended)
    if tried.state == State.OK.value and ended.answer is not None:
        found: dict[str, Any] = ended.answer["found"]
        return found
    why = tried.error or tried.found
    return {name: {"why_not": why} for name in ("pieces", "memory")}
