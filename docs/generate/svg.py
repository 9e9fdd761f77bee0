"""Pictures as SVG: boxes, arrows and words on a white card, readable on a light and on a dark page."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans CJK SC', sans-serif"
INK, SOFT, LINE, CARD = "#1f2937", "#6b7280", "#94a3b8", "#ffffff"
# fill and edge of boxes: what people call, what does the work, what everything stands on, what stands alone
BLUE, GREEN = ("#e0f2fe", "#0284c7"), ("#dcfce7", "#16a34a")
AMBER, GREY = ("#fef3c7", "#d97706"), ("#f1f5f9", "#64748b")


@dataclass(frozen=True)
class Box:
    """A box on the picture, in pixels; `x` and `y` are its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass
class Picture:
    """An SVG that is drawn from above to below: `str(picture)` is its text.

    Args:
        width, height: pixels.
        title: what the picture shows, for those who cannot see it.
    """

    width: float
    height: float
    title: str
    _parts: list[str] = field(default_factory=list)

    def box(
        self,
        at: Box,
        title: str,
        lines: tuple[str, ...] = (),
        *,
        colours: tuple[str, str] = GREY,
        size: int = 14,
        tooltip: str = "",
    ) -> None:
        """A box with a bold title and lines of small words under it; `tooltip` shows when the mouse rests on it."""
        fill, edge = colours
        self._parts.append(
            f'<g><title>{escape(tooltip or title)}</title><rect x="{at.x:g}" y="{at.y:g}" width="{at.width:g}" '
            f'height="{at.height:g}" rx="6" fill="{fill}" stroke="{edge}"/>'
        )
        step = size + 2
        top = at.y + (at.height - step * len(lines) - size) / 2 + size - 2
        self.words(at.middle, top, title, bold=True, size=size)
        for row, line in enumerate(lines):
            self.words(at.middle, top + step * (row + 1), line, size=size - 3, colour=SOFT)
        self._parts.append("</g>")

    def bar(self, at: Box, colours: tuple[str, str]) -> None:
        """A bar without words."""
        fill, edge = colours
        self._parts.append(
            f'<rect x="{at.x:g}" y="{at.y:g}" width="{at.width:g}" height="{at.height:g}" rx="3" fill="{fill}" '
            f'stroke="{edge}"/>'
        )

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        bold: bool = False,
        size: int = 12,
        colour: str = INK,
        anchor: str = "middle",
    ) -> None:
        """One line of words; `anchor` says what of it is at `x`: `start`, `middle` or `end`."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, name: str = "") -> None:
        """A curve from one point to another, with a head; `name` is what it joins."""
        bend = (y2 - y1) / 2
        self._parts.append(
            f'<path d="M{x1:g} {y1:g} C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}" fill="none" '
            f'stroke="{LINE}" marker-end="url(#head)"><title>{escape(name)}</title></path>'
        )

    def across(self, x1: float, y: float, x2: float) -> None:
        """A straight arrow from left to right."""
        self._parts.append(f'<path d="M{x1:g} {y:g} H{x2:g}" fill="none" stroke="{LINE}" marker-end="url(#head)"/>')

    def __str__(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
                f'font-family="{escape(FONT)}">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{self.width:g}" height="{self.height:g}" rx="10" fill="{CARD}"/>',
                *self._parts,
                "</svg>\n",
            ]
        )
