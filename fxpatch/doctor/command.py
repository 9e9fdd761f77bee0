"""`fxpatch doctor`: its options, its progress, where its report goes, and its exit status.

Nothing here imports torch: the vendor's package would come with it, and whatever it does to a process.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxpatch.doctor.probe import State, Subject
from fxpatch.doctor.report import Report
from fxpatch.doctor.run import Progress, examine

_STDOUT = "-"
_FAIL_ON = {
    "broken": {State.BROKEN.value},
    "repaired": {State.BROKEN.value, State.REPAIRED.value},
    "never": set[str](),
}
_EVERY_S = 10.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command, with its options, to the command line's."""
    doctor = commands.add_parser(
        "doctor",
        help="what works on a device, what fxpatch repairs, and what is broken",
        description="Examines a device: each probe in a process of its own, without fxpatch and, where that is broken, "
        "with it. Simulated devices need no hardware.",
        epilog="exit status: 0: nothing at or above --fail-on; 1: something; 2: the request could not be met",
    )
    doctor.add_argument(
        "--device", metavar="TYPE", help="device type, e.g. musa; the one that this process has (simulated: musa)"
    )
    doctor.add_argument("--simulate", action="store_true", help="simulate the device: no hardware, no vendor's package")
    doctor.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="a module that brings the device, e.g. torch_npu; may be repeated",
    )
    doctor.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        default="",
        help="also look at this model's operators: a function that returns (model, example arguments)",
    )
    doctor.add_argument("--json", metavar="FILE", nargs="?", const=_STDOUT, help="write JSON; to stdout without a FILE")
    doctor.add_argument("--html", metavar="FILE", help="write one self-contained page with pictures")
    doctor.add_argument("--only", metavar="PATTERN", default="*", help="shell pattern for names or stages of probes")
    doctor.add_argument(
        "--fail-on", choices=list(_FAIL_ON), default="broken", help="what makes the exit status 1 (broken)"
    )
    doctor.add_argument(
        "--limit", metavar="SECONDS", type=seconds, help="time limit for each process, instead of each probe's own"
    )


def run(chosen: argparse.Namespace) -> int:
    """Examines, reports, and gives the exit status.

    Raises:
        FxPatchError, OSError: the request cannot be met.
    """
    for target in (chosen.json, chosen.html):
        _check_writable(target)
    subject = Subject(
        device=chosen.device or ("musa" if chosen.simulate else ""),
        simulated=chosen.simulate,
        imports=tuple(chosen.imports),
        model=chosen.model,
    )
    with _progress() as progress:
        report = examine(
            subject, only=chosen.only, limit_s=chosen.limit, pictures=chosen.html is not None, progress=progress
        )
    _write(report, chosen)
    return int(any(line.state in _FAIL_ON[chosen.fail_on] for line in report.lines))


def seconds(text: str) -> float:
    """A time limit, for argparse."""
    given = float(text)
    if not given > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time limit: a number of seconds above 0 is expected")
    return given


def _check_writable(target: str | None) -> None:
    """`OSError` now, rather than after a minute's work; nothing is created."""
    if target is None or target == _STDOUT:
        return
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)


def _write(report: Report, chosen: argparse.Namespace) -> None:
    if chosen.json == _STDOUT:
        sys.stdout.write(report.json() + "\n")
    else:
        from fxpatch.doctor.table import show

        show(report, sys.stdout)
    if chosen.json not in (None, _STDOUT):
        Path(chosen.json).write_text(report.json() + "\n", encoding="utf-8")
    if chosen.html is not None:
        from fxpatch.doctor.html import page

        Path(chosen.html).write_text(page(report), encoding="utf-8")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar where stderr is a terminal; elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield _Sparse()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("examining"), BarColumn(), MofNCompleteColumn(), TextColumn("probes"), TimeElapsedColumn())
    with Bar(*columns, TextColumn("{task.fields[at]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("examining", total=None, at="starting")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, at=name)


class _Sparse:
    """Progress for a log: the first probe, the last, and one every ten seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, total: int, name: str) -> None:
        if time.monotonic() >= self._next or done == total:
            self._next = time.monotonic() + _EVERY_S
            sys.stderr.write(f"fxpatch doctor: {done}/{total} probes" + (f", now {name}\n" if name else "\n"))
