"""Native fallbacks of a model, removed before it is traced for good: what `fxpatch.native` needs from a device.

The model is traced with its native forwards first: that has to succeed whatever the optimized ones do. Then each
operator's optimized forward is tried, and those that hold are in the second trace instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpatch.native import Decisions, find_operators, native, promote
from fxpatch.piecewise.agreement import Agreement
from fxpatch.piecewise.lint import Rule, reason
from fxpatch.piecewise.options import Options
from fxpatch.piecewise.start import Start


def decided(
    options: Options,
    begun: Start,
    rules: Sequence[Rule],
    trace_once: Callable[[], object],
    agreement: Agreement,
    notes: list[str],
) -> Decisions | None:
    """What becomes of each native fallback; None where the model has none. The same on all ranks: trying runs the model
    and its collectives, and a rank may hold others in one form than in the other.

    Args:
        rules: what stays outside of graphs.
        trace_once: traces the model as it is.
        notes: for the report; what is decided for the whole model is added.

    Raises:
        TraceError: the model cannot be traced with its native forwards.
    """
    model, device = options.model, begun.device
    operators = find_operators(model, device.type) if isinstance(model, torch.nn.Module) else []
    names = [op.name for op in operators]
    if agreement.everywhere(not names):
        return None
    if not agreement.alone and not agreement.same(" ".join(names)):
        notes.append("native forwards are kept: the ranks' models have different ones")
        return None
    assert isinstance(model, torch.nn.Module)
    with native(operators):
        trace_once()

    def capture(call: Callable[[], Any]) -> Any:
        with device.side_stream():
            call()
            return device.capture(call)

    def splits(node: torch.fx.Node) -> object:
        return reason(node, rules)

    decisions = promote(
        model,
        begun.args,
        begun.kwargs,
        device.type,
        capture=capture if begun.graphs and device.captures else None,
        splitting=splits,
        slower=options.native == "any_speed",
    )
    if not agreement.alone:
        agreement.require()
        for name in names:
            here = name in decisions.promoted
            if not agreement.everywhere(here) and here:
                decisions.demote(name, "another rank keeps its native forward")
    return decisions
