"""What was decided for each operator, and running the model by it. The rule: nothing runs optimized that was not
promoted, a promotion can be taken back for one operator alone, and every decision has a reason that a person can read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fxpatch.native.agreement import Deviation
from fxpatch.native.bisection import Bisection, culprits
from fxpatch.native.forwards import NATIVE, OPTIMIZED, running
from fxpatch.native.operators import NativeOperator


@dataclass(frozen=True)
class Decision:
    """One row of the table.

    Args:
        operator: qualified name; `kind` its class; `optimized` the method that was tried.
        chosen: `"optimized"` or `"native"`.
        reason: why, in words.
        error: largest difference from native on the real inputs; None where the optimized forward returned nothing.
        speed: time of the native forward over that of the optimized one; None where it was not measured.
        measured: what was timed: `"replay"` of captured graphs, or `"call"`; empty where nothing was.
    """

    operator: str
    kind: str
    optimized: str
    chosen: str
    reason: str
    error: Deviation | None = None
    speed: float | None = None
    measured: str = ""


class Decisions:
    """The decision table of one model; made by `promote`.

    Args:
        operators: all of the model's, in the order of its modules.
        rows: one decision for each.
    """

    def __init__(self, operators: Sequence[NativeOperator], rows: Sequence[Decision]) -> None:
        self.operators = {op.name: op for op in operators}
        self._rows = {row.operator: row for row in rows}
        assert list(self._rows) == list(self.operators)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> Decision:
        return self._rows[name]

    @property
    def promoted(self) -> tuple[str, ...]:
        """Names of the operators that run their optimized forward, in the model's order."""
        return tuple(row.operator for row in self if row.chosen == OPTIMIZED)

    @contextlib.contextmanager
    def apply(self, promoted: Collection[str] | None = None) -> Iterator[None]:
        """Until the context closes, promoted operators run their optimized forward, all others the native one.

        Args:
            promoted: only these of the promoted operators; None: all of them. The decisions stay as they are.

        Raises:
            KeyError: a name in `promoted` that has not been promoted.
        """
        chosen = set(self.promoted if promoted is None else promoted)
        if unknown := chosen - set(self.promoted):
            raise KeyError(f"not promoted: {', '.join(sorted(unknown))}")
        with running((op, OPTIMIZED if name in chosen else NATIVE) for name, op in self.operators.items()):
            yield

    def demote(self, name: str, reason: str) -> None:
        """Takes one promotion back. It takes effect where `apply()` is entered next.

        Raises:
            KeyError: no operator of this name.
        """
        self._rows[name] = replace(self._rows[name], chosen=NATIVE, reason=reason)

    def bisect(self, failing: Callable[[set[str]], bool], what: str = "a later capture") -> Bisection:
        """Finds which promoted operators break something, and demotes them alone: one, or several.

        Args:
            failing: tries with exactly these operators optimized (`with decisions.apply(names)`), all others native;
                True if that fails. What it raises passes through; culprits found until then stay demoted.
            what: what fails, for the reasons in the table.

        Returns:
            What was found, also in words. Without a culprit: `fails_without` says whether it fails with none promoted.
        """

        def found(name: str, along: tuple[str, ...]) -> None:
            together = f", together with {', '.join(along)}" if along else ""
            self.demote(name, f"breaks {what}{together}: found by bisection")

        return culprits(self.promoted, failing, found)

    def rows(self) -> list[dict[str, Any]]:
        """The table for JSON: one dict per operator; `error` is None or `{"absolute": float, "relative": float}`."""
        return [asdict(row) for row in self]

    def __str__(self) -> str:
        head = ("operator", "chosen", "error", "speed", "reason")
        body = [(f"{row.operator} ({row.kind})", row.chosen, _error(row), _speed(row), row.reason) for row in self]
        if not body:
            return "no operators with a native and an optimized forward"
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)][:-1]
        lines = [
            (*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1])
            for line in (head, *body)
        ]
        return "\n".join("  ".join(line).rstrip() for line in lines)


def _error(row: Decision) -> str:
    return "-" if row.error is None else f"{row.error.absolute:.2g} / {row.error.relative:.2g}"


def _speed(row: Decision) -> str:
    return "-" if row.speed is None else f"{row.speed:.2f}x {row.measured}"
