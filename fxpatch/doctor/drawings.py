"""The page's pictures as SVG text: stages as a pipeline, pieces on a time axis, memory per bucket.

Colours are classes of the page's style sheet, for light and dark; no picture needs them to be read: every state is also
a word, and every length a number. Texts are escaped here, so that whoever calls need not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fxpatch.doctor.probe import STAGES, State
from fxpatch.doctor.report import Line

WIDTH = 960
_PER_ROW = 7
_BOX = (118, 56)
_GAP = 22
_ROW_HEIGHT = 92
_LABELS, _NUMBERS = 150, 130
_WORST = (State.BROKEN, State.REPAIRED, State.OK, State.NOT_APPLICABLE)
CLASSES = {
    State.OK.value: "ok",
    State.REPAIRED.value: "repaired",
    State.BROKEN.value: "broken",
    State.NOT_APPLICABLE.value: "absent",
}


def worst(lines: Sequence[Line]) -> str:
    """The state that a stage has: that of its worst line; empty for none."""
    states = {line.state for line in lines}
    return next((state.value for state in _WORST if state.value in states), "")


def pipeline(stages: Mapping[str, Sequence[Line]]) -> str:
    """All stages in order, each a link to its lines, in rows that are read from left to right."""
    parts = []
    for index, stage in enumerate(STAGES):
        row, column = divmod(index, _PER_ROW)
        x, y = 4 + column * (_BOX[0] + _GAP), 6 + row * _ROW_HEIGHT
        if index:
            parts.append(_arrow(x, y, wrapped=column == 0))
        parts.append(_stage(stage, list(stages.get(stage, ())), x, y))
    height = 6 + _ROW_HEIGHT * -(-len(STAGES) // _PER_ROW)
    told = "; ".join(f"{stage}: {_words(stages.get(stage, ()))}" for stage in STAGES)
    return _svg(height, f"Stages and their states. {told}", parts)


def timeline(pieces: Mapping[str, Any]) -> str:
    """One bar for each piece, where it begins and ends in a replay, in microseconds."""
    rows = pieces["rows"]
    total = sum(row["us"] for row in rows) or 1.0
    scale = (WIDTH - _LABELS - _NUMBERS) / total
    parts, at = [], 0.0
    for index, row in enumerate(rows):
        y = 6 + index * 26
        parts += [
            _text(_LABELS - 8, y + 14, row["label"], "end"),
            f'<rect class="{"graph" if row["kind"] == "graph" else "split"}" x="{_LABELS + at * scale:.1f}" y="{y}" '
            f'width="{max(row["us"] * scale, 1.5):.1f}" height="20" rx="2"/>',
            _text(WIDTH - 4, y + 14, f"{row['us']:.1f} µs", "end"),
        ]
        at += row["us"]
    y = 6 + len(rows) * 26
    parts += [
        f'<path class="axis" d="M{_LABELS} {y}H{WIDTH - _NUMBERS}"/>',
        _text(_LABELS, y + 18, "0 µs", "start"),
        _text(WIDTH - _NUMBERS, y + 18, f"{total:.1f} µs", "end"),
    ]
    told = ", ".join(f"{row['label']} {row['us']:.1f} microseconds" for row in rows)
    return _svg(y + 26, f"Pieces of one replay in order: {told}", parts)


def memory(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two bars for each captured size: what its graphs take alone, and what they add to the shared pool."""
    most = max([row[kind] for row in rows for kind in ("alone", "added")] or [0]) or 1
    scale = (WIDTH - _LABELS - _NUMBERS) / most
    parts = []
    for index, row in enumerate(rows):
        y = 6 + index * 50
        parts.append(_text(_LABELS - 8, y + 25, f"size {row['size']}", "end"))
        for place, (kind, words) in enumerate((("alone", "alone"), ("added", "shared"))):
            length = max(row[kind] * scale, 1.5)
            parts.append(
                f'<rect class="{kind}" x="{_LABELS}" y="{y + place * 20}" width="{length:.1f}" height="17" rx="2"/>'
            )
            parts.append(_text(WIDTH - 4, y + place * 20 + 13, f"{words} {size_of(row[kind])}", "end"))
    told = "; ".join(
        f"size {row['size']}: alone {size_of(row['alone'])}, added to the shared pool {size_of(row['added'])}"
        for row in rows
    )
    return _svg(6 + len(rows) * 50, f"Memory of the captured sizes. {told}", parts)


def size_of(count: int) -> str:
    """Bytes in words: `3.0 MiB`."""
    if abs(count) < 1024:
        return f"{count} B"
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def _stage(stage: str, lines: list[Line], x: int, y: int) -> str:
    state, words = worst(lines), _words(lines)
    box = (
        f'<rect class="stage {CLASSES.get(state, "unasked")}" x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" '
        'rx="6"/>'
    )
    middle = x + _BOX[0] // 2
    inside = box + _text(middle, y + 24, stage, "middle", "name") + _text(middle, y + 43, words, "middle", "state")
    if not lines:
        return inside
    return f'<a href="#{escape(anchor(stage))}" aria-label="{escape(f"{stage}: {words}")}">{inside}</a>'


def anchor(stage: str) -> str:
    """The id of a stage's section in the page."""
    return "stage-" + "".join(letter if letter.isalnum() else "-" for letter in stage)


def _words(lines: Sequence[Line]) -> str:
    """`broken (2 of 4)`: the worst state, and how many lines have it, where not all do."""
    state = worst(lines)
    if not state:
        return "not asked"
    many = sum(line.state == state for line in lines)
    short = "repaired" if state == State.REPAIRED.value else state
    return short if many == len(lines) else f"{short} ({many} of {len(lines)})"


def _arrow(x: int, y: int, *, wrapped: bool) -> str:
    middle = y + _BOX[1] // 2
    if not wrapped:
        return f'<path class="arrow" d="M{x - _GAP + 2} {middle}H{x - 4}m-6 -4l6 4l-6 4"/>'
    end = 4 + _PER_ROW * (_BOX[0] + _GAP) - _GAP
    above = middle - _ROW_HEIGHT
    between = y - (_ROW_HEIGHT - _BOX[1]) // 2
    return f'<path class="arrow" d="M{end + 2} {above}h8V{between}H{x + _BOX[0] // 2}V{y - 4}m-4 -6l4 6l4 -6"/>'


def _text(x: float, y: float, words: str, anchored: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchored}">{escape(str(words))}</text>'


def _svg(height: int, told: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 20} {height}" role="group" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>'
    )
