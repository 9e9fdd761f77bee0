"""Bars, drawn from the tables of the documentation: a figure cannot say anything else than the table it stands for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from generate.svg import AMBER, BLUE, GREEN, GREY, SOFT, Box, Picture

DOCS = Path(__file__).resolve().parents[1]
WIDTH, LEFT, ROW = 860, 230, 30


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        name: at its left.
        value: its length, in the figure's unit.
        colours: fill and edge.
    """

    name: str
    value: float
    colours: tuple[str, str]


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """A figure as SVG: bars from one zero, each with its number."""
    picture = Picture(WIDTH, 60 + ROW * len(rows), f"{title}, {unit}")
    picture.words(20, 30, title, bold=True, anchor="start", size=14)
    picture.words(WIDTH - 20, 30, unit, anchor="end", colour=SOFT)
    longest = max(row.value for row in rows)
    for number, row in enumerate(rows):
        top = 46 + number * ROW
        length = max(row.value / longest * (WIDTH - LEFT - 90), 1.5)
        picture.words(LEFT - 10, top + 16, row.name, anchor="end")
        picture.bar(Box(LEFT, top, length, ROW - 8), row.colours)
        picture.words(LEFT + length + 8, top + 16, f"{row.value:g}", anchor="start", bold=True)
    return str(picture)


def table(page: str, *columns: str) -> list[dict[str, str]]:
    """The rows of all tables of a page that have these columns.

    Raises:
        LookupError: there is none: a figure would show nothing.
    """
    found: list[dict[str, str]] = []
    heads: list[str] | None = None
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            heads = None
        elif heads is None:
            heads = cells
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells) and set(columns) <= set(heads):
            found.append(dict(zip(heads, cells, strict=False)))
    if not found:
        raise LookupError(f"docs/{page} has no table with the columns {', '.join(columns)}")
    return found


def number(cell: str) -> float:
    """The first number of a cell: `36.3 us` -> 36.3, `1,000` -> 1000."""
    found = re.search(r"[\d,]*\.?\d+", cell)
    assert found is not None, cell
    return float(found[0].replace(",", ""))


def step() -> str:
    """Host time of a step of the runner, against a bare loop and the engines' design."""
    (row,) = table("benchmarks.md", "bare loop", "runner", "FX module")
    colours = {"bare loop": GREY, "runner": GREEN, "FX module": AMBER}
    return bars(
        "Host time of one step: 33 graphs, 32 operators", "us", [Bar(n, number(row[n]), c) for n, c in colours.items()]
    )


def rewrite() -> str:
    """What rewriting generated source costs, for a custom device in every tenth node."""
    rows = [row for row in table("benchmarks.md", "rewrite alone", "re.sub alone") if row["device"] == "musa"]
    drawn = []
    for row in rows[1:]:
        drawn.append(Bar(f"{row['nodes']} nodes: fxpatch", number(row["rewrite alone"]), GREEN))
        drawn.append(Bar(f"{row['nodes']} nodes: re.sub", number(row["re.sub alone"]), AMBER))
    return bars("Rewriting the source of a graph", "ms", drawn)


def warm() -> str:
    """`prepare()` in a new process, with what an earlier one saved and without."""
    drawn = []
    for row in table("benchmarks.md", "layers", "cold", "warm"):
        drawn.append(Bar(f"{row['layers']} layers: cold", number(row["cold"]), AMBER))
        drawn.append(Bar(f"{row['layers']} layers: warm", number(row["warm"]), GREEN))
    return bars("prepare() in a new process", "s", drawn)


def fakes() -> str:
    """What vendors' operators had before fxpatch, by the kinds of the coverage tables."""
    counted = Counter(
        row["before"].partition(":")[0] for row in table("fake_kernels.md", "operator", "library", "before")
    )
    colours = {"own fake wrong": AMBER, "hidden": AMBER, "own fake agrees": GREEN, "no fake": BLUE}
    drawn = [Bar(kind, count, colours.get(kind, GREY)) for kind, count in counted.most_common()]
    return bars("Vendors' operators, before fxpatch", "operators", drawn)


FIGURES = {"step": step, "rewrite": rewrite, "warm": warm, "fakes": fakes}
