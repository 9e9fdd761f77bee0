"""The picture of the packages: rows are the layers of pyproject.toml's contract, arrows are real imports.

The contract says who may import whom; the arrows are what the source does. An arrow is left out where longer ones say
it already (a transitive reduction), since all of them together would be a black page.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

import grimp

from generate.svg import AMBER, BLUE, GREEN, GREY, Box, Picture

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fxpatch", "fake_kernels", "compile_configs")
WIDTH, ROW, BOX, GAP = 980, 92, 52, 18
Edges = frozenset[tuple[str, str]]


def contract() -> list[list[str]]:
    """The layers, from above to below; the two packages that know nothing of fxpatch are the last row."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(table["layers"] for table in tables if table["type"] == "layers")
    return [*([name.strip() for name in layer.split("|")] for layer in layers), ["fake_kernels", "compile_configs"]]


def part_of(module: str) -> str:
    """The box a module is in: `fxpatch.repair.rng` is in `repair`, `fake_kernels.audit` in `fake_kernels`."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "fxpatch" and rest else package


def modules() -> dict[str, int]:
    """How many modules each part has; `fxpatch/__init__.py` itself is no part."""
    counts: dict[str, int] = {}
    for module in _graph().modules:
        if module != "fxpatch":
            counts[part_of(module)] = counts.get(part_of(module), 0) + 1
    return counts


def imports() -> Edges:
    """Which part imports which, at run time; imports inside functions count, those for type checkers do not."""
    graph = _graph()
    return frozenset(
        (part_of(importer), part_of(imported))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if "fxpatch" not in (importer, imported) and part_of(importer) != part_of(imported)
    )


def reduced(edges: Edges) -> Edges:
    """The edges that no longer path says already; `edges` has no circle."""
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)

    def reach(part: str) -> set[str]:
        return {each for near in below.get(part, ()) for each in {near, *reach(near)}}

    return frozenset(
        (upper, lower) for upper, lower in edges if not any(lower in reach(near) for near in below[upper] - {lower})
    )


def draw() -> str:
    """The picture as SVG."""
    counts, edges = modules(), imports()
    rows = [[part for part in row if part in counts] for row in contract()]
    placed = {part for row in rows for part in row}
    rows = [row for row in ([sorted(set(counts) - placed), *rows]) if row]
    picture = Picture(WIDTH, len(rows) * ROW + 20, "The packages of fxpatch, who imports whom")
    at = {part: box for number, row in enumerate(rows) for part, box in zip(row, _spread(row, number), strict=True)}
    for upper, lower in sorted(reduced(edges)):
        start, end = at[upper], at[lower]
        picture.arrow(start.middle, start.bottom, end.middle, end.y - 2, name=f"{upper} imports {lower}")
    for part, box in at.items():
        uses = sorted(lower for upper, lower in edges if upper == part)
        count = f"{counts[part]} module{'s' * (counts[part] > 1)}"
        tooltip = f"{part}: imports {', '.join(uses) or 'nothing of ours'}"
        picture.box(box, part, (count,), colours=_COLOURS.get(part, AMBER), tooltip=tooltip)
    return str(picture)


_COLOURS = {
    **dict.fromkeys(
        ("__main__", "commands", "testing", "autoload", "doctor", "engines", "report", "verification"), BLUE
    ),
    **dict.fromkeys(("installer", "piecewise", "layers", "simulator"), GREEN),
    **dict.fromkeys(("fake_kernels", "compile_configs"), GREY),
}


def _spread(row: Iterable[str], number: int) -> list[Box]:
    names = list(row)
    width = min(170.0, (WIDTH - GAP) / len(names) - GAP)
    left = (WIDTH - len(names) * (width + GAP) + GAP) / 2
    if len(names) == 1:  # one box to the left, the next to the right, so that arrows past it can be seen
        left += (-1) ** number * width
    return [Box(left + place * (width + GAP), number * ROW + 20, width, BOX) for place in range(len(names))]


def _graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
