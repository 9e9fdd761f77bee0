"""Each fact in the documentation names what holds it, and that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "facts").glob("*.md"))
_ROW = re.compile(r"^\| (?P<fact>[^|]+) \| (?P<held>[^|]+) \|$", re.MULTILINE)


def _facts(page: Path) -> list[tuple[str, str]]:
    rows = [(row["fact"], row["held"]) for row in _ROW.finditer(page.read_text("utf-8"))]
    return [(fact, held) for fact, held in rows if fact != "fact" and not fact.startswith("---")]


def _is_there(held: str) -> bool:
    found = re.fullmatch(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(test_\w+))?`", held)
    if found is None or not (ROOT / found[1]).is_file():
        return False
    return found[2] is None or f"def {found[2]}(" in (ROOT / found[1]).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fact_is_held_by_something(page: Path) -> None:
    assert [fact for fact, held in _facts(page) if not _is_there(held)] == []


def test_there_are_facts_and_most_are_held_by_tests() -> None:
    held = [by for page in PAGES for _, by in _facts(page)]
    assert len(held) > 40
    assert sum(by.startswith("`tests/") for by in held) > 0.8 * len(held)


def test_what_is_not_there_is_seen() -> None:
    assert not _is_there("`tests/docs/test_facts.py::test_of_nothing`")
    assert not _is_there("`benchmarks/of_nothing.py`")
    assert not _is_there("everybody knows")
    assert _is_there("`tests/docs/test_facts.py::test_what_is_not_there_is_seen`")
