"""PrivateUse1: the device type that PyTorch leaves to accelerators it does not know, and its name in this process.

A vendor gives it one, once per process (`torch.utils.rename_privateuse1_backend`).
"""

from __future__ import annotations

import torch

UNNAMED = "privateuseone"


def private_type() -> str:
    """The device type: `"musa"`, `"npu"`; `"privateuseone"` as long as nobody has given it a name."""
    name: str = torch._C._get_privateuse1_backend_name()
    return name


def private_name() -> str | None:
    """The name it has been given; None as long as it has none."""
    name = private_type()
    return None if name == UNNAMED else name


def is_private(device: str) -> bool:
    """Whether a device type is PrivateUse1 in this process."""
    return device == private_type()
