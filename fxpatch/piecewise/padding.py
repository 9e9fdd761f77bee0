"""Whether rows of zeros behind the caller's change the caller's results.

A captured size serves every smaller n: zeros fill it up. That is right where rows do not look at one another, or only
back (tokens under a causal mask, a batch of independent samples), and silently wrong where they do: attention to all
tokens, a mean over the batch. Nothing in a graph says which it is, so it is tried, once, on the example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.statics import padded

# of the largest magnitude: another number of rows may be summed in another order
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def padding_changes(prepared: Prepared, leaves: Sequence[Any], n: int) -> str | None:
    """What padding changes, in words; None where it changes nothing.

    Args:
        prepared: the model.
        leaves, n: an example call; what the model writes to in it is written to.
    """
    size = n + 1
    inputs = {each.leaf: each for each in prepared.traced.arguments.inputs}
    copies = [_copy(value) for value in leaves]
    exact = prepared.results(copies, n)
    longer = [
        padded(inputs[leaf], value, n, size) if leaf in inputs else value
        for leaf, value in enumerate(map(_copy, leaves))
    ]
    found = prepared.results(longer, size)
    for number, (one, other) in enumerate(zip(exact, found, strict=True)):
        difference = _difference(prepared, number, one, other, n)
        if difference is not None:
            return difference
    return None


def _difference(prepared: Prepared, number: int, one: Any, other: Any, n: int) -> str | None:
    outputs = [each for each in prepared.traced.outputs if each.kind == "result" and each.at == number]
    if not isinstance(one, torch.Tensor) or not outputs:
        return None
    for dim, length in outputs[0].sizes.items():
        if length(n) > other.shape[dim]:
            return f"result {number} has fewer elements in dimension {dim} with a row more"
        other = other.narrow(dim, 0, length(n))
    if one.shape != other.shape:
        return f"result {number} is {list(one.shape)}, and with a row of zeros more {list(other.shape)}"
    if not (one.is_floating_point() or one.is_complex()):
        return None if torch.equal(one, other) else f"result {number} is another with a row of zeros more"
    far = (one - other).abs()
    scale = float(one.abs().max()) if one.numel() else 0.0
    if bool((far.nan_to_num(0.0) <= TOLERANCE.get(one.dtype, 1e-4) * max(scale, 1e-6)).all()) and torch.equal(
        one.isnan(), other.isnan()
    ):
        return None
    return f"result {number} changes by up to {float(far.max()):.3g}, of {scale:.3g}, with a row of zeros more"


def _copy(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, value)
