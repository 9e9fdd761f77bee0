"""Whether a graph in which equal layers were traced once does what the model does: the second line behind `alike`.

One call of each, of the example, bit by bit: the same kernels run in the same order. A difference says nothing certain
(a kernel may sum in any order, a layer may draw random numbers); then every layer is traced, which is right whatever it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxpatch.piecewise.bits import same_bits
from fxpatch.piecewise.outputs import flat
from fxpatch.piecewise.snapshot import Snapshot


def as_eager(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    returned: Sequence[Any],
    written: Snapshot,
) -> bool:
    """Whether the model returns and writes the same as its graph has.

    Args:
        args, kwargs: the example.
        returned: the leaves of what the graph has returned for it.
        written: taken of all that the model might write to, before the graph ran.
    """
    by_graph = [(tensor, tensor.clone()) for tensor in written.written()]
    before = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in returned]
    written.restore()
    with torch.no_grad():
        found, _ = flat(model(*args, **kwargs))
    known = {id(tensor) for tensor, _ in by_graph}
    return (
        len(found) == len(before)
        and all(_same(one, other) for one, other in zip(before, found, strict=True))
        and all(id(tensor) in known for tensor in written.written())
        and all(_same(tensor, copy) for tensor, copy in by_graph)
    )


def _same(one: Any, other: Any) -> bool:
    """The same bits; numbers and sizes, for which the graph returned marks of its own, by their type."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other)
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return same_bits(one, other) is True  # no plain memory: every layer is traced
