"""Which graphs a device has. Its compile profile names classes, best first; the first that is there and can be built is
used. Existing is not enough: `torch.accelerator.Graph` is part of torch on every device, and most backends have not
registered theirs with it, which shows when one is made. Where nothing can be built, calls are recorded and run again,
and `reason` says why.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from compile_configs import DeviceProfile
from fxpatch.piecewise.graph_device import Captured, GraphDevice, Pool, frozen_gc
from fxpatch.piecewise.graph_recorder import Recorder
from fxpatch.piecewise.graph_streams import AcceleratorGraphs, ContextGraphs, StreamGraphs

__all__ = ["Captured", "GraphDevice", "Pool", "frozen_gc", "graph_device"]

_ACCELERATOR = "torch.accelerator.Graph"


def graph_device(device: str | torch.device, profile: DeviceProfile) -> GraphDevice:
    """What captures on `device`.

    Args:
        device: e.g. "musa" or "cuda:1"; it has been initialised if it needs to be.
        profile: the device's; of it `capture.classes` and `capture.budget` are read.
    """
    where = torch.device(device)
    assert profile.device == where.type, (profile.device, where)
    if not profile.capture.classes:
        return Recorder(where, f"the profile of {profile.device} names no graph class")
    refused: list[str] = []
    for name in profile.capture.classes:
        try:
            found = _resolve(name, where.type)
            found()
        except Exception as error:  # a vendor's constructor may raise anything; it is told in `reason`
            refused.append(f"{name}: {_first_line(error)}")
        else:
            return _adapter(name, found)(where, found, "; ".join([name, *refused]), profile.capture.budget)
    return Recorder(where, "; ".join(refused))


def _adapter(name: str, graph_class: Any) -> type[StreamGraphs]:
    if name == _ACCELERATOR:
        return AcceleratorGraphs
    return StreamGraphs if hasattr(graph_class, "capture_begin") else ContextGraphs


def _resolve(name: str, device: str) -> Any:
    """The class of that dotted name. Nothing is imported: a device that is there has imported its own."""
    if name == _ACCELERATOR:
        current = torch.accelerator.current_accelerator()
        if current is None or current.type != device:
            raise LookupError(f"torch's accelerator is {None if current is None else current.type}, not {device}")
    parts = name.split(".")
    found: Any = sys.modules.get(parts[0])
    for part in parts[1:]:
        found = getattr(found, part, None)
    if found is None:
        raise LookupError("not there")
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
