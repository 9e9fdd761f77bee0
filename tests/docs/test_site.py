"""The site is built with every warning an error, has a page for everything, and needs no network to be read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from blocks import PAGES
from generate import api, patches

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
pytest.importorskip("material", reason="pip install -e .[docs]")


class _Page(HTMLParser):
    """What a page fetches by itself, where its links go, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.styles: list[str] = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a":
            self.links.append(given.get("href", ""))
        elif tag == "link":
            self.fetched.append(given.get("href", ""))
        else:
            self.fetched += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, _Page]:
    return {path.relative_to(site).as_posix(): _Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_there_is_a_page_for_everything(pages: dict[str, _Page]) -> None:
    written = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES if page.startswith("docs/")}
    records = {f"patches/{patch.name}" for patch in patches.all_patches()}
    reference = {f"reference/{page.name}" for page in api.PAGES} | {"reference/command_line"}
    assert {f"{name}.html" for name in written | records | reference | {"patches/index", "404"}} == set(pages)


def test_every_public_name_has_its_place_in_the_reference(pages: dict[str, _Page]) -> None:
    import importlib

    missing = []
    for page in api.PAGES:
        for module_name in page.modules:
            module = importlib.import_module(module_name)
            for name in api.public_names(module):
                home = api.defined_in(module, name)
                if not any(home in other.anchors for path, other in pages.items() if path.startswith("reference/")):
                    missing.append(home)
    assert missing == []


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[str, _Page]) -> None:
    elsewhere = r"(?:https?:)?//"
    foreign = [f"{path}: {url}" for path, page in pages.items() for url in page.fetched if re.match(elsewhere, url)]
    styles = [(path.name, path.read_text("utf-8")) for path in site.rglob("*.css")]
    styles += [(path, style) for path, page in pages.items() for style in page.styles]
    foreign += [
        f"{name}: {url}"
        for name, text in styles
        for url in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", text)
        if re.match(elsewhere, url)
    ]
    assert foreign == []
    # the theme's script would fetch mermaid for a diagram of that kind
    assert [path for path, page in pages.items() if "mermaid" in (site / path).read_text("utf-8")] == []


def test_what_is_fetched_and_linked_is_there(site: Path, pages: dict[str, _Page]) -> None:
    missing = []
    for path, page in pages.items():
        if path == "404.html":
            continue  # its links begin at the server's root
        for url in [*page.fetched, *page.links]:
            target, _, anchor = url.partition("#")
            if re.match(r"https?://|data:|mailto:|$", url):
                continue
            file = (site / path).parent / target.partition("?")[0] if target else site / path
            if not file.resolve().is_file():
                missing.append(f"{path}: {url}")
            elif anchor and file.suffix == ".html":
                where = file.resolve().relative_to(site.resolve()).as_posix()
                if anchor not in pages[where].anchors:
                    missing.append(f"{path}: {url}")
    assert missing == []


def test_chinese_words_can_be_searched_for(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    assert index["config"]["lang"] == ["en", "zh"]  # the English one alone drops them
    assert {"适配新设备", "五分钟上手"} <= {entry["title"] for entry in index["docs"]}
