"""The entry. The problem: a device name can be given once per process and never taken back. The rule: everything that
can be refused is refused before anything is changed.
"""

from __future__ import annotations

import keyword
import re
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Unpack

import torch
import wrapt
from torch.utils import backend_registration

from fxpatch.errors import DeviceNameTakenError, TorchTooOldError, UnknownDeviceError
from fxpatch.privateuse1 import UNNAMED, private_type
from fxpatch.repair import module_to
from fxpatch.simulator import accelerator, attention, autocast, device_module, fork, gaps, kernels, untyped_storage
from fxpatch.simulator.settings import Settings, check

_HOOKS: tuple[tuple[Any, str], ...] = (
    (backend_registration, "_setup_privateuseone_for_python_backend"),
    (torch._C, "_acc"),
    (torch._C, "_construct_storage_from_data_pointer"),
    (torch._C, "_storage_Use_Count"),
    (torch._C, "_to_dlpack"),
    (torch._C, "_from_dlpack"),
    (torch, "AcceleratorError"),
)
# torch gives each of these a member named after the device
_NAMED_AFTER = (torch.Tensor, torch.nn.Module, torch.nn.utils.rnn.PackedSequence, torch.UntypedStorage)

_lock = threading.Lock()
_simulated: dict[str, ModuleType] = {}
_lacking: frozenset[str] = frozenset()


def simulate(name: str = "musa", *, without: Iterable[str] | None = None, **settings: Unpack[Settings]) -> ModuleType:
    """Makes this process's PrivateUse1 an accelerator called `name`, over host memory; returns `torch.<name>`.

    Asking again for the same name returns the same module, with the settings given now, and the others as they were.
    There is no way back: torch names PrivateUse1 once. Call it before the process's first `backward()`: torch's
    autograd engine serves the devices that there were then, and a later one ends in its `INTERNAL ASSERT`.

    Args:
        name: lower-case letters and underscores.
        without: what the device lacks that a vendor would have to register, e.g. ("autocast",): see `gaps.GAPS`.
        memory: what the device has, in bytes or as "2 GiB"; None: what the host has. Allocating more raises
            torch.OutOfMemoryError.
        max_live_graphs: how many captured graphs there can be at a time; None: any number.
        strict: check on every replay that the memory a graph reads is still owned, and what it was captured with.

    Raises:
        UnknownDeviceError: no device can have this name.
        DeviceNameTakenError: PrivateUse1 has another name, or belongs to a real device of this name.
        TorchTooOldError: this torch cannot host a device written in Python.
        SimulatorError: a setting has a value that makes no sense.
    """
    global _lacking
    with _lock:
        checked, lacking = check(settings), gaps.check(without or ())
        if name in _simulated:
            gaps.check_same(name, _lacking if without is None else lacking, _lacking)
            checked.apply()
            return _simulated[name]
        _check_torch()
        _check_not_taken(name)
        _check_name(name)
        checked.apply()
        module = device_module.build(name)
        backend_registration._setup_privateuseone_for_python_backend(name, backend_module=module)
        kernels.register()
        kernels.libraries.append(attention.register())
        untyped_storage.guard()
        accelerator.guard()
        fork.guard(lambda: kernels.libraries)
        if "autocast" not in lacking:
            autocast.register()
        if "module_to" not in lacking:
            kernels.libraries.append(module_to.register())
        if "inductor" not in lacking:
            # not at `torch._inductor`: that is imported in the middle of importing Dynamo, long before it can be used
            wrapt.register_post_import_hook(_register_inductor, "torch._inductor.compile_fx")
        _simulated[name], _lacking = module, lacking
        return module


def _register_inductor(_compile_fx: ModuleType) -> None:
    from fxpatch.simulator import inductor

    inductor.register()


def _check_torch() -> None:
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in _HOOKS if not hasattr(owner, name)]
    if missing:
        raise TorchTooOldError(
            "This torch cannot host a device written in Python.",
            seen=f"torch {torch.__version__} without {', '.join(missing)}",
            expected="torch 2.11 or later",
            hint="upgrade torch",
        )


def _check_not_taken(name: str) -> None:
    current = private_type()
    if current == UNNAMED:
        return
    whose = "simulated by fxpatch" if current in _simulated else "registered by somebody else"
    raise DeviceNameTakenError(
        f"PrivateUse1 cannot become a simulated {name!r} in this process.",
        seen=f"PrivateUse1 is {current!r}, {whose}",
        expected="PrivateUse1 without a name (one name per process)",
        hint=f"use {current!r}" if current in _simulated else "simulate in a process that does not load the vendor",
    )


def _check_name(name: str) -> None:
    reason = _unusable(name)
    if reason is not None:
        raise UnknownDeviceError(
            f"No simulated device can be called {name!r}.",
            seen=reason,
            expected="lower-case letters and underscores, as in 'musa', and nothing that torch already has",
            hint="choose another name",
        )


def _unusable(name: str) -> str | None:
    if not isinstance(name, str) or re.fullmatch("[a-z][a-z_]*", name) is None or keyword.iskeyword(name):
        return f"{name!r} is not a name that torch.device() can parse"
    if _is_device_type(name):
        return f"{name!r} is one of torch's own device types"
    if hasattr(torch, name):
        return f"torch.{name} exists already"
    for owner in _NAMED_AFTER:
        for member in (name, f"is_{name}"):
            if hasattr(owner, member):
                return f"{owner.__name__}.{member} exists already"
    return None


def _is_device_type(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
