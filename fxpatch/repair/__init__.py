"""Repairs of what breaks on a device torch does not know: a small `Patch` record each, in order of application."""

from typing import Any

from fxpatch.patching import Patch
from fxpatch.repair import (
    autocast,
    cache_key,
    device_class,
    device_in_dynamo,
    device_module,
    flex_attention,
    inductor,
    late,
    module_to,
    repro_scripts,
    rng,
)

PATCHES: tuple[Patch[Any], ...] = (
    *device_class.PATCHES,
    *device_in_dynamo.PATCHES,
    device_module.PATCH,
    module_to.PATCH,
    autocast.PATCH,
    rng.PATCH,
    flex_attention.PATCH,
    inductor.PATCH,
    cache_key.PATCH,
    repro_scripts.PATCH,
    late.PATCH,
)

__all__ = ["PATCHES"]
