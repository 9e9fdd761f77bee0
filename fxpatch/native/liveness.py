"""Whether anybody reads an argument after the operator that got it. The problem: fused kernels overwrite their inputs
(a norm that adds the residual first), the native forward does not, and engines rely on nobody looking; where somebody
does look, the answer is silently wrong. The rule: it is tried. The model runs natively, the arguments in question are
filled with NaN as soon as the operator has returned, and what the model returns, what it leaves in its buffers and in
the caller's inputs has to be the same bit by bit.

NaN reaches everything that is computed from it, except through a mask (`torch.where`) that happens to discard all of
it. Integers are never taken for unread: a poisoned index takes a device with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.native.copies import Saved, same_memory
from fxpatch.native.forwards import replaced
from fxpatch.native.operators import NativeOperator
from fxpatch.native.outcome import Outcome, differences, observe


def unread(
    model: nn.Module, op: NativeOperator, leaves: frozenset[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the arguments `leaves` (numbers among the leaves of `(args, kwargs)` of each call of `op`) are read by
    nobody once `op` has returned. To be called with every operator native.

    Args:
        args, kwargs: of the model.
    """
    impossible: list[str] = []
    held = [*model.parameters(), *model.buffers()]
    native = op.native

    def poisoning(*args: Any, **kwargs: Any) -> Any:
        result = native(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = pytree.tree_leaves((args, kwargs))
        for number in leaves:
            tensor = given[number] if number < len(given) else None
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                impossible.append("not floating")
            elif any(same_memory(tensor, other) for other in (*results, *held)):
                impossible.append("shared")
            else:
                tensor.fill_(float("nan"))
        return result

    before = _outcome(model, args, kwargs)
    with replaced([(op, poisoning)]):
        after = _outcome(model, args, kwargs)
    names = [str(n) for n in range(len(before.arguments))]
    return not impossible and differences(before, after, names, {})[1] is None


def _outcome(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outcome:
    fresh = Saved((args, dict(kwargs))).fresh()
    taken, given = fresh.tree
    torch.manual_seed(0)
    return observe(model, fresh, lambda: model(*taken, **given))
