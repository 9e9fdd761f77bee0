"""Stands in for a vendor's package: importing it replaces torch.device."""

from fxpatch.simulator.shim import load_shim

load_shim("musa")
