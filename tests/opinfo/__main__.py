"""`make opinfo`: everything, in two workers; results in build/opinfo/, the table in docs/operators.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opinfo import expected, plan, table
from opinfo.pool import run_all
from opinfo.results import Result


def main() -> int:
    """Runs, writes, and says what was not expected; the exit status tells the same."""
    parser = argparse.ArgumentParser(prog="opinfo", description=__doc__)
    parser.add_argument("--device", default="musa", help="name of the device to simulate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", action="store_true", help="only the part that the tests run; leaves docs alone")
    parser.add_argument("--only", metavar="NAME", help="only infos with NAME in their name; leaves docs alone")
    parser.add_argument("--out", type=Path, default=Path("build/opinfo"), help="folder for the results")
    options = parser.parse_args()

    listed = expected.load()
    cases = plan.part(listed) if options.part else plan.complete()
    if options.only:
        cases = [case for case in cases if options.only in case.name]
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((options.out / "inductor").resolve()))

    console, start = Console(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        (options.out / "results.jsonl").open("w", buffering=1) as so_far,
    ):
        bar, failed = progress.add_task("starting", total=len(cases)), 0

        def done(result: Result) -> None:
            nonlocal failed
            failed += not result.ok
            so_far.write(json.dumps(dataclasses.asdict(result)) + "\n")
            progress.update(bar, advance=1, description=f"{failed} failed; {result.case.stage} {result.case.name[:30]}")

        results = sorted(run_all(cases, options.device, workers=options.workers, done=done), key=lambda r: r.case)

    seconds = round(time.monotonic() - start)
    report = {"torch": torch.__version__, "seconds": seconds, "results": [dataclasses.asdict(r) for r in results]}
    (options.out / "results.json").write_text(json.dumps(report, indent=1))
    text = table.markdown(results, listed)
    if not options.part and not options.only:
        table.FILE.write_text(text)
    console.print(text, markup=False, highlight=False)
    judgement = expected.judge(results, listed)
    verdict = "as expected" if judgement else f"not as expected:\n{judgement}"
    console.print(f"{len(results)} cases in {seconds} s, {verdict}", markup=False, highlight=False)
    return 0 if judgement else 1


if __name__ == "__main__":
    raise SystemExit(main())
