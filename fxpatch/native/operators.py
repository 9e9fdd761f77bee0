"""Modules that say what they compute twice: in plain torch, and with a kernel of one device.

Engines give such a module `forward_native` and one `forward_<device>` per device (`forward_musa`, `forward_npu`,
`forward_cuda`); its `forward` is whichever is current. The rule: an instance belongs to its qualified name in one
model, both forwards are looked up on the instance and on its class (a wrapper that only forwards attributes, like
torch's `OptimizedModule`, is no operator), and neither class nor instance is touched by looking.

Sources: vLLM `model_executor/custom_op.py` (`CustomOp`), SGLang `srt/layers/utils/multi_platform.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from fxpatch.privateuse1 import is_private

ROOT = "(model)"  # the qualified name of the model itself is empty, which no table can show
_OWN_BOOKKEEPING = frozenset({"forward", *nn.Module().__dict__}) - {"training"}


@dataclass(frozen=True, eq=False)
class NativeOperator:
    """One instance with two forwards.

    Args:
        name: its qualified name in the model; `(model)` for the model itself.
        module: the instance.
        optimized_name: the method that is the device's: `"forward_musa"`.
        aliases: its other qualified names, where it is shared.
    """

    name: str
    module: nn.Module
    optimized_name: str
    aliases: tuple[str, ...] = ()

    @property
    def native(self) -> Callable[..., Any]:
        """`forward_native`, bound."""
        return getattr(self.module, "forward_native")  # type: ignore[no-any-return]  # noqa: B009

    @property
    def optimized(self) -> Callable[..., Any]:
        """`forward_<device>`, bound."""
        return getattr(self.module, self.optimized_name)  # type: ignore[no-any-return]

    @property
    def kind(self) -> str:
        """The class, as the table shows it."""
        return type(self.module).__qualname__

    def native_code(self) -> CodeType | None:
        """The code of `forward_native`, by which a graph's stack traces know it; None where it is not Python."""
        return code_of(self.native)

    def same_code(self) -> bool:
        """Whether both names mean one function."""
        native, optimized = (getattr(f, "__func__", f) for f in (self.native, self.optimized))
        return native is optimized

    def configuration(self) -> Hashable:
        """Class and settings: what two instances have to share for one trial of tracing and capture to stand for both.

        Plain values compare by value, tensors and parameters by shape, dtype, stride and device, anything else by
        identity: where it cannot be told that two settings are equal, they are taken for different.
        """
        return _configuration(self.module)


def find_operators(model: nn.Module, device: str | torch.device) -> list[NativeOperator]:
    """Every distinct submodule of `model` that has both `forward_native` and a forward of the device's.

    The device's forward is `forward_<type>`; on a PrivateUse1 device without one, `forward_oot` (vLLM's name for it).

    Args:
        model: searched with all submodules, itself included.
        device: the device, or its type: `"musa"`, `"musa:0"`, `torch.device("cpu")`.
    """
    kind = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    candidates = [f"forward_{kind}"]
    if is_private(kind):
        candidates.append("forward_oot")
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name or ROOT)
        modules[id(module)] = module
    found = []
    for key, module in modules.items():
        optimized = next((name for name in candidates if _has(module, name)), None)
        if optimized is not None and _has(module, "forward_native"):
            name, *aliases = names[key]
            found.append(NativeOperator(name, module, optimized, tuple(aliases)))
    return found


def code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function or method, decorators that keep `__wrapped__` taken off."""
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__code__", None)


def _has(module: nn.Module, name: str) -> bool:
    return callable(module.__dict__.get(name) or getattr(type(module), name, None))


def _configuration(module: nn.Module) -> Hashable:
    settings = {key: value for key, value in module.__dict__.items() if key not in _OWN_BOOKKEEPING}
    return (
        type(module),
        _plain(settings),
        _plain(module._parameters),
        _plain(module._buffers),
        tuple((name, None if child is None else _configuration(child)) for name, child in module._modules.items()),
    )


def _plain(value: object) -> Hashable:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout is torch.strided else None
        return type(value), tuple(value.shape), strides, value.dtype, value.device
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_plain(key), _plain(item)) for key, item in value.items())
    return type(value), id(value)
