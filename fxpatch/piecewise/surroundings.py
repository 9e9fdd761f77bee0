"""What decides over a call's results besides its arguments: autocast, and memory that inputs share.

Casts are part of what has been traced, and inputs are traced as if each had memory of its own. Captured and compiled
pieces are therefore right for calls in the same surroundings only; the model itself is right in others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from fxpatch.piecewise.arguments import Input


def autocast_of(device: str) -> torch.dtype | None:
    """The dtype to which operators on this device type are cast now; None outside of autocast."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def shares_what_is_written(inputs: Sequence[Input], written: Collection[int], leaves: Sequence[Any]) -> bool:
    """Whether two inputs of a call are in one storage, and the model writes to one of them.

    Args:
        inputs: of the form of a call.
        written: the leaves that the model writes to.
        leaves: of the call.
    """
    if not written:
        return False
    storages = [leaves[each.leaf].untyped_storage().data_ptr() for each in inputs]
    return any(
        storages.count(storage) > 1
        for each, storage in zip(inputs, storages, strict=True)
        if each.leaf in written and leaves[each.leaf].numel()
    )
