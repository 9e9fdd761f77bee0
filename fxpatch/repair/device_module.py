"""A device module without a usable `__name__`: Dynamo looks it up again as `torch.<last part of __name__>`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Refused


@dataclass(frozen=True)
class Named:
    """The module registered for the device, the name it gives itself, and whether torch has it under that name."""

    module: Any
    name: str | None
    found_again: bool
    writable: bool


def _probe(device: str) -> Named:
    module = getattr(torch, device, None)
    name = getattr(module, "__name__", None)
    again = isinstance(name, str) and getattr(torch, name.rsplit(".", 1)[-1], None) is module
    return Named(module, name, again, writable=hasattr(module, "__dict__"))


def _decide(named: Named) -> Needed | NotNeeded | Refused:
    if named.module is None:
        return NotNeeded("no device module is registered")
    if named.found_again:
        return NotNeeded("the device module names itself")
    if not named.writable:
        return Refused(f"the device module is a {type(named.module).__qualname__} whose __name__ cannot be set")
    return Needed(f"the device module's __name__ is {named.name!r}")


def _apply(device: str, named: Named, edits: Edits) -> str:
    edits.set_attr(named.module, "__name__", f"torch.{device}")
    return f"__name__ is torch.{device}"


PATCH = Patch[Named](
    name="device-module-name",
    why="`torch.get_device_module()` in compiled code reads `module.__name__` and imports torch.<that>: an object that "
    "stands in for a module has none (AttributeError)",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/variables/torch.py",
    until="Dynamo finds the module by device type",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(),
    probe=_probe,
    decide=_decide,
    apply=_apply,
)
