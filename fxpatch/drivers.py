"""The driver and the toolkit of a device, in words: what compiled code depends on besides torch and the vendor.

They are read from the files in which vendors write their versions, which touches no hardware; and asked of the device
module only where the device is in use already: asking may initialize it, and a process that has initialized a device
cannot fork workers that want one.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch

# A path begins with a directory, or with an environment variable that names one, and a vendor's default for it.
# Ascend: driver/version.info and the toolkit's ascend_*_install.info are what its installation guide has one read, and
# torch_npu/utils/collect_env.py reads the latter. Moore Threads: its toolkit is installed to /usr/local/musa.
VERSION_FILES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "npu": (
        ("driver", "/usr/local/Ascend/driver", "version.info"),
        ("cann", "$ASCEND_HOME_PATH", "*/ascend_*_install.info"),
        ("cann", "$ASCEND_HOME_PATH", "version.cfg"),
    ),
    "musa": (
        ("toolkit", "$MUSA_HOME", "version.json"),
        ("toolkit", "/usr/local/musa", "version.json"),
    ),
}
# Functions of the device module, without arguments or with the name of the part that is asked for.
_FUNCTIONS = (("get_driver_version", ()), ("driver_version", ()), ("utils.get_cann_version", ("DRIVER",)))
_OF_A_MODEL = ("name", "total_memory", "major", "minor", "multi_processor_count", "cube_core_num", "vector_core_num")
_OF_ONE_CARD = re.compile(r",? *\b(?:uuid|pci_\w+|serial\w*)=[^,)]*")
_LONGEST = 40  # characters of a version that go into a key as they are


def driver_versions(device: str, *, ask: bool = True) -> tuple[str, ...]:
    """`("driver=23.0.rc3", "cann=8.0.0")`, as far as they can be known; empty for a device that says nothing.

    Args:
        device: device type, e.g. `"npu"`.
        ask: the device module, too, where the device is in use: what it says goes before what the files say. Without,
            the answer is the same before and after the device is used.
    """
    found: dict[str, str] = {}
    for what, directory, pattern in VERSION_FILES.get(device, ()):
        told = _from_files(directory, pattern)
        if told is not None:
            found.setdefault(what, told)
    told = asked_driver(device) if ask else None
    if told is not None:
        found["driver"] = told
    return tuple(f"{what}={each}" for what, each in sorted(found.items()))


def origin(device: str) -> str:
    """The module whose code `torch.<device>` is: `"torch_musa.core.device"`; empty where there is no such thing."""
    module: Any = getattr(torch, device, None)
    return str(getattr(getattr(module, "device_count", None), "__module__", None) or getattr(module, "__name__", ""))


def vendor_packages(device: str) -> tuple[str, ...]:
    """The packages that may make a device what it is, imported or not: the one whose code its device module is, however
    it is called; `torch_<device>`; and torchada, the shim. fxpatch, which simulates devices, is none."""
    found = dict.fromkeys((origin(device).partition(".")[0], f"torch_{device}", "torchada"))
    return tuple(name for name in found if name not in ("", "__main__", "torch", "fxpatch"))


def in_use(device: str) -> bool:
    """Whether the device is initialized in this process, and may be asked."""
    module: Any = getattr(torch, device, None)
    unusable = getattr(module, "_is_in_bad_fork", bool)()
    return bool(not unusable and getattr(module, "is_initialized", bool)())


def asked_driver(device: str) -> str | None:
    """What the device module says of the driver; None where the device is not in use, or says nothing."""
    if not in_use(device):
        return None
    for name, args in _FUNCTIONS:
        function: Any = getattr(torch, device)
        for part in name.split("."):
            function = getattr(function, part, None)
        if not callable(function):
            continue
        try:
            return _plain(str(function(*args)))
        except Exception as error:  # of whatever class the vendor raises: that it did not tell is said
            return f"unknown ({type(error).__name__})"
    return None


def model(device: str) -> str | None:
    """What the device module says of the device's model, the same for every card of the model; None where it is not in
    use."""
    if not in_use(device):
        return None
    module: Any = getattr(torch, device)
    try:
        found = module.get_device_properties(module.current_device())
    except Exception as error:  # of whatever class the vendor raises: that it did not tell is said
        return f"unknown ({type(error).__name__})"
    told = str(found)
    if " at 0x" in told:  # a class without a text of its own: an address, which is another one in every process
        told = ", ".join(f"{name}={getattr(found, name)}" for name in _OF_A_MODEL if hasattr(found, name))
    return _OF_ONE_CARD.sub("", told) or "unknown"


def _from_files(directory: str, pattern: str) -> str | None:
    """A short name for the contents of the first file that matches; None where there is none that can be read."""
    place = os.path.expandvars(directory)
    if not place or place.startswith("$"):
        return None
    for path in sorted(Path(place).glob(pattern)):
        try:
            return _short(path.read_bytes())
        except OSError:
            continue
    return None


def _short(content: bytes) -> str:
    """The version in a file of `key=value` lines, or a hash of the file."""
    for line in content.decode(errors="replace").splitlines():
        key, _, told = line.partition("=")
        if key.strip().lower() == "version" and told.strip():
            return _plain(told.strip())
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(told: str) -> str:
    """Without what parts a key (`|`, `/`) or makes it long."""
    plain = all(each.isalnum() or each in "._-+" for each in told)
    return told if plain and len(told) <= _LONGEST else hashlib.sha256(told.encode()).hexdigest()[:16]
