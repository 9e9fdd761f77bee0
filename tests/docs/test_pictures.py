"""The pictures say what the source says: the layers, every import, every patch, every number of a table."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from generate import figures, layers, patches, runner, stages
from hooks import PICTURES

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def _words(picture: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_whole_and_keeps_to_itself(name: str) -> None:
    """Well-formed, with a title, nothing beyond its edges, nothing from elsewhere."""
    text = PICTURES[name]()
    root = ET.fromstring(text)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert root.findtext(f"{SVG}title")
    for box in root.iter(f"{SVG}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        assert 0 <= x < x + float(box.attrib["width"]) <= width
        assert 0 <= y < y + float(box.attrib["height"]) <= height
    assert re.findall(r"(?:href|src|url)=", text) == []
    assert set(re.findall(r"https?://\S+?(?=\")", text)) == {"http://www.w3.org/2000/svg"}


def _imports_in_the_source() -> set[tuple[str, str]]:
    """Independent of the import graph: the import statements, read from the files."""
    edges: set[tuple[str, str]] = set()
    for package in layers.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for imported in _imported(ast.parse(path.read_text(encoding="utf-8"))):
                known = imported.split(".")[0] in layers.PACKAGES and "fxpatch" not in (module, imported)
                if known and layers.part_of(module) != layers.part_of(imported):
                    edges.add((layers.part_of(module), layers.part_of(imported)))
    return edges


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return [name for each in node.orelse for name in _imported(each)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return [f"{module}.{alias.name}" if module == "fxpatch" else module for alias in node.names]
    return [name for child in ast.iter_child_nodes(node) for name in _imported(child)]


def test_the_arrows_are_the_imports() -> None:
    no_parts = {"__version__"}  # `from fxpatch import __version__` is no part of ours
    in_source = {(upper, lower) for upper, lower in _imports_in_the_source() if lower not in no_parts}
    assert set(layers.imports()) == in_source


def _reach(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    while True:
        longer = edges | {(a, d) for a, b in edges for c, d in edges if b == c}
        if longer == edges:
            return edges
        edges = longer


def test_no_import_is_lost_by_leaving_arrows_out() -> None:
    everything, drawn = set(layers.imports()), set(layers.reduced(layers.imports()))
    assert drawn < everything
    assert _reach(drawn) == _reach(everything)
    assert all(_reach(drawn - {edge}) != _reach(drawn) for edge in drawn)
    picture = layers.draw()
    assert all(f"{upper} imports {lower}" in picture for upper, lower in drawn)


def test_every_part_is_in_the_picture_once() -> None:
    words = _words(layers.draw())
    assert [part for part in layers.modules() if words.count(part) != 1] == []


def test_every_part_has_its_sentence() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = {
        name for cell in re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert set(layers.modules()) - told == set()


def test_every_patch_is_at_a_stage_once() -> None:
    words = _words(stages.draw())
    names = [patch.name for patch in patches.all_patches()]
    assert [name for name in names if words.count(name) != 1] == []
    assert {stages.stage_of(patch) for patch in patches.all_patches()} == set(stages.STAGES)


def test_what_the_runners_picture_names_is_there() -> None:
    named = [module for _, modules in runner.PREPARE.values() for module in modules]
    assert [name for name in named if not list((ROOT / "fxpatch").glob(name.replace(".", "/") + "*"))] == []


def test_a_figure_has_the_numbers_of_its_table() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    row = re.search(r"^\| bare loop .*\n.*\n\| ([\d.]+) us \| ([\d.]+) us \| ([\d.]+) us", page, re.MULTILINE)
    assert row is not None
    assert [word for word in _words(figures.step()) if re.fullmatch(r"[\d.]+", word)] == list(row.groups())


def test_a_table_that_is_gone_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"docs/benchmarks.md has no table with the columns moon phase"):
        figures.table("benchmarks.md", "moon phase")


def test_bars_are_as_long_as_their_numbers() -> None:
    rows = [figures.Bar(name, value, ("#fff", "#000")) for name, value in (("one", 10), ("two", 5))]
    picture = figures.bars("Title", "us", rows)
    first, second = (float(rect.attrib["width"]) for rect in list(ET.fromstring(picture).iter(f"{SVG}rect"))[1:])
    assert first == 2 * second
