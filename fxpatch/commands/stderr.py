"""What commands write to stderr: how far they are, and that a request could not be met."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fxpatch.commands.streams import written

Progress = Callable[[int, int, str], None]  # how many are done, of how many, and what comes now

_EVERY_S = 10.0


def refused(error: Exception) -> int:
    """Says why, and gives the exit status for it."""
    say(f"fxpatch: {error}")
    return 2


def say(text: str) -> None:
    """A line on stderr, if it can be had there: a log that is full, or that nobody reads, ends no command."""
    with suppress(OSError), written(sys.stderr):
        sys.stderr.write(f"{text}\n")


@contextmanager
def progress(command: str, unit: str) -> Iterator[Progress]:
    """A bar where stderr is a terminal; elsewhere a line now and then.

    Args:
        command: what runs: `"doctor"`.
        unit: what is counted: `"probes"`.
    """
    if not sys.stderr.isatty():
        yield _Sparse(f"fxpatch {command}", unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(f"fxpatch {command}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Bar(*columns, TimeElapsedColumn(), TextColumn("{task.fields[at]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(command, total=None, at="starting")
        yield lambda done, total, at: bar.update(task, completed=done, total=total, at=at if done < total else "")


class _Sparse:
    """Progress for a log: the first line, the last, and one every ten seconds."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit, self._next = title, unit, 0.0

    def __call__(self, done: int, total: int, at: str) -> None:
        if time.monotonic() >= self._next or done == total:
            self._next = time.monotonic() + _EVERY_S
            now = f", now {at}" if at and done < total else ""
            say(f"{self._title}: {done}/{total} {self._unit}{now}")
