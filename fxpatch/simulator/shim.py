"""What vendor shims do to `torch.device`, in the forms seen in the wild, so that repairs can be tested without them.

A vendor that wants code written for `cuda` to run unchanged replaces `torch.device` by a class of its own which maps
the name, and answers `isinstance` through a metaclass. The objects it hands out are real devices. torchada
(`torchada/_patch.py`), Habana's gpu_migration and DeepLink DIPU do this; the differences that matter are in `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _mapped(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, with the device type `cuda` (bare or in `cuda:1`) replaced by `name`."""
    swap = lambda x: name + x[4:] if isinstance(x, str) and (x == "cuda" or x.startswith("cuda:")) else x  # noqa: E731
    return tuple(swap(a) for a in args), {key: swap(value) for key, value in kwargs.items()}


def _factory_class(name: str) -> type:
    """A module-level class as torchada has it: `isinstance` works, class identity and pickling do not."""

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, torch._C.device)

    class DeviceFactoryWrapper(metaclass=Meta):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _mapped(name, args, kwargs)
            return torch._C.device(*args, **kwargs)

    DeviceFactoryWrapper.__qualname__ = "DeviceFactoryWrapper"
    return DeviceFactoryWrapper


def _local_class(name: str) -> type:
    """A class local to a function: what it pickles to cannot be found again."""
    shim = _factory_class(name)
    shim.__qualname__ = "install_shim.<locals>.DeviceFactoryWrapper"
    return shim


def _equal_class(name: str) -> type:
    """Early torch_npu (until February 2024): the metaclass claims equality with the real class."""

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, torch._C.device)

        def __eq__(cls, other: object) -> bool:
            return other is torch._C.device or other is cls

        def __hash__(cls) -> int:
            return hash(torch._C.device)

    class DeviceFactoryWrapper(metaclass=Meta):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _mapped(name, args, kwargs)
            return torch._C.device(*args, **kwargs)

    return DeviceFactoryWrapper


FORMS: dict[str, Callable[[str], type]] = {"factory": _factory_class, "local": _local_class, "equal": _equal_class}


def load_shim(name: str, form: str = "factory") -> type:
    """Replaces `torch.device` as a vendor's import would, for good; returns the class now in its place.

    Args:
        name: device type to which `cuda` is mapped, e.g. `"musa"`.
        form: a key of `FORMS`.
    """
    torch.device = FORMS[form](name)  # type: ignore[misc,assignment]
    return torch.device


@contextmanager
def replaced_torch_device(name: str, form: str = "factory") -> Iterator[type]:
    """`load_shim` for the length of a `with` block."""
    before = torch.device
    try:
        yield load_shim(name, form)
    finally:
        torch.device = before  # type: ignore[misc]
