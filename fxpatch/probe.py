"""What this process looks like: torch, the device, the vendor's packages. Reading only; deciding is done elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fxpatch.arrival import under_way
from fxpatch.errors import TorchTooOldError, UnknownDeviceError, VendorModuleError
from fxpatch.privateuse1 import UNNAMED, private_name

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Facts:
    """One device in one process.

    Args:
        torch_version: `torch.__version__`, e.g. `"2.13.0+cpu"`.
        device: device type, e.g. `"musa"`.
        private: whether it lives on PrivateUse1.
    """

    torch_version: str
    device: str
    private: bool


def read_facts(device: str | None = None) -> Facts:
    """Facts on `device`, or on the device this process is for: PrivateUse1 if it has a name, else torch's current
    accelerator, else the CPU.

    Raises:
        TorchTooOldError: torch is older than 2.11.
        UnknownDeviceError: torch knows no device of that name.
    """
    check_torch(torch.__version__)
    private = private_name()
    if device is None:
        device = private or _current_accelerator() or "cpu"
    _check_device(device, private)
    return Facts(torch_version=torch.__version__, device=device, private=device == private)


def check_torch(version: str) -> None:
    """`TorchTooOldError` for a torch older than 2.11."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise TorchTooOldError(
            "This torch is too old for fxpatch.",
            seen=f"torch {version}",
            expected=f"torch {oldest} or newer",
            hint=f"upgrade torch (and the vendor's package with it) to {oldest} or newer",
        )


def _current_accelerator() -> str | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def _check_device(device: object, private: str | None) -> None:
    known = known_devices()
    if isinstance(device, str) and device in known:
        return
    if not isinstance(device, str):
        seen, hint = f"{device!r}, a {type(device).__qualname__}", "pass the device type as a string"
    elif ":" in device and device.split(":")[0] in known:
        seen, hint = f"{device!r}, which names an index", f"pass the device type alone: {device.split(':')[0]!r}"
    else:
        close = difflib.get_close_matches(device, known, n=1)
        seen = f"{device!r}; PrivateUse1 " + (f"is named {private!r}" if private else "has no name")
        hint = f"did you mean {close[0]!r}? otherwise " if close else ""
        hint += "import the vendor's package first, or call fxpatch.simulate() for a device without hardware"
    raise UnknownDeviceError(
        "torch knows no such device.", seen=seen, expected=f"one of {', '.join(sorted(known))}", hint=hint
    )


def known_devices() -> set[str]:
    """The device types `torch.device` accepts in this process."""
    try:
        torch._C.device("nosuchdevice")
    except RuntimeError as error:
        listed = str(error).split("Expected one of ", 1)[-1].split(" device type", 1)[0]
        return {private_name() or UNNAMED if name == UNNAMED else name for name in listed.split(", ")}
    raise AssertionError("torch.device accepted 'nosuchdevice'")


def vendor_package(device: str) -> str:
    """The name by which vendors call their package: `torch_npu`, `torch_musa`."""
    return f"torch_{device}"


def check_vendor(device: str, packages: Iterable[str]) -> None:
    """`VendorModuleError` where one of the vendor's `packages` is being imported, or `torch.<device>` is missing."""
    for package in packages:
        if under_way(package):
            raise VendorModuleError(
                f"The package of device {device!r} is only half imported.",
                seen=f"{package} is being imported right now",
                expected="a finished import",
                hint=f"call fxpatch.install() after `import {package}`, not from within it",
            )
    if not hasattr(torch, device):
        raise VendorModuleError(
            f"Device {device!r} has a name and no module.",
            seen=f"PrivateUse1 is named {device!r}, and torch.{device} does not exist",
            expected=f"torch.{device}, registered by torch._register_device_module({device!r}, module)",
            hint=f"the vendor's import failed half way: run `import {vendor_package(device)}` by itself and mend what "
            "it reports",
        )
