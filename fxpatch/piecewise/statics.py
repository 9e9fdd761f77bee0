"""Static input buffers: graphs read fixed addresses, so each call copies the caller's tensors there.

One buffer per input, as large as the largest size; a smaller size uses the front of it, so that all sizes share memory.
Where the front of a buffer is not contiguous (the dynamic dimension is not the first), a size has a buffer of its own.
What lies behind the caller's elements is zero: a padded row must not hold indices or infinities of an earlier call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpatch.piecewise.arguments import Input


class Statics:
    """The buffers of a runner's copied inputs.

    Args:
        inputs: those that are copied.
        largest: no size is larger.
    """

    def __init__(self, inputs: Sequence[Input], largest: int) -> None:
        self.inputs = tuple(inputs)
        self._largest = {each.leaf: _zeros(each, largest) for each in inputs if each.dims in ((), (0,))}
        self._own: dict[tuple[int, int], torch.Tensor] = {}

    def at(self, each: Input, size: int) -> torch.Tensor:
        """The buffer of one input at one size."""
        if each.leaf in self._largest:
            buffer = self._largest[each.leaf]
            return buffer.narrow(0, 0, size) if each.dims else buffer
        key = (each.leaf, size)
        if key not in self._own:
            self._own[key] = _zeros(each, size)
        return self._own[key]

    def filler(self, size: int) -> Callable[[Sequence[Any], int], None]:
        """A function of a call's leaves and its n: copies them into the buffers of this size, and zeroes the rest."""
        jobs = [(each.leaf, each.dims, self.at(each, size)) for each in self.inputs]

        def fill(leaves: Sequence[Any], n: int) -> None:
            for leaf, dims, buffer in jobs:
                if not dims or n == size:
                    buffer.copy_(leaves[leaf])
                    continue
                front = buffer
                for dim in dims:
                    front = front.narrow(dim, 0, n)
                if len(dims) == 1:
                    buffer.narrow(dims[0], n, size - n).zero_()
                else:
                    buffer.zero_()
                front.copy_(leaves[leaf])

        return fill


def front(value: Any, dims: Sequence[int], n: int) -> Any:
    """The first n elements of a tensor in each of its dynamic dimensions."""
    for dim in dims:
        value = value.narrow(dim, 0, n)
    return value


def padded(each: Input, value: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """A copy of one input with zeros behind its elements, up to `size`."""
    if not each.dims:
        return value
    buffer = _zeros(each, size)
    front = buffer
    for dim in each.dims:
        front = front.narrow(dim, 0, n)
    front.copy_(value)
    return buffer


def _zeros(each: Input, size: int) -> torch.Tensor:
    shape = [size if side == -1 else side for side in each.shape]
    return torch.zeros(shape, dtype=each.dtype, device=each.device)
