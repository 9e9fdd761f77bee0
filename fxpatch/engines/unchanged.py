"""Whether a module is still what graphs were made of.

A runner binds parameters and modules once, and has no guards on a call's way. Its own user knows when weights are
replaced; but a module that somebody else calls may get an adapter (`load_lora_weights`), another dtype or `train()`
from somebody who has never heard of the runner. Weights that are written in place are seen by graphs, and no change.
"""

from __future__ import annotations

from itertools import chain

import torch


class Snapshot:
    """A module and all in it, as they are now: 0.1 to 0.2 us for each module and tensor to compare with.

    Args:
        module: to be looked at again.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._modules = list(module.modules())
        self._tables = [table for each in self._modules for table in (each._modules, each._parameters, each._buffers)]
        self._held = list(chain.from_iterable(table.values() for table in self._tables))  # so that no id is another's
        self._tensors = [value for value in self._held if isinstance(value, torch.Tensor)]
        self._modes, self._ids, self._places = self._now_modes(), self._now_ids(), self._now_places()

    def change(self) -> str:
        """What has changed since; `""` where nothing has."""
        if self._now_modes() != self._modes:
            return "train() or eval()"
        if self._now_ids() != self._ids:
            return "another module or parameter"
        if self._now_places() != self._places:
            return "weights elsewhere"
        return ""

    def _now_modes(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _now_ids(self) -> list[int]:
        return list(map(id, chain.from_iterable([table.values() for table in self._tables])))

    def _now_places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]
