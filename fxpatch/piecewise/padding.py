"""Whether rows of zeros behind the caller's change the caller's results, or what the model leaves behind.

A captured size serves every smaller n: zeros fill it up. That is right where rows do not look at one another, or only
back (tokens under a causal mask, a batch of independent samples), and silently wrong where they do: attention to all
tokens, a mean over the batch. It is wrong, too, where a padded row is stored: an index of zero is a place in a cache.
Nothing in a graph says which it is, so it is tried, once, on the example, over caches that are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxpatch.piecewise.buckets import LEAST
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.statics import front, padded

# of the largest magnitude: another number of rows may be summed in another order
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def padding_changes(prepared: Prepared, leaves: Sequence[Any], n: int, written: Snapshot) -> str | None:
    """What padding changes, in words; None where it changes nothing.

    Args:
        prepared: the model.
        leaves, n: an example call; what it contains is left as it is.
        written: what the model has written to; it is put back.
    """
    for output in prepared.outputs:
        if output.open:
            return f"the size of result {output.at} depends on data"
    size = n if n > LEAST else n + 1
    state = [tensor for tensor in written.written() if not any(tensor is leaf for leaf in leaves)]
    try:
        exact = _run(prepared, leaves, size - 1, size - 1, state)
        written.restore()
        longer = _run(prepared, leaves, size - 1, size, state)
    except Exception as error:  # the model's own; a size that cannot be padded is not padded
        return f"it could not be tried: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    finally:
        written.restore()
    for (what, one), (_, other) in zip(exact, longer, strict=True):
        difference = _difference(what, one, other)
        if difference is not None:
            return difference
    return None


def _run(
    prepared: Prepared, leaves: Sequence[Any], n: int, size: int, state: Sequence[torch.Tensor]
) -> list[tuple[str, Any]]:
    """All that n elements, padded to `size`, come to: results, and what has been written."""
    given = list(leaves)
    inputs = prepared.arguments.inputs
    for each in inputs:
        value = front(leaves[each.leaf], each.dims, n)
        if each.leaf in prepared.written:
            value = _filled(value.clone()) if not each.dims else value.clone()
        given[each.leaf] = padded(each, value, n, size) if size > n else value
    for tensor in state:
        _filled(tensor)
    results = prepared.results(given, size)
    found: list[tuple[str, Any]] = []
    for each_output in prepared.outputs:
        if each_output.kind in ("result", "number"):
            found.append((f"result {each_output.at}", _the_caller_s(results[each_output.at], each_output.sizes, n)))
    for each in inputs:
        if each.leaf in prepared.written:
            found.append((f"what is written to {each.name}", front(given[each.leaf], each.dims, n)))
    found += [("what is written to a buffer", tensor.clone()) for tensor in state]
    return found


def _the_caller_s(value: Any, sizes: Any, n: int) -> Any:
    for dim, length in sizes.items():
        value = value.narrow(dim, 0, length(n))
    return value.clone() if isinstance(value, torch.Tensor) else value


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with numbers that a stored zero would show among; others are indices and stay."""
    if tensor.is_floating_point() or tensor.is_complex():
        numbers = torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device)
        tensor.copy_(numbers.view(tensor.shape))
    return tensor


def _difference(what: str, one: Any, other: Any) -> str | None:
    if isinstance(one, float) and isinstance(other, float):
        return _difference(what, torch.tensor(one), torch.tensor(other))
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return None if one == other else f"{what} is {other} with a row of zeros more, and {one} without"
    if one.shape != other.shape:
        return f"{what} is {list(one.shape)}, and with a row of zeros more {list(other.shape)}"
    if not (one.is_floating_point() or one.is_complex()):
        return None if torch.equal(one, other) else f"{what} is another with a row of zeros more"
    tolerance = TOLERANCE.get(one.dtype, 4e-2 if one.element_size() == 1 else 1e-4)
    if one.element_size() == 1:
        one, other = one.float(), other.float()
    far = (one - other).abs()
    scale = float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()) if one.numel() else 0.0
    same = (one == other) | (one.isnan() & other.isnan()) | (far <= tolerance * max(scale, 1e-6))
    if bool(same.all()):
        return None
    return f"{what} changes by up to {float(far[~same].max()):.3g}, of {scale:.3g}, with a row of zeros more"
