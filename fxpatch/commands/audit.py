"""`fxpatch audit NAMESPACE`: the fake kernels that a vendor ships, audited without the hardware."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxpatch import __version__
from fxpatch.commands.arguments import STDOUT, add_import, add_json, seconds
from fxpatch.commands.stderr import progress, refused
from fxpatch.commands.streams import written

if TYPE_CHECKING:
    from fake_kernels.audit import Report

_FAIL_ON = ("error", "warning", "note", "never")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command, with its options, to the command line's."""
    parser = commands.add_parser(
        "audit",
        help="audit the fake kernels of a namespace, without its hardware",
        description="Audits the fake kernels that a vendor ships: torch.ops.NAMESPACE. Needs no hardware.",
        epilog="exit status: 0: no finding at or above --fail-on; 1: findings; 2: the request could not be met",
    )
    parser.add_argument("namespace", metavar="NAMESPACE", help="as in torch.ops.NAMESPACE, e.g. npu")
    add_import(parser, "operators")
    parser.add_argument(
        "--operators",
        metavar="PATTERN",
        default="*",
        help="shell pattern for name or name.overload, e.g. 'npu_rms_norm*'",
    )
    add_json(parser)
    parser.add_argument("--sarif", metavar="FILE", nargs="?", const=STDOUT, help="write SARIF 2.1.0, likewise")
    parser.add_argument(
        "--fail-on", choices=_FAIL_ON, default="error", help="lowest level that makes the exit status 1 (error)"
    )
    parser.add_argument(
        "--limit", metavar="SECONDS", type=seconds, default=20.0, help="time limit for each operator (20)"
    )
    parser.set_defaults(run=run, usage=parser.error)


def run(chosen: argparse.Namespace) -> int:
    """Audits, reports, and gives the exit status."""
    if chosen.json == STDOUT and chosen.sarif == STDOUT:
        chosen.usage("--json and --sarif cannot both go to stdout: name a file for one of them")
    from fake_kernels.audit import AuditError

    try:
        with progress(f"audit {chosen.namespace}", "operators") as told:
            report = audit(
                chosen.namespace,
                imports=chosen.imports,
                operators=chosen.operators,
                limit_s=chosen.limit,
                progress=told,
            )
    except AuditError as error:
        return refused(error)
    _write(report, chosen)
    return _status(report, chosen.fail_on)


def audit(namespace: str, **options: Any) -> Report:
    """`fake_kernels.audit.audit`, imported where it is called."""
    from fake_kernels.audit import audit

    return audit(namespace, **options)


def _write(report: Report, chosen: argparse.Namespace) -> None:
    from fake_kernels.audit import as_json, as_sarif, as_text

    text: str | None = as_text(report)
    for target, write in ((chosen.json, as_json), (chosen.sarif, lambda r: as_sarif(r, __version__))):
        if target == STDOUT:
            text = write(report)
        elif target is not None:
            Path(target).write_text(write(report) + "\n", encoding="utf-8")
    with written(sys.stdout):
        print(text)


def _status(report: Report, fail_on: str) -> int:
    from fake_kernels.audit import Level

    worst = report.worst()
    return int(fail_on != "never" and worst is not None and worst >= Level[fail_on.upper()])
