"""`module.to(device)` that keeps its parameters.

torch moves a parameter in place (`param.data = moved`) only where both tensors are of a kind that its list calls
compatible: `TensorImpl::has_compatible_shallow_copy_type`, CPU, CUDA, XPU and others, not PrivateUse1. Everywhere else
`Module.to` makes new parameters, silently: tied weights come apart, an optimizer made before keeps training the old
ones, and lazy modules lose what makes them lazy. torch's answer for out-of-tree devices is an operator that they
override; this does it where the vendor has not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Target
from fxpatch.privateuse1 import is_private, private_type

_OPERATOR = "aten::_has_compatible_shallow_copy_type"


@dataclass(frozen=True)
class Moving:
    """Whether the device lives on PrivateUse1 and has its module, and whether it says what can be exchanged."""

    private: bool
    module: bool
    registered: bool


def register() -> torch.library.Library:
    """Dense tensors of the CPU and of the device may take each other's place, as long as the library lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(_OPERATOR.removeprefix("aten::"), _compatible, "PrivateUse1")
    return library


def _compatible(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    known = ("cpu", private_type())
    return all(x.layout is torch.strided and x.device.type in known for x in (tensor, other))


def _probe(device: str) -> Moving:
    return Moving(
        private=is_private(device),
        module=hasattr(torch, device),
        registered=torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "PrivateUse1"),
    )


def _decide(moving: Moving) -> Needed | NotNeeded:
    if not moving.private:
        return NotNeeded("torch moves parameters of this device in place")
    if moving.registered:
        return NotNeeded("the device says that its tensors can take the place of the CPU's")
    if not moving.module:
        return NotNeeded("the vendor has not registered its module yet, and may still register the operator")
    return Needed("Module.to makes new parameters on this device, and says nothing")


def _apply(_device: str, _moving: Moving, edits: Edits) -> str:
    edits.on_undo(register()._destroy)
    return "Module.to moves parameters in place: tied weights stay tied, optimizers keep theirs"


PATCH = Patch[Moving](
    name="module-to-in-place",
    why="Module.to(device) unties shared parameters and detaches optimizers made before, silently",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/TensorImpl.h",
    until="the vendor registers aten::_has_compatible_shallow_copy_type",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(
        Target("torch._C", "_dispatch_has_kernel_for_dispatch_key"),
        Target("torch.library", "Library._destroy", "self"),
    ),
    probe=_probe,
    decide=_decide,
    apply=_apply,
)
