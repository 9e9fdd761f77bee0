"""Native fallbacks of a model, removed before it is traced for good: what `fxpatch.native` needs from a device.

The model is traced with its native forwards first: that has to succeed whatever the optimized ones do. Then each
operator's optimized forward is tried, and those that hold are in the second trace instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxpatch.native import Decisions, find_operators, native, promote
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.lint import Rule


def promoted(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: GraphDevice,
    graphs: bool,
    rules: Sequence[Rule],
    trace_once: Callable[[], object],
    *,
    slower: bool,
) -> Decisions | None:
    """What was decided for each operator; None where the model has none.

    Args:
        model: on the device.
        args, kwargs: an example call.
        device, graphs: whether sizes will be captured, and by what.
        rules: what stays outside of graphs.
        trace_once: traces the model as it is.
        slower: whether an operator that holds is promoted whatever its speed.

    Raises:
        TraceError: the model cannot be traced with its native forwards.
    """
    if not isinstance(model, torch.nn.Module):
        return None
    operators = find_operators(model, device.type)
    if not operators:
        return None
    with native(operators):
        trace_once()

    def capture(call: Callable[[], Any]) -> Any:
        with device.side_stream():
            call()
            return device.capture(call)

    def splits(node: torch.fx.Node) -> object:
        return next(filter(None, (rule(node) for rule in rules)), None)

    captures = graphs and device.captures
    return promote(
        model, args, kwargs, device.type, capture=capture if captures else None, splitting=splits, slower=slower
    )
