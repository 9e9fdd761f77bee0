"""`make mutation`: every mutant of every module in modules.toml; the survivors, and the table, also in build/mutation/.

The exit status is 1 where fewer mutants are killed than modules.toml asks for, or `equivalent.toml` is out of date.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, for all children: it takes longer than most trials
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mutation.mutants import HERE, ROOT, Equivalent, Mutant, equivalents, mutants
from mutation.trial import run


@dataclass
class Score:
    """One line of the table."""

    module: str
    sha256: str  # of its source
    killed: int = 0
    equivalent: int = 0
    survivors: list[str] = field(default_factory=list)
    ways: dict[str, int] = field(default_factory=dict)  # how the killed ones ended
    stale: list[Equivalent] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The part that was killed, of those that can be."""
        return self.killed / ((self.killed + len(self.survivors)) or 1)


def main() -> int:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument("only", nargs="*", metavar="PATH", help="modules, instead of all in modules.toml")
    parser.add_argument("--again", action="store_true", help="only those that survived the last time, as OUT has it")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation", help="folder for the results")
    options = parser.parse_args()

    config = tomllib.loads((HERE / "modules.toml").read_text())
    torch.set_num_threads(1)
    gc.freeze()  # children share what there is
    console = Console()
    scores = [
        trial_of(entry, config, options.out if options.again else None, console)
        for entry in config["module"]
        if not options.only or entry["path"] in options.only
    ]
    for each in scores:
        for entry in each.stale:
            console.print(f"no such mutant, take it off equivalent.toml: {entry}", markup=False, soft_wrap=True)
    console.print(_table(scores))
    options.out.mkdir(parents=True, exist_ok=True)
    for each in scores:
        report = {**asdict(each), "score": round(each.score, 4)}
        _report(options.out, each.module).write_text(json.dumps(report, indent=1) + "\n")
    return int(any(each.score < config["least"] or each.stale for each in scores))


def trial_of(entry: dict[str, Any], config: dict[str, Any], again: Path | None, console: Console) -> Score:
    """The mutants of one module against its tests, which have to pass without one."""
    path, tests, examples = entry["path"], entry["tests"], config["examples"]
    module, source = path.removesuffix(".py").replace("/", "."), (ROOT / path).read_text()
    original = run(module, source, tests, seconds=120, examples=examples)
    if not original.passed:
        raise SystemExit(f"the tests of {path} do not pass as it is ({original.how}):\n{original.output}")
    tried = list(mutants(source, config["leave_out"]))
    listed = {(each.before, each.after): each for each in equivalents() if each.module == path}
    score, stale = Score(path, hashlib.sha256(source.encode()).hexdigest()), dict(listed)
    survived = None if again is None else _survivors(again, score)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(path, total=len(tried))
        for mutant in tried:
            if (mutant.before, mutant.after) in listed:
                score.equivalent += 1
                stale.pop((mutant.before, mutant.after), None)
            elif survived is not None and str(mutant) not in survived:
                score.killed += 1
            else:
                patience = 5 * original.seconds + 5
                _count(score, mutant, run(module, mutant.source, tests, seconds=patience, examples=examples))
                if str(mutant) in score.survivors[-1:]:
                    console.print(f"survived: {path}, {mutant}", markup=False, highlight=False, soft_wrap=True)
            progress.update(bar, advance=1, description=f"{path}: {len(score.survivors)} survived")
    score.stale = list(stale.values())
    return score


def _survivors(out: Path, score: Score) -> set[str]:
    """Those of the last time. More tests kill no fewer, so the others are not run again, unless the module changed."""
    report = json.loads(_report(out, score.module).read_text())
    if report["sha256"] != score.sha256:
        raise SystemExit(f"{score.module} has changed since the last time: run all of its mutants")
    return set(report["survivors"])


def _report(out: Path, path: str) -> Path:
    return out / f"{path.removesuffix('.py').replace('/', '.')}.json"


def _count(score: Score, mutant: Mutant, trial: Any) -> None:
    if trial.how == "nothing ran":
        raise SystemExit(f"{score.module}, {mutant}: the tests were not run\n{trial.output}")
    if trial.passed:
        score.survivors.append(str(mutant))
    else:
        score.killed += 1
        score.ways[trial.how] = score.ways.get(trial.how, 0) + 1


def _table(scores: list[Score]) -> Table:
    table = Table(title="Mutation testing")
    table.add_column("module")
    for name in ("mutants", "killed", "survived", "equivalent", "score"):
        table.add_column(name, justify="right")
    for each in scores:
        survived = len(each.survivors)
        counts = (each.killed + survived + each.equivalent, each.killed, survived, each.equivalent)
        table.add_row(each.module, *map(str, counts), f"{each.score:.1%}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
