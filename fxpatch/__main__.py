"""The command line: `fxpatch doctor` and `fxpatch audit NAMESPACE`, also as `python -m fxpatch`.

Results go to stdout or to the files named, progress and errors to stderr; the exit status is for continuous
integration: 0: nothing at or above --fail-on, 1: something, 2: the request could not be met. What a command needs is
imported when it runs: importing torch loads the vendor's package, and the doctor does without both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxpatch import __version__
from fxpatch.doctor import command as doctor
from fxpatch.errors import FxPatchError

if TYPE_CHECKING:
    from fake_kernels.audit import Report

Progress = Callable[[int, int, str], None]
_STDOUT = "-"
_FAIL_ON = ("error", "warning", "note", "never")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "doctor":
        try:
            return doctor.run(chosen)
        except (FxPatchError, OSError) as error:
            print(f"fxpatch: {error}", file=sys.stderr)
            return 2
    if chosen.json == _STDOUT and chosen.sarif == _STDOUT:
        parser.error("--json and --sarif cannot both go to stdout: name a file for one of them")
    return _run_audit(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxpatch", description="torch.compile on accelerators PyTorch does not know.")
    parser.add_argument("--version", action="version", version=f"fxpatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add(commands)
    audit_ = commands.add_parser(
        "audit",
        help="audit the fake kernels of a namespace, without its hardware",
        description="Audits the fake kernels that a vendor ships: torch.ops.NAMESPACE. Needs no hardware.",
        epilog="exit status: 0: no finding at or above --fail-on; 1: findings; 2: the request could not be met",
    )
    audit_.add_argument("namespace", metavar="NAMESPACE", help="as in torch.ops.NAMESPACE, e.g. npu")
    audit_.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="a module that brings the operators, e.g. torch_npu; may be repeated",
    )
    audit_.add_argument(
        "--operators",
        metavar="PATTERN",
        default="*",
        help="shell pattern for name or name.overload, e.g. 'npu_rms_norm*'",
    )
    audit_.add_argument("--json", metavar="FILE", nargs="?", const=_STDOUT, help="write JSON; to stdout without a FILE")
    audit_.add_argument("--sarif", metavar="FILE", nargs="?", const=_STDOUT, help="write SARIF 2.1.0, likewise")
    audit_.add_argument(
        "--fail-on", choices=_FAIL_ON, default="error", help="lowest level that makes the exit status 1 (error)"
    )
    audit_.add_argument(
        "--limit", metavar="SECONDS", type=doctor.seconds, default=20.0, help="time limit for each operator (20)"
    )
    return parser


def audit(namespace: str, **options: Any) -> Report:
    """`fake_kernels.audit.audit`, imported where it is called."""
    from fake_kernels.audit import audit

    return audit(namespace, **options)


def _run_audit(chosen: argparse.Namespace) -> int:
    from fake_kernels.audit import AuditError

    try:
        with _progress_bar(f"auditing {chosen.namespace}") as progress:
            report = audit(
                chosen.namespace,
                imports=chosen.imports,
                operators=chosen.operators,
                limit_s=chosen.limit,
                progress=progress,
            )
        _write(report, chosen)
    except (AuditError, OSError) as error:
        print(f"fxpatch: {error}", file=sys.stderr)
        return 2
    return _status(report, chosen.fail_on)


def _write(report: Report, chosen: argparse.Namespace) -> None:
    from fake_kernels.audit import as_json, as_sarif, as_text

    text: str | None = as_text(report)
    for target, write in ((chosen.json, as_json), (chosen.sarif, lambda r: as_sarif(r, __version__))):
        if target == _STDOUT:
            text = write(report)
        elif target is not None:
            Path(target).write_text(write(report) + "\n", encoding="utf-8")
    print(text)


def _status(report: Report, fail_on: str) -> int:
    from fake_kernels.audit import Level

    worst = report.worst()
    return int(fail_on != "never" and worst is not None and worst >= Level[fail_on.upper()])


@contextmanager
def _progress_bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("operators"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[at]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, at="")

        def progress(done: int, total: int, operator: str) -> None:
            bar.update(task, completed=done, total=total, at=operator if done < total else "")

        yield progress


if __name__ == "__main__":
    sys.exit(main())
