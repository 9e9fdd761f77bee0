"""`--device` of the examples: a simulated accelerator, a vendor's, or torch's own."""

from __future__ import annotations

import importlib

import torch

import fxpatch

VENDOR_PACKAGES = {"npu": "torch_npu", "musa": "torch_musa"}


def prepare_device(wanted: str) -> torch.device:
    """The device, there to be used: `"simulated"`, `"cpu"`, or a device type."""
    if wanted == "simulated":
        fxpatch.simulate("musa", strict=True)
        return torch.device("musa")
    if wanted in VENDOR_PACKAGES:
        importlib.import_module(VENDOR_PACKAGES[wanted])
    return torch.device(wanted, 0) if wanted != "cpu" else torch.device("cpu")
