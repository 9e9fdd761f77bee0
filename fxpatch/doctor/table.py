"""The report in the terminal: one line for each probe, and below one that is not ok what, why and what to do."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, TextIO

from fxpatch.doctor.probe import State
from fxpatch.doctor.report import Line, Report, first_line

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 80
_STYLES = {
    State.OK.value: "green",
    State.REPAIRED.value: "cyan",
    State.BROKEN.value: "bold red",
    State.NOT_APPLICABLE.value: "dim",
}
_SHORT = {State.REPAIRED.value: "repaired", State.NOT_APPLICABLE.value: "n/a"}
_TRACEBACK_LINES = 6


def show(report: Report, file: TextIO) -> None:
    """Prints the report. Anything but a terminal gets at most 80 columns, no control codes, and of the characters
    those that its encoding has."""
    if file.isatty():
        from rich.console import Console

        _print(report, Console(file=file))
    else:
        encoding = file.encoding or "utf-8"
        file.write(piped(report).encode(encoding, "replace").decode(encoding))


def piped(report: Report) -> str:
    """The text that something else than a terminal gets, whatever FORCE_COLOR says."""
    from rich.console import Console

    text = io.StringIO()
    _print(report, Console(file=text, width=PIPED_WIDTH, force_terminal=False, color_system=None, no_color=True))
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _print(report: Report, console: Console) -> None:
    from rich.text import Text

    console.print(Text(_title(report), style="bold"))
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    for stage, lines in report.stages.items():
        console.print(Text(f"\n{stage}", style="bold"))
        for line in lines:
            _show(line, console)
    console.print(Text(f"\n{_summary(report)}"))


def _show(line: Line, console: Console) -> None:
    """One line: state, title and what was found; what is wrong with it below, in all the width there is."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=9)
    table.add_column(width=28, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    state = Text(f" {_SHORT.get(line.state, line.state)}", style=_STYLES[line.state])
    table.add_row(state, Text(line.title), Text(line.found))
    console.print(table)
    below = Text(overflow="fold")
    for index, (name, text) in enumerate(_below(line)):
        below.append("\n" if index else "").append(name, style="dim").append(text)
    if below:
        console.print(Padding(below, (0, 0, 0, 10)))


def _below(line: Line) -> list[tuple[str, str]]:
    """(what it is, text) of what there is to be told of a line that is not ok."""
    if line.state == State.REPAIRED.value:
        return [("without: ", first_line(line.error)), ("applied: ", ", ".join(line.applied))]
    if not line.error:
        return []
    first, last = first_line(line.attempts[0].error), line.attempts[-1]
    told = [("error: ", first_line(line.error))]
    if last.error and first != first_line(last.error):
        told = [("without: ", first), ("with fxpatch: ", first_line(last.error))]
    told += [("why: ", line.why), ("to do: ", line.todo)]
    where = (last.traceback or last.output)[-_TRACEBACK_LINES:]
    return told + [("| ", each) for each in where if each.strip()]


def _title(report: Report) -> str:
    what = f"{report.device} (simulated)" if report.simulated else report.device
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"fxpatch doctor: {what}: {versions}"


def _summary(report: Report) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in report.counts.items())
    return f"{len(report.lines)} probes in {report.seconds:.0f} s: {counts}"
