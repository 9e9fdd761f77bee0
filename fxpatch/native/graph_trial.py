"""The optimized forward in a throw-away graph. The problem: what Dynamo traces may still wait for the host, read a
value once and keep it, or allocate where a graph must not; most of that shows only when a graph is replayed on other
values. The rule: a replay has to compute what the native forward computes, from the values it was captured with and
from others, and what is timed is the replay. Graphs are released whatever happens.

`Capture` may run the call before it captures it, to warm it up: arguments and module are put back before each replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxpatch.native import timing
from fxpatch.native.copies import Fresh, vary
from fxpatch.native.forwards import marked
from fxpatch.native.outcome import observe
from fxpatch.native.state import State
from fxpatch.native.trial import Captured, Refused, Trial, first_line

REPLAY, CALL = "replay", "call"


def replays(trial: Trial, graph: torch.fx.GraphModule) -> str:
    """Captures the optimized forward, and compares its replays with native.

    Args:
        graph: what Dynamo made of it, for the nodes that stay outside graphs.

    Returns:
        Why nothing was captured; empty where it was.

    Raises:
        Refused: the capture failed, or a replay did or computed something else.
    """
    terms, call = trial.terms, trial.call
    if terms.capture is None:
        return "this device captures no graphs"
    for node in graph.graph.nodes:
        if node.op.startswith("call_") and terms.splitting is not None and terms.splitting(node):
            return f"{node.name} stays outside graphs"
    with _captured(trial, trial.op.optimized) as (captured, static):
        for values in (_same, vary):
            expected = trial.native(values(call.saved.fresh()))
            call.saved.refill(static)
            values(static)
            try:
                seen = observe(trial.op.module, static, lambda: _replayed(captured))
                terms.synchronize()
            except Exception as error:
                raise Refused(f"its graph does not replay: {first_line(error)}") from error
            trial.check(expected, seen, "a replayed graph of it differs from native")
    return ""


def speed(trial: Trial, *, replay: bool, writes: bool) -> tuple[float, str]:
    """Time of the native forward over that of the optimized one, and what was timed: `"replay"`, or `"call"` where
    either forward has no graph.

    Args:
        replay: the optimized forward can be captured.
        writes: arguments are overwritten, and have to be put back before each call.
    """
    before = State(trial.op.module)
    try:
        if replay:
            with contextlib.suppress(Refused):  # the native forward need not be fit for capture: then calls are timed
                return _speed_of_replays(trial, writes), REPLAY
        return _speed_of_calls(trial, writes), CALL
    finally:
        before.restore()


def _speed_of_replays(trial: Trial, writes: bool) -> float:
    op, saved, wait = trial.op, trial.call.saved, trial.terms.synchronize
    with _captured(trial, op.native) as (native, its), _captured(trial, op.optimized) as (optimized, others):

        def put_back() -> None:
            saved.refill(its)
            saved.refill(others)

        put_back()
        return timing.ratio(native.replay, optimized.replay, wait, put_back if writes else None)


def _speed_of_calls(trial: Trial, writes: bool) -> float:
    saved, compiled = trial.call.saved, trial.terms.compiled or _same
    copies = [saved.fresh(), saved.fresh()]

    def bound(forward: Callable[..., Any], fresh: Fresh) -> Callable[[], Any]:
        function, (args, kwargs) = compiled(marked(forward, f"<fxpatch timing {trial.op.name}>")), fresh.tree
        return lambda: function(*args, **kwargs)

    def put_back() -> None:
        for fresh in copies:
            saved.refill(fresh)

    a, b = bound(trial.op.native, copies[0]), bound(trial.op.optimized, copies[1])
    a(), b()
    put_back()
    return timing.ratio(a, b, trial.terms.synchronize, put_back if writes else None)


@contextlib.contextmanager
def _captured(trial: Trial, forward: Callable[..., Any]) -> Iterator[tuple[Captured, Fresh]]:
    """A graph of one forward over a copy of the arguments; released at the end, the module as before."""
    assert trial.terms.capture is not None
    static = trial.call.saved.fresh()
    args, kwargs = static.tree
    before = State(trial.op.module)
    captured = None
    try:
        try:
            captured = trial.terms.capture(lambda: forward(*args, **kwargs))
        except Exception as error:
            raise Refused(f"cannot be captured: {first_line(error)}") from error
        before.restore()
        yield captured, static
    finally:
        if captured is not None:
            trial.terms.synchronize()
            captured.release()
        before.restore()


def _replayed(captured: Captured) -> Any:
    captured.replay()
    return captured.result


def _same(value: Any) -> Any:
    return value
