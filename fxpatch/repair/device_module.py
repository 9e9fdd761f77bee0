"""A device module that is no module, or does not know its name: Dynamo looks it up as `torch.<end of __name__>`.

Vendors sometimes register an object (a class instance that loads lazily, a namespace). Eager code cannot tell; Dynamo
reads `__name__` of it, and guards on it as a module. So a real module takes its place, which passes everything on to
the object, reads and writes alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fxpatch.patching import Edits, Needed, NotNeeded, Patch


class Forwarding(ModuleType):
    """A module whose attributes are those of `target`. Its own name and spec are what a module's are."""

    def __init__(self, name: str, target: Any) -> None:
        super().__init__(name, getattr(target, "__doc__", None))
        self.__dict__["__fxpatch_target__"] = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["__fxpatch_target__"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["__fxpatch_target__"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["__fxpatch_target__"], name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.__dict__["__fxpatch_target__"])})


@dataclass(frozen=True)
class Registered:
    """What torch has under the device's name, and whether it is found again by the name it gives itself."""

    module: Any
    is_module: bool
    found_again: bool


def _probe(device: str) -> Registered:
    module = getattr(torch, device, None)
    name = getattr(module, "__name__", None)
    again = isinstance(name, str) and getattr(torch, name.rsplit(".", 1)[-1], None) is module
    return Registered(module, isinstance(module, ModuleType), again)


def _decide(registered: Registered) -> Needed | NotNeeded:
    if registered.module is None:
        return NotNeeded("no device module is registered")
    if not registered.is_module:
        return Needed(f"the device module is a {type(registered.module).__qualname__}, not a module")
    if not registered.found_again:
        return Needed(f"the device module calls itself {registered.module.__name__!r}")
    return NotNeeded("the device module is a module and knows its name")


def _apply(device: str, registered: Registered, edits: Edits) -> str:
    name = f"torch.{device}"
    if registered.is_module:
        edits.set_attr(registered.module, "__name__", name)
        return f"it calls itself {name}"
    edits.set_attr(torch, device, Forwarding(name, registered.module))
    return f"{name} is a module that passes everything on to it"


PATCH = Patch[Registered](
    name="device-module",
    why="`torch.get_device_module()` in compiled code fails on a device module that is no real module ('has no "
    "attribute __name__', 'MODULE_MATCH is used')",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/variables/torch.py",
    until="torch._register_device_module refuses what is not a module",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(),
    probe=_probe,
    decide=_decide,
    apply=_apply,
)
