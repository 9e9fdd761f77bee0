"""Repairs of what breaks on a device torch does not know: a small `Patch` record each."""

from typing import Any

from compile_configs import DeviceProfile
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


def patches(profile: DeviceProfile | None = None) -> tuple[Patch[Any], ...]:
    """The records for a profile, in order of application; without one, as they are told of in the documentation."""
    return (
        *device_class.PATCHES,
        *device_in_dynamo.PATCHES,
        device_module.PATCH,
        module_to.PATCH,
        autocast.PATCH,
        rng.PATCH,
        flex_attention.PATCH,
        inductor.PATCH,
        cache_key.patch(profile.packages if profile else ()),
        repro_scripts.patch(profile),
        late.PATCH,
    )


__all__ = ["patches"]
