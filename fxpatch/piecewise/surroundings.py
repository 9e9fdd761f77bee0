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


def shares_what_is_written(
    inputs: Sequence[Input], written: Collection[int], leaves: Sequence[Any]
) -> tuple[Input, Input] | None:
    """Two inputs in one storage, of which the model writes to one and copies are made of one: what is written to the
    one would not be read in the other. Inputs that are all used where they are may share memory.

    Args:
        inputs: of the form of a call.
        written: the leaves that the model writes to; used in place where they have no dynamic dimension.
        leaves: of the call.
    """
    if not written:
        return None
    neighbours: dict[int, list[Input]] = {}
    for each in inputs:
        if leaves[each.leaf].numel():
            neighbours.setdefault(leaves[each.leaf].untyped_storage().data_ptr(), []).append(each)
    for one, *others in neighbours.values():
        together = [one, *others]
        in_place = all(each.leaf in written and not each.dims for each in together)
        if others and not in_place and any(each.leaf in written for each in together):
            together.sort(key=lambda each: each.leaf not in written)
            return together[0], together[1]
    return None
