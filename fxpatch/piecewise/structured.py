"""What a runner decides, where its users look already: in the log of "fxpatch", and in torch's structured trace.

    TORCH_TRACE=folder python server.py; tlparse folder -o report

The trace has, for each preparation, one record per decision, named so that they are listed together:

    fxpatch_runner_<name>               the report as JSON: state, pieces and their reasons, sizes, notes
    fxpatch_runner_<name>_piece_<i>     the code of a piece, one of those that share a compiled form
    fxpatch_runner_<name>_step_down     the first call that went another way than the fastest, per way and reason

In the log, a preparation is INFO; a size that is left out, and a model that could not be prepared, are WARNINGs; the
first step down of a kind is INFO.

Private torch name: `torch._logging.trace_structured`, seen in 2.13 with the parameters below. Where it has moved,
nothing is traced, and one warning in the log says so.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fxpatch.piecewise.report import Report
    from fxpatch.piecewise.split import Piece

log = logging.getLogger("fxpatch")
_TAKES = ("name", "metadata_fn", "payload_fn", "expect_trace_id")


def prepared(name: str, report: Report, pieces: Iterable[Piece], seconds: float) -> None:
    """Tells of one preparation.

    Args:
        name: of the runner.
        report: what has been made.
        pieces: of the split graph; empty where there is none.
        seconds: that it took.
    """
    log.info("runner %s is prepared after %.1f s: %s", name, seconds, report)
    if report.pieces == () and report.notes:
        log.warning("runner %s: %s: %s", name, report.state, report.notes[0])
    for row in report.sizes:
        if row.way != "captured":
            log.warning("runner %s: size %d is %s: %s", name, row.size, row.way, row.reason)
    trace = _trace()
    if trace is None:
        return
    prefix = f"fxpatch_runner_{_plain(name)}"
    _artifact(trace, prefix, "json", report.json)
    told: set[str] = set()
    for piece, row_of in zip(pieces, report.pieces, strict=False):
        if row_of.key not in told:
            told.add(row_of.key)
            _artifact(trace, f"{prefix}_piece_{piece.index}", "string", functools.partial(_code, piece))


def stepped_down(name: str, way: str, reason: str) -> None:
    """Tells of the first call that went `way` for this reason."""
    log.info("runner %s: a call goes to the %s function: %s", name, way, reason)
    trace = _trace()
    if trace is not None:
        told = {"runner": name, "way": way, "reason": reason}
        _artifact(trace, f"fxpatch_runner_{_plain(name)}_step_down", "json", lambda: json.dumps(told))


def _artifact(trace: Callable[..., None], name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,  # a runner prepares outside of any compilation
    )


@functools.cache
def _trace() -> Callable[..., None] | None:
    """torch's function, if it is the one that we know."""
    found: Any = getattr(torch._logging, "trace_structured", None)
    if callable(found) and set(_TAKES) <= set(inspect.signature(found).parameters):
        return found  # type: ignore[no-any-return]
    log.warning("fxpatch: torch._logging.trace_structured has moved: TORCH_TRACE has no records of runners")
    return None


def _code(piece: Piece) -> str:
    return f"# {piece.kind}\n" + "".join(f"# {why}\n" for why in piece.reasons) + str(piece.gm.code)


def _plain(name: str) -> str:
    """tlparse makes a file of it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
