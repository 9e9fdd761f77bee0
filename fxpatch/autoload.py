"""torch's own `torch.backends` entry point: installs fxpatch in every process that has a device and comes to compile.

torch fails to import if an entry point raises, and runs the entry points in no certain order. So this one never
raises, imports neither Dynamo nor Inductor, and does nothing but wait: until Dynamo is imported, or, where a vendor's
package is being imported at that moment, until that is done. Then it acts if PrivateUse1 has a name. (Installing at
once where a name is there already would cost 25 ms of every `import torch`, and help only those who use FX without
Dynamo: they call `fxpatch.install()`.) `FXPATCH_AUTOLOAD=0` turns it off.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger("fxpatch")


def autoload() -> None:
    """The entry point. Called by `import torch`; never raises."""
    if os.environ.get("FXPATCH_AUTOLOAD", "1") == "0":
        return
    try:
        from fxpatch.arrival import when_imported

        when_imported("torch._dynamo", _install)
    except Exception:
        log.exception("fxpatch could not install itself; torch works as it does without it")


def _install() -> None:
    try:
        _install_or_wait()
    except Exception:
        log.exception("fxpatch could not install itself; torch works as it does without it")


def _install_or_wait() -> None:
    import torch

    from fxpatch.arrival import under_way, when_imported
    from fxpatch.errors import NoProfileError
    from fxpatch.installer import install_automatically
    from fxpatch.probe import private_name, vendor_package

    device = private_name()
    if device is None:
        return
    if under_way(vendor_package(device)):
        when_imported(vendor_package(device), _install)
        return
    if not hasattr(torch, device):
        log.info(
            "fxpatch leaves %s alone: torch.%s is not there yet; call fxpatch.install() when it is", device, device
        )
        return
    try:
        install_automatically(device)
    except NoProfileError as error:
        log.info("fxpatch leaves %s alone: %s", device, error)
