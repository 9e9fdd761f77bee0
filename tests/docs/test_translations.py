"""A translated page says what its original says: the same code, output and marks, in the same order; the same links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, blocks_of

TRANSLATED = [page for page in PAGES if page.endswith(".zh.md")]


def _original(page: str) -> str:
    return page.removesuffix(".zh.md") + ".md"


def test_the_pages_that_new_users_read_first_are_translated() -> None:
    assert TRANSLATED == ["docs/guides/bring_up.zh.md", "docs/start.zh.md"]


@pytest.mark.parametrize("page", TRANSLATED)
def test_the_code_is_the_same(page: str) -> None:
    ours, theirs = (
        [(block.language, block.code, block.output, block.marked is None) for block in blocks_of(each)]
        for each in (page, _original(page))
    )
    assert ours == theirs
    assert len(ours) >= 5


@pytest.mark.parametrize("page", TRANSLATED)
def test_sections_and_links_are_the_same(page: str) -> None:
    def outline(text: str) -> list[str]:
        text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        links = [target.replace(".zh.md", ".md").partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]
        return [f"{len(marks)} #" for marks in re.findall(r"^(#+) ", text, re.MULTILINE)] + sorted(set(links))

    assert outline((ROOT / page).read_text("utf-8")) == outline((ROOT / _original(page)).read_text("utf-8"))


@pytest.mark.parametrize("page", TRANSLATED)
def test_it_is_chinese_and_written_as_chinese(page: str) -> None:
    """Full-width punctuation between Chinese characters, and no sentence that was left in English."""
    text = re.sub(r"^```.*?^```$|`[^`]*`", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"[\u4e00-\u9fff][,;:?!][\u4e00-\u9fff ]", text) == []
    long = [line for line in text.splitlines() if len(line) > 60 and not re.search(r"[\u4e00-\u9fff]", line)]
    assert long == []


@pytest.mark.parametrize("page", TRANSLATED)
def test_pages_point_at_each_other(page: str) -> None:
    name, original = Path(page).name, Path(_original(page)).name
    assert f"]({original})" in (ROOT / page).read_text("utf-8")
    assert f"]({name})" in (ROOT / _original(page)).read_text("utf-8")
