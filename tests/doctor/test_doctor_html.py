"""The page: whatever an error says is text, nothing is fetched, and the pictures show what was measured."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from fxpatch.doctor.drawings import memory, pipeline, size_of, timeline, worst
from fxpatch.doctor.html import page
from fxpatch.doctor.probe import STAGES, State
from fxpatch.doctor.report import Attempt, Line, Report

HOSTILE = (
    "</pre></script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;b&gt; ]]> <!-- javascript:alert(3)"
)
SVG = "{http://www.w3.org/2000/svg}"
PIECES: dict[str, Any] = {
    "size": 512,
    "graph_class": "torch.musa.MUSAGraph",
    "rows": [
        {"kind": "graph", "label": "piece 0", "us": 300.0},
        {"kind": "split", "label": "softmax", "us": 100.0},
        {"kind": "graph", "label": "piece 2", "us": 600.0},
    ],
}
MEMORY: dict[str, Any] = {
    "rows": [
        {"size": 2048, "alone": 4 * 2**20, "added": 4 * 2**20},
        {"size": 512, "alone": 2**20, "added": 0},
    ]
}


def made(state: str, stage: str = "fx", text: str = "text", name: str = "p") -> Line:
    tried = Attempt(False, state, text, text, (text,), (text,), (text,), 1.0)
    return Line(name, stage, text, state, text, text, text, text, (text,), (tried, tried))


def report(*lines: Line, pictures: dict[str, Any] | None = None, text: str = "text") -> Report:
    return Report(text, True, (text,), text, {text: text}, (text,), lines, 1.0, pictures)


class Read(HTMLParser):
    """Tags, attributes and text of a page, as a browser's tokeniser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment got into the page: {data}")


def hostile_page() -> str:
    hostile_pieces = {**PIECES, "graph_class": HOSTILE, "rows": [{"kind": "graph", "label": HOSTILE, "us": 1.0}]}
    lines = [made(state.value, stage, HOSTILE, HOSTILE) for stage in STAGES for state in State]
    return page(report(*lines, pictures={"pieces": hostile_pieces, "memory": {"why_not": HOSTILE}}, text=HOSTILE))


def test_hostile_texts_stay_texts() -> None:
    read = Read(hostile_page())
    assert read.open == []  # every tag is closed by its own, in order
    assert read.tags == {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "b", "span", "section"),
        *("article", "details", "summary", "pre", "svg", "a", "rect", "path", "text"),
    }
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "action", "style")]
    assert all(value.startswith("#") for name, value in read.attributes if name in ("href", "xlink:href"))
    assert ("id", HOSTILE) in read.attributes
    assert "".join(read.text).count(HOSTILE) > 200


def test_the_page_asks_for_nothing() -> None:
    text = hostile_page()
    assert (
        '<meta http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;; style-src '
        '&#x27;unsafe-inline&#x27;; base-uri &#x27;none&#x27;; form-action &#x27;none&#x27;">' in text
    )
    assert "@import" not in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_a_text_that_cannot_be_encoded_does_not_get_here() -> None:
    page(report(made("broken", text="\u4e2d\u202e\U0001f600"))).encode("utf-8")


def test_links_lead_somewhere_and_states_are_words() -> None:
    read = Read(page(report(*(made(state.value, stage) for stage, state in zip(STAGES, [*State] * 4, strict=False)))))
    links = [value[1:] for name, value in read.attributes if name == "href"]
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(links) == len(STAGES)
    assert set(links) <= set(ids)
    assert {"ok", "repaired", "broken", "not applicable"} <= set(read.text)


def test_light_and_dark_and_without_a_mouse() -> None:
    text = page(report(made("broken")))
    assert "prefers-color-scheme:dark" in text
    assert 'content="light dark"' in text
    assert "a:focus,summary:focus{outline" in text
    assert "<details open><summary>" in text
    assert '<pre tabindex="0">' in text


def test_a_stage_is_as_bad_as_its_worst_line() -> None:
    lines = [made(state) for state in ("ok", "not applicable", "repaired by fxpatch", "broken")]
    assert [worst(lines[:n]) for n in range(5)] == ["", "ok", "ok", "repaired by fxpatch", "broken"]
    assert worst(lines[1:2]) == "not applicable"
    texts = _texts(pipeline({"fx": lines, "aot": lines[:1]}))
    assert texts.count("broken (1 of 4)") == 1
    assert texts.count("ok") == 1
    assert texts.count("not asked") == len(STAGES) - 2
    assert [text for text in texts if text in STAGES] == list(STAGES)


def test_the_timeline_is_in_proportion() -> None:
    root = ElementTree.fromstring(timeline(PIECES))
    bars = [(float(bar.get("x", "")), float(bar.get("width", ""))) for bar in root.iter(f"{SVG}rect")]
    (x0, w0), (x1, w1), (x2, w2) = bars
    assert [round(w / w1, 1) for _, w in bars] == [3.0, 1.0, 6.0]
    assert x1 == pytest.approx(x0 + w0, abs=0.11)
    assert x2 == pytest.approx(x1 + w1, abs=0.11)
    assert [bar.get("class") for bar in root.iter(f"{SVG}rect")] == ["graph", "split", "graph"]
    assert _texts(timeline(PIECES)) == [
        *("piece 0", "300.0 µs", "softmax", "100.0 µs", "piece 2", "600.0 µs", "0 µs", "1000.0 µs")
    ]
    assert w2 < 960


def test_memory_is_in_proportion() -> None:
    root = ElementTree.fromstring(memory(MEMORY["rows"]))
    widths = [float(bar.get("width", "")) for bar in root.iter(f"{SVG}rect")]
    assert widths[0] == widths[1] == pytest.approx(4 * widths[2], rel=0.01)
    assert widths[3] == 1.5  # nothing, and still to be seen
    assert _texts(memory(MEMORY["rows"])) == [
        *("size 2048", "alone 4.0 MiB", "shared 4.0 MiB", "size 512", "alone 1.0 MiB", "shared 0 B")
    ]


def test_pictures_that_could_not_be_measured_say_why() -> None:
    reason = {"why_not": "cpu captures no graphs"}
    text = page(report(pictures={"pieces": reason, "memory": reason}))
    assert text.count("Not measured: cpu captures no graphs") == 2
    assert text.count("<svg") == 1
    assert "Pieces of a replay" not in page(report())
    assert page(report(pictures={"pieces": PIECES, "memory": MEMORY})).count("<svg") == 3


def test_every_picture_is_well_formed_and_told_in_words() -> None:
    for picture in re.findall(r"<svg.*?</svg>", hostile_page()):
        assert ElementTree.fromstring(picture).get("aria-label")
    assert timeline({**PIECES, "rows": []}).startswith("<svg")
    assert memory([]).startswith("<svg")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**41, "2048.0 GiB")]
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert size_of(count) == words


def test_a_repaired_line_says_what_it_was_without() -> None:
    line = dataclasses.replace(made("repaired by fxpatch"), error="NameError: <device>", applied=("codegen",))
    text = page(report(line))
    assert "without fxpatch: NameError: &lt;device&gt;" in text
    assert "applied: codegen" in text


def _texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
