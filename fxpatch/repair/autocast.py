"""Autocast on a device that registered no autocast kernels: let operators through instead of failing.

Inside `torch.autocast(device)` every operator is dispatched to AutocastPrivateUse1. Where the vendor registered
nothing there, the first one fails. A fallthrough makes the region run, in the dtypes it is given: nothing is cast,
and the report says so, because a user who expects bfloat16 must know. A vendor's own C++ fallback would collide with
ours (the dispatcher takes one per key), so this waits until the device module is registered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Target
from fxpatch.privateuse1 import is_private

_KEY = "AutocastPrivateUse1"


@dataclass(frozen=True)
class Autocast:
    """Whether the device lives on PrivateUse1 and has its module, and whether its autocast key has a fallback."""

    private: bool
    module: bool
    fallback: bool


def _probe(device: str) -> Autocast:
    return Autocast(
        private=is_private(device),
        module=hasattr(torch, device),
        fallback=torch._C._dispatch_has_backend_fallback(_KEY),
    )


def _decide(autocast: Autocast) -> Needed | NotNeeded:
    if not autocast.private:
        return NotNeeded("torch has autocast kernels for this device")
    if autocast.fallback:
        return NotNeeded("the device has registered autocast")
    if not autocast.module:
        return NotNeeded("the vendor has not registered its module yet, and may still register autocast")
    return Needed("the device has registered no autocast fallback")


def _apply(_device: str, _autocast: Autocast, edits: Edits) -> str:
    library = torch.library.Library("_", "IMPL")
    edits.on_undo(library._destroy)
    library.fallback(torch.library.fallthrough_kernel, _KEY)
    return "autocast regions run, and cast nothing: results keep the dtypes of their inputs"


PATCH = Patch[Autocast](
    name="autocast-fallthrough",
    why="operators inside torch.autocast fail: 'Could not run aten::t with arguments from the Autocast backend'",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/autocast_mode.cpp",
    until="the vendor registers autocast",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(
        Target("torch._C", "_dispatch_has_backend_fallback"),
        Target("torch.library", "Library._destroy", "self"),
    ),
    probe=_probe,
    decide=_decide,
    apply=_apply,
)
