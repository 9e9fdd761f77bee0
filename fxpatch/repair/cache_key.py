"""Compile caches that do not see the device: the same key for another device model, driver or vendor package; nor the
fake kernels: the same key for a graph traced with a wrong one and with a right one; nor fxpatch itself.

torch asks CUDA for the device's name; on any other machine the system part of the key is the hash of an empty dict.
The tag that torch offers for this (`torch.compiler.config.cache_key_tag`) is public, and shared: we add one part to it,
parted by `|`, and keep the others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

import fxpatch
from fake_kernels.registry import fingerprint
from fxpatch.drivers import driver_versions, model, vendor_packages
from fxpatch.patching import Edits, Needed, NotNeeded, Patch
from fxpatch.privateuse1 import is_private
from fxpatch.versions import imported_versions


@dataclass(frozen=True)
class System:
    """What the artifacts of this process depend on, as one part of the tag; and whether the key holds it already."""

    seen_by_torch: bool
    part: str
    tagged: bool


def _probe(device: str, packages: tuple[str, ...] = ()) -> System:
    private = is_private(device)
    found = imported_versions(dict.fromkeys((*vendor_packages(device), *packages)))
    versions = [f"{name}={each}" for name, each in found.items()]
    fakes = fingerprint()
    told = (_hardware(device), *driver_versions(device), *versions, f"fxpatch={fxpatch.__version__}")
    part = "/".join(("fxpatch", device, *told, *([f"fakes={fakes}"] if fakes else [])))
    return System(seen_by_torch=not private, part=part, tagged=part in _tag().split("|"))


def _tag() -> str:
    return str(torch.compiler.config.cache_key_tag)


def _hardware(device: str) -> str:
    """The device's model as far as its module tells. Asks only a device that is in use already: reading properties
    initializes it, and a process that has initialized a device cannot fork workers that want one. Settling asks again.
    """
    told = model(device)
    if told is None:
        return "model unknown"
    return f"model {told}" if told.startswith("unknown") else hashlib.sha256(told.encode()).hexdigest()[:16]


def _decide(system: System) -> Needed | NotNeeded:
    if system.seen_by_torch:
        return NotNeeded("torch puts this device's model and driver into its own key")
    if system.tagged:
        return NotNeeded("the cache key holds this device")
    return Needed("torch's cache key holds nothing of this device", version=system.part)


def _apply(_device: str, system: System, edits: Edits) -> str:
    config: Any = torch.compiler.config
    config.cache_key_tag = "|".join(filter(None, (_tag(), system.part)))

    def remove() -> None:  # others may have added theirs since: take out what is ours, and nothing else
        config.cache_key_tag = "|".join(part for part in _tag().split("|") if part != system.part)

    edits.on_undo(remove)
    return f"torch.compiler.config.cache_key_tag is {_tag()!r}"


def patch(packages: tuple[str, ...] = ()) -> Patch[System]:
    """The record; the versions of `packages`, a profile's, become part of the key too."""
    return Patch[System](
        name="cache-key-tag",
        why="compiled artifacts are shared between device models, drivers and vendors: a stale kernel runs silently",
        upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/codecache.py",
        until="torch 2.15: DeviceInterface.get_cache_system_info, where the vendor implements it",
        seen_in=("2.11.0", "2.13.0", "2.15.0"),
        targets=(),
        probe=lambda device: _probe(device, packages),
        decide=_decide,
        apply=_apply,
        waits_for=("torch._inductor.codecache",),
        per_context=True,
    )
