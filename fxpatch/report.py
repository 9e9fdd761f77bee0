"""`status()`: what fxpatch found, did and did not do in this process, and why; as text or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from fxpatch.installer import Installation, current
from fxpatch.patching import Applied, Deferred, NotNeeded, Outcome
from fxpatch.repair.device_class import name_of


@dataclass(frozen=True)
class Row:
    """One patch or table of settings: `state` is `applied`, `not needed`, `waiting` or `refused`."""

    name: str
    state: str
    reason: str
    detail: str
    why: str
    upstream: str


@dataclass(frozen=True)
class FakeRow:
    """One fake kernel: `state` is `registered`, `shadowed`, `already had`, `deferred`, `schema differs`,
    `refused hidden` or `skipped`."""

    operator: str
    state: str
    reason: str


@dataclass(frozen=True)
class Report:
    """`str(report)` is readable text, `report.json()` has the same content in a stable order.

    Args:
        installed: whether fxpatch is installed in this process; if not, all else is empty.
        device: device type, `"musa"`.
        torch_version: `torch.__version__`.
        torch_device: the full name of the class that `torch.device` is.
        profile: where the compile profile was read from.
        notes: how the profile was chosen, and how often `install()` was called again.
        rows: one for each patch and table of settings, in the order of application.
        fakes: one for each fake kernel.
    """

    installed: bool
    device: str
    torch_version: str
    torch_device: str
    profile: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    fakes: tuple[FakeRow, ...] = ()

    def __str__(self) -> str:
        if not self.installed:
            return "fxpatch is not installed in this process: call fxpatch.install()"
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"fxpatch on {self.device}: torch {self.torch_version}, torch.device is {self.torch_device}, "
            f"profile {self.profile}",
            *(f"  note: {note}" for note in self.notes),
        ]
        for row in self.rows:
            lines.append(f"  {row.name:{width}}  {row.state:10}  {row.reason}")
            if row.detail:
                lines.append(f"  {'':{width}}  {'':10}  -> {row.detail}")
        return "\n".join([*lines, *_fake_lines(self.fakes)])

    def json(self) -> str:
        """The report as a JSON object; `rows` is a list in the order of application."""
        return json.dumps(asdict(self), indent=2)


def status() -> Report:
    """What is installed now, after settling once more, so that it is true of this moment. `print(fxpatch.status())`."""
    installation = current()
    if installation is None:
        return Report(False, "", "", "", "", (), ())
    installation.settle()
    return report_of(installation)


def report_of(installation: Installation) -> Report:
    """The report on one installation."""
    facts = installation.facts
    again = installation.installs - 1
    notes = [*installation.trace]
    if again:
        notes.append(f"install() was called {again} more time{'s' * (again > 1)}: already installed, nothing to do")
    rows = []
    for patch in installation.patches:
        outcome = installation.outcomes[patch.name]
        detail = outcome.detail if isinstance(outcome, Applied) else ""
        rows.append(Row(patch.name, _state(outcome), outcome.reason, detail, patch.why, patch.upstream))
    return Report(
        installed=True,
        device=facts.device,
        torch_version=facts.torch_version,
        torch_device=name_of(torch.device),
        profile=installation.profile.origin,
        notes=tuple(notes),
        rows=tuple(rows),
        fakes=tuple(
            FakeRow(operator, _words(type(outcome).__name__), outcome.reason)
            for operator, outcome in installation.fakes.items()
        ),
    )


def _fake_lines(fakes: tuple[FakeRow, ...]) -> list[str]:
    """One line for each; those that wait for an operator are many, and share a line."""
    here = [row for row in fakes if row.state != "deferred"]
    width = max((len(row.operator) for row in here), default=0)
    lines = [f"    {row.operator:{width}}  {row.state:14}  {row.reason}" for row in here]
    waiting = [row.operator for row in fakes if row.state == "deferred"]
    if waiting:
        spaces = sorted({name.partition("::")[0] for name in waiting})
        lines.append(f"    {len(waiting)} operators of {', '.join(spaces)} are not registered (yet): deferred")
    return lines


def _words(name: str) -> str:
    """`AlreadyHad` -> `already had`."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _state(outcome: Outcome) -> str:
    if isinstance(outcome, Applied):
        return "applied"
    if isinstance(outcome, NotNeeded):
        return "not needed"
    return "waiting" if isinstance(outcome, Deferred) else "refused"
