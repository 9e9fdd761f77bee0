"""What a profiler sees of a runner: a named range for each call, its copies, and each of its steps.

A plan's steps are a flat tuple of calls, and stay so: while `torch.profiler` records, a call takes another tuple, in
which each step is in a range, made at the first such call and kept with the plan. Otherwise a call asks once whether a
profiler records, which is one C function, and pays nothing per step.

    fxpatch.replay size=8 n=3           a call that is replayed, in which are
    fxpatch.copy_in                     its tensors, copied into static buffers and filled up,
    fxpatch.piece 3: graph              the replay of one graph (the number is the report's),
    fxpatch.piece 4: mylib::attention   and what runs between graphs
    fxpatch.compiled n=3                a call that runs compiled pieces, in which each piece is, too
    fxpatch.original: <reason>          a call of the original function
    fxpatch.capture size=8              in prepare()

Private torch name: `torch.autograd._profiler_enabled`, seen in 2.13, where torch.distributed.rpc asks it, too. Where it
has gone there are no ranges, and one warning in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from fxpatch.piecewise.lint import name_of

if TYPE_CHECKING:
    from fxpatch.piecewise.split import Piece

LONGEST = 200  # characters of a name
log = logging.getLogger("fxpatch")


def _question() -> Callable[[], bool]:
    enabled = getattr(torch.autograd, "_profiler_enabled", None)
    if callable(enabled) and enabled() in (True, False):
        return enabled  # type: ignore[no-any-return]
    log.warning("fxpatch: torch.autograd._profiler_enabled has moved: runners have no ranges in profiler traces")
    return bool  # False


profiled: Callable[[], bool] = _question()
"""Whether a profiler records in this thread."""


def range_of(name: str) -> record_function:
    """A context manager: a range called `fxpatch.<name>`."""
    return record_function(f"fxpatch.{name}")


def in_range(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, in a range of its own."""

    def inside(*args: Any) -> Any:
        with range_of(name):
            return call(*args)

    return inside


def name_of_piece(piece: Piece) -> str:
    """ "piece 3: graph", or the operators that run between graphs."""
    if piece.kind != "split":
        return f"piece {piece.index}: {piece.kind}"
    called = [node for node in piece.gm.graph.nodes if node.op not in ("placeholder", "output")]
    return f"piece {piece.index}: {', '.join(dict.fromkeys(map(_operator, called)))}"[:LONGEST]


def _operator(node: torch.fx.Node) -> str:
    ours = isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    return str(node.target).replace(".", "::", 1) if ours else name_of(node)


def in_ranges(steps: Sequence[Callable[[], object]], names: Sequence[str]) -> tuple[Callable[[], object], ...]:
    """Each step in a range of its own."""
    return tuple(in_range(name, step) for name, step in zip(names, steps, strict=True))
