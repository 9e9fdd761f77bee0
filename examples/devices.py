"""`--device` of the examples: a simulated accelerator, a vendor's, or torch's own."""

from __future__ import annotations

import importlib

import torch

import fxpatch

VENDOR_PACKAGES = {"npu": "torch_npu", "musa": "torch_musa"}


def prepare_device(wanted: str, index: int = 0) -> torch.device:
    """The device, there to be used: `"simulated"`, `"cpu"`, or a device type, of which `index` says which one."""
    if wanted == "simulated":
        fxpatch.simulate("musa", strict=True)
        return torch.device("musa")
    if wanted in VENDOR_PACKAGES:
        importlib.import_module(VENDOR_PACKAGES[wanted])
    return torch.device(wanted, index) if wanted != "cpu" else torch.device("cpu")
