"""FlexAttention refuses every device that is not on its list, before it has looked at what the device can do."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Target

_MODULE = "torch.nn.attention.flex_attention"


def _probe(device: str) -> bool:
    """Whether FlexAttention accepts the device."""
    accepts: Any = sys.modules[_MODULE]._validate_device
    tensor = _OnDevice(device)
    try:
        accepts(tensor, tensor, tensor)  # all three on one device: vendors' own checks ask for that as well
    except ValueError:
        return False
    return True


class _OnDevice:
    """What the check reads of a tensor."""

    def __init__(self, device: str) -> None:
        self.device = torch._C.device(device)
        self.requires_grad = False
        self.shape = torch.Size([0])


def _decide(accepted: bool) -> Needed | NotNeeded:
    return NotNeeded("FlexAttention accepts the device") if accepted else Needed("FlexAttention refuses the device")


def _apply(device: str, _accepted: bool, edits: Edits) -> str:
    module = sys.modules[_MODULE]
    original = module._validate_device

    def _validate_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if not (edits.active and query.device.type == device):
            original(query, key, value)

    edits.set_attr(module, "_validate_device", _validate_device)
    return "FlexAttention is not refused; how fast it is depends on the device's own lowering"


PATCH = Patch[bool](
    name="flex-attention-device",
    why="'FlexAttention is only supported on CUDA, CPU, HPU, or MPS devices'",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/flex_attention.py",
    until="FlexAttention asks the backend instead of a list",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(Target(_MODULE, "_validate_device", "query, key, value"),),
    probe=_probe,
    decide=_decide,
    apply=_apply,
    waits_for=(_MODULE,),
)
