"""Which device the tests run on. The rule: a test run says what it runs on, and never takes one for the other."""

from __future__ import annotations

from typing import Any

import torch

from fxpatch.errors import DeviceNameTakenError, UnknownDeviceError
from fxpatch.privateuse1 import private_type
from fxpatch.simulator.registration import simulate


def simulated(name: str, **options: Any) -> str:
    """Simulates an accelerator called `name` in this process; returns its name.

    Raises:
        DeviceNameTakenError: PrivateUse1 belongs to a vendor's package, or has another name.
    """
    try:
        simulate(name, **options)
    except DeviceNameTakenError as error:
        theirs = private_type()
        hint = f"{error.hint}; to test the device that is there: pytest --real-device={theirs}"
        raise DeviceNameTakenError(error.what, seen=error.seen, expected=error.expected, hint=hint) from error
    return name


def real(name: str) -> str:
    """Checks that this process has a device called `name`; returns its name.

    Raises:
        UnknownDeviceError: it has none, or its module says that it is not available.
    """
    module = getattr(torch, name, None)
    if module is None or not hasattr(module, "is_available"):
        seen = f"torch.{name} is no device module in this process"
    elif not module.is_available():
        seen = f"torch.{name}.is_available() is False"
    else:
        return name
    raise UnknownDeviceError(
        f"The tests cannot run on a real {name!r}.",
        seen=seen,
        expected="hardware, its driver, and the vendor's package imported (by torch, or in conftest.py)",
        hint="leave --real-device out to run on a simulated one",
    )
