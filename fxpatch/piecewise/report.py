"""What a runner has made of a model: pieces and their reasons, sizes, and which way calls have gone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # promoting needs the compiler
    from fxpatch.native import Decision


@dataclass(frozen=True)
class PieceRow:
    """One piece: `kind` is `graph`, `split` or `views`; `key` is the same for pieces that share a compiled form.

    Args:
        index: its place in the order of execution.
        kind: `graph`, `split` or `views`.
        key: of its compiled form.
        seconds: what compiling it took; 0 for what is not compiled, or was by an equal piece.
        reasons: why it runs between graphs; empty for those in graphs.
    """

    index: int
    kind: str
    key: str
    seconds: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class SizeRow:
    """One size: `way` is `captured`, `compiled` or `original`; `reason` says why not the way before.

    Args:
        size: elements in the dynamic dimension.
        way: what a call of this size does.
        graphs: how many device graphs it has.
        seconds: what capturing it took.
        reason: empty for a captured one.
    """

    size: int
    way: str
    graphs: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class Report:
    """`str(report)` is readable text, `report.json()` the same content.

    Args:
        state: what the runner is, in words: prepared, or not and why.
        device: device type of the example, and what becomes of its graphs.
        compiler: of the graph pieces.
        pieces: in the order of execution.
        operators: what became of modules with a native and an optimized forward.
        sizes: one for each size that was tried.
        calls: the way a call went -> how many went it.
        notes: what else a user should know, in sentences.
    """

    state: str
    device: str
    compiler: str
    pieces: tuple[PieceRow, ...] = ()
    operators: tuple[Decision, ...] = ()
    sizes: tuple[SizeRow, ...] = ()
    calls: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        distinct = {piece.key for piece in self.pieces if piece.kind == "graph"}
        graphs = [piece for piece in self.pieces if piece.kind == "graph"]
        lines = [
            f"piecewise runner: {self.state}",
            f"  device: {self.device}",
        ]
        if self.pieces:
            seconds = sum(piece.seconds for piece in self.pieces)
            lines.append(
                f"  pieces: {len(self.pieces)}, of these {len(graphs)} graphs, {len(distinct)} distinct; "
                f"compiled with {self.compiler} in {seconds:.1f} s"
            )
        reasons = dict.fromkeys(why for piece in self.pieces for why in piece.reasons)
        lines += [f"    between graphs: {why}" for why in reasons]
        for each in self.operators:
            speed = "" if each.speed is None else f", {each.speed:.2f}x"
            lines.append(f"  operator {each.operator}: {each.chosen}{speed}: {each.reason}")
        for row in self.sizes:
            lines.append(
                f"  size {row.size}: {row.way}, {row.graphs} graphs, {row.seconds:.2f} s"
                + (f": {row.reason}" if row.reason else "")
            )
        lines += [f"  calls: {count} {way}" for way, count in self.calls]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self), indent=2)
