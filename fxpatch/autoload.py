"""torch's own `torch.backends` entry point: installs fxpatch in every process that imports torch and has a device.

torch fails to import if an entry point raises, and runs the entry points in no certain order. So this one never
raises, imports neither Dynamo nor Inductor, and acts only where PrivateUse1 has a name: at once if the vendor's came
first, else when Dynamo is imported, or when a vendor package that was being imported at that moment is done.
`FXPATCH_AUTOLOAD=0` turns it off.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger("fxpatch")


def autoload() -> None:
    """The entry point. Called by `import torch`; never raises."""
    try:
        if os.environ.get("FXPATCH_AUTOLOAD", "1") != "0":
            _install_or_wait()
    except Exception:
        log.exception("fxpatch could not install itself; torch works as it does without it")


def _install_or_wait() -> None:
    import torch

    if torch._C._get_privateuse1_backend_name() != "privateuseone":
        _install()
    else:
        _after("torch._dynamo")


def _install() -> None:
    import torch

    from fxpatch.errors import NoProfileError
    from fxpatch.installer import install
    from fxpatch.patching.arrival import under_way
    from fxpatch.probe import private_name, vendor_package

    device = private_name()
    if device is None:
        return
    if under_way(vendor_package(device)):
        _after(vendor_package(device))
        return
    if not hasattr(torch, device):
        log.info("fxpatch leaves %s alone: torch.%s is not there yet; call fxpatch.install() when it is", device, device)
        return
    try:
        install(device)
    except NoProfileError as error:
        log.info("fxpatch leaves %s alone: %s", device, error)


def _after(module: str) -> None:
    from fxpatch.patching.arrival import when_imported

    def arrived() -> None:
        try:
            _install()
        except Exception:
            log.exception("fxpatch could not install itself after the import of %s", module)

    when_imported(module, arrived)
