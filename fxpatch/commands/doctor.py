"""`fxpatch doctor`: its options, where its report goes, and its exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

from fxpatch.commands.arguments import STDOUT, add_import, add_json, seconds
from fxpatch.commands.stderr import progress
from fxpatch.commands.streams import written
from fxpatch.doctor.probe import State, Subject
from fxpatch.doctor.report import Report
from fxpatch.doctor.run import examine

_FAIL_ON = {
    "broken": {State.BROKEN.value},
    "repaired": {State.BROKEN.value, State.REPAIRED.value},
    "never": set[str](),
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command, with its options, to the command line's."""
    parser = commands.add_parser(
        "doctor",
        help="what works on a device, what fxpatch repairs, and what is broken",
        description="Examines a device: each probe in a process of its own, without fxpatch and, where that is broken, "
        "with it. Simulated devices need no hardware.",
        epilog="exit status: 0: nothing at or above --fail-on; 1: something; 2: the request could not be met",
    )
    parser.add_argument(
        "--device", metavar="TYPE", help="device type, e.g. musa; the one that this process has (simulated: musa)"
    )
    parser.add_argument("--simulate", action="store_true", help="simulate the device: no hardware, no vendor's package")
    add_import(parser, "device")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        default="",
        help="also look at this model's operators: a function that returns (model, example arguments)",
    )
    add_json(parser)
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page with pictures")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="shell pattern for names or stages of probes")
    parser.add_argument(
        "--fail-on", choices=list(_FAIL_ON), default="broken", help="what makes the exit status 1 (broken)"
    )
    parser.add_argument(
        "--limit", metavar="SECONDS", type=seconds, help="time limit for each process, instead of each probe's own"
    )
    parser.set_defaults(run=run)


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
    with progress("doctor", "probes") as told:
        report = examine(
            subject, only=chosen.only, limit_s=chosen.limit, pictures=chosen.html is not None, progress=told
        )
    _write(report, chosen)
    return int(any(line.state in _FAIL_ON[chosen.fail_on] for line in report.lines))


def _check_writable(target: str | None) -> None:
    """`OSError` now, rather than after a minute's work; nothing is created."""
    if target is None or target == STDOUT:
        return
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)


def _write(report: Report, chosen: argparse.Namespace) -> None:
    try:
        with written(sys.stdout):
            _to_stdout(report, chosen.json)
    finally:  # whatever became of stdout, the files are wanted
        if chosen.json not in (None, STDOUT):
            Path(chosen.json).write_text(report.json() + "\n", encoding="utf-8")
        if chosen.html is not None:
            from fxpatch.doctor.html import page

            Path(chosen.html).write_text(page(report), encoding="utf-8", errors="replace")


def _to_stdout(report: Report, json: str | None) -> None:
    if json == STDOUT:
        sys.stdout.write(report.json() + "\n")
    else:
        from fxpatch.doctor.table import show

        show(report, sys.stdout)
