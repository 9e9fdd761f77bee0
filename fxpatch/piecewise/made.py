"""What a runner has made of its model so far: all that a call needs, and what the report tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fxpatch.piecewise.buckets import Buckets
from fxpatch.piecewise.reasons import Reason
from fxpatch.piecewise.report import Report, SizeRow

if TYPE_CHECKING:  # they need the compiler
    from fxpatch.piecewise.prepared import Prepared
    from fxpatch.piecewise.start import Start


@dataclass
class Made:
    """Filled while a runner prepares; one that fails begins with a new one.

    Args:
        state: in words.
        start: the request, once it is known to make sense.
        autocast: the dtype that it was prepared under; None outside of autocast.
        prepared: the compiled model; None where calls go to the original function.
        sizes: what is captured, where something is.
        rows: of the sizes that were tried.
        why: sizes that are not captured.
        beyond: what is done above the largest size, and why.
        padding: what padding changes; None where it changes nothing.
        notes: for the report.
        pool_bytes: what the device's reserved memory grew by while sizes were captured, where it says that.
    """

    state: str
    start: Start | None = None
    autocast: torch.dtype | None = None
    prepared: Prepared | None = None
    sizes: Buckets | None = None
    rows: dict[int, SizeRow] = field(default_factory=dict)
    why: dict[int, Reason] = field(default_factory=dict)
    beyond: Reason = Reason.OVER_LARGEST
    padding: str | None = None
    notes: list[str] = field(default_factory=list)
    pool_bytes: int | None = None

    def release_graphs(self) -> None:
        """Gives all graphs back; compiled pieces stay, and what is known of them."""
        if self.prepared is not None:
            self.prepared.release()
        self.pool_bytes = None if self.pool_bytes is None else 0
        self.rows.clear()
        self.why = {size: why for size, why in self.why.items() if why is Reason.PIECES_DIFFER}

    def report(self, compiler: str, calls: tuple[tuple[str, int], ...]) -> Report:
        """All of it, for people.

        Args:
            compiler: of the pieces.
            calls: which way calls have gone, and how many.
        """
        begun, prepared = self.start, self.prepared
        decisions = None if prepared is None else prepared.decisions
        sizes = self.sizes.reason if self.sizes is not None else ""
        return Report(
            state=self.state,
            device="" if begun is None else f"{begun.device.type} ({begun.device.reason})",
            compiler=compiler,
            pieces=() if prepared is None else prepared.rows,
            operators=() if decisions is None else tuple(decisions),
            sizes=tuple(self.rows.values()),
            calls=calls,
            notes=tuple(filter(None, [*([] if prepared is None else prepared.notes), *self.notes, sizes])),
        )
