"""torch's own `torch.backends` entry point: installs fxpatch in every process that has a device and comes to compile.

torch fails to import if an entry point raises, and runs the entry points in no certain order. So this one never
raises, imports neither Dynamo nor Inductor, and does nothing but wait: until Dynamo is imported, and then, where a
vendor's package is still to come or is being imported at that moment, until that is done. Then it acts if PrivateUse1
has a name. (Installing at once where a name is there already would cost 25 ms of every `import torch`, and help only
those who use FX without Dynamo: they call `fxpatch.install()`.) `FXPATCH_AUTOLOAD=0` turns it off.
"""

from __future__ import annotations

import functools
import logging
import os

log = logging.getLogger("fxpatch")


def autoload() -> None:
    """The entry point. Called by `import torch`; never raises."""
    if turned_off():
        return
    try:
        from fxpatch.arrival import when_imported

        when_imported("torch._dynamo", install_unasked)
    except Exception:
        log.exception(FAILED)


def turned_off() -> bool:
    """Whether nothing is to be installed that nobody has asked for."""
    return os.environ.get("FXPATCH_AUTOLOAD", "1") == "0"


def install_unasked(refusals: int = logging.INFO) -> None:
    """Installs for the PrivateUse1 device of this process, now, or as soon as its vendor's package has been imported;
    does nothing where there is none, or where something is installed. Never raises.

    Args:
        refusals: the level on which it is logged that a device is left alone, and why.
    """
    try:
        _install_or_wait(refusals)
    except Exception:
        log.exception(FAILED)


FAILED = "fxpatch could not install itself; torch works as it does without it"


def _install_or_wait(refusals: int) -> None:
    import torch

    from fxpatch.arrival import under_way, when_imported
    from fxpatch.errors import NoProfileError
    from fxpatch.privateuse1 import private_name
    from fxpatch.probe import vendor_package

    device = private_name()
    if device is None:
        for package in _vendors_to_come():
            _wait_for(package, refusals)
        return
    if under_way(vendor_package(device)):
        when_imported(vendor_package(device), lambda: install_unasked(refusals))
        return
    if not hasattr(torch, device):
        log.log(
            refusals,
            "fxpatch leaves %s alone: torch.%s is not there yet; call fxpatch.install() when it is",
            *(device, device),
        )
        return

    from fxpatch.installer import current, install_automatically

    if current() is not None:
        return
    try:
        install_automatically(device)
    except NoProfileError as error:
        log.log(refusals, "fxpatch leaves %s alone: %s", device, error)


@functools.cache  # however often an engine asks
def _wait_for(package: str, refusals: int) -> None:
    from fxpatch.arrival import when_imported

    when_imported(package, lambda: install_unasked(refusals))


def _vendors_to_come() -> list[str]:
    """The packages that may yet name PrivateUse1, as far as there are profiles for their devices."""
    from compile_configs import builtin_names
    from fxpatch.arrival import imported
    from fxpatch.probe import known_devices, vendor_package

    packages = [vendor_package(device) for device in builtin_names() if device not in known_devices()]
    return [package for package in packages if not imported(package)]
