"""Which tensors a model writes to that are not its own, and how to have them back.

Preparing runs the model several times. A cache that it fills, a counter in a buffer must not notice: what is written is
found by its version counter or, where a kernel does not count, by its bits, and put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxpatch.piecewise.bits import same_bits


class Snapshot:
    """Copies of tensors, taken before a model runs.

    Args:
        tensors: those that it might write to. A copy of each is held until `forget_unwritten`.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._before: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        self._written: set[int] = set()
        self.add(tensors)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copies more tensors; those that are known already stay as they were. No parameters: a model that computes
        without gradients reads them, and they may take half of the device's memory."""
        known = {id(tensor) for tensor, _, _ in self._before}
        tensors = [each for each in tensors if not isinstance(each, torch.nn.Parameter)]
        self._before += [
            (tensor, _version(tensor), tensor.detach().clone())
            for tensor in _unique(tensors)
            if id(tensor) not in known
        ]

    def written(self) -> list[torch.Tensor]:
        """The tensors that have been written to since."""
        for tensor, version, copy in self._before:
            # some kernels write without counting: batch_norm its statistics, and those whose schema does not say so
            if _version(tensor) != version or same_bits(tensor, copy) is False:
                self._written.add(id(tensor))
        return [tensor for tensor, _, _ in self._before if id(tensor) in self._written]

    def forget_unwritten(self) -> None:
        """Lets the copies go of what has not been written to."""
        self.written()
        self._before = [each for each in self._before if id(each[0]) in self._written]

    def restore(self) -> None:
        """Puts back what has been written to."""
        with torch.no_grad():
            for tensor, version, copy in self._before:
                if _version(tensor) != version or id(tensor) in self._written:
                    tensor.copy_(copy)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor has been written to. One that was made in inference mode does not count, and nobody may write
    to it outside of that, where a model is prepared."""
    return 0 if tensor.is_inference() else tensor._version


def _unique(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
