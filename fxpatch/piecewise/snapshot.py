"""Which tensors a model writes to that are not its own, and how to have them back.

Preparing runs the model several times. A cache that it fills, a counter in a buffer must not notice: what is written is
found by its version counter, and put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Snapshot:
    """Copies of tensors, taken before a model runs.

    Args:
        tensors: those that it might write to. A copy of each is held until `forget_unwritten`.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._before = [(tensor, tensor._version, tensor.detach().clone()) for tensor in _unique(tensors)]

    def written(self) -> list[torch.Tensor]:
        """The tensors that have been written to since."""
        return [tensor for tensor, version, _ in self._before if tensor._version != version]

    def forget_unwritten(self) -> None:
        """Lets the copies go of what has not been written to."""
        self._before = [each for each in self._before if each[0]._version != each[1]]

    def restore(self) -> None:
        """Puts back what has been written to."""
        with torch.no_grad():
            for tensor, version, copy in self._before:
                if tensor._version != version:
                    tensor.copy_(copy)


def _unique(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
