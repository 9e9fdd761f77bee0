"""Modules with one forward per device. The problem: engines choose a vendor's kernel by process-wide flags
(`_is_npu`, "while compiling", `torch.version.musa` without looking whether it is there), so a build without the kernel
raises in the middle of a model, a new operator is "not there" where its gradient is not, and nobody can ask why the
slow path ran. The rule: a call runs the forward of its tensors' device where that device has the kernel, the call is
one that the kernel takes, and no gradient is lost; otherwise plain torch, and `choice()` says why.

A subclass has `forward_native` in plain torch, which is right on every device, and a `forward_<device>` for each device
that has something of its own. Such a module is what `fxpatch.native` calls an operator: a `PiecewiseRunner` starts with
`forward_native` and promotes `forward_<device>` where it holds. A device for which there is none has no attribute of
that name in its class, so promotion passes it over; asked for, it is `forward_native`.

Which kernel there is, is looked up once per device and remembered (`look_again()` forgets). Dynamo takes the answer as
a constant: no graph break and no guard.

Sources: seeds 000 and 004; SGLang `srt/layers/utils/multi_platform.py`, vLLM `model_executor/custom_op.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from fxpatch.errors import LayerError
from fxpatch.privateuse1 import is_private

DEVICES = ("cpu", "cuda", "xpu", "npu", "musa")
NATIVE = "forward_native"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the vendors' fused kernels take
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}
_PLAIN = ("aten::_fused_rms_norm",)  # torch's own composite of it is plain torch: only a device's kernel counts


@dataclass(frozen=True)
class Choice:
    """What a call runs.

    Args:
        device: the type of the device of its tensors.
        forward: the method: `"forward_musa"`, `"forward_native"`.
        kernel: the operator that `forward_<device>` is made of; `""` where that is not chosen.
        reason: why.
    """

    device: str
    forward: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.forward} on {self.device}: {self.reason}"


class PlatformOp(nn.Module):
    """Base class: `forward` chooses. Subclasses say `kernels`, and where a kernel is not for all calls, `unfit`."""

    def forward_native(self, x: torch.Tensor, *inputs: Any) -> Any:
        """Plain torch, right on every device.

        Args:
            x: the first input; its device decides.
            inputs: the others.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward_native")

    def kernels(self, device: str, *inputs: Any) -> tuple[str, ...]:
        """The operators that `forward_<device>` can be made of, the best first: `"npu::npu_swiglu"`, or a class of
        `torch.nn`: `"nn.SwishGLU"`. None: the device has nothing of its own.

        Args:
            inputs: what `forward` was called with besides `x`.
        """
        return ()

    def unfit(self, device: str, x: torch.Tensor, *inputs: Any) -> str | None:
        """Why the device's kernel is not for this call, in words; None where it is. Traced by Dynamo, so plain Python
        over shapes, dtypes and settings.

        Args:
            device: device type of `x`.
            x: the first input.
            inputs: the others.
        """
        return None if x.dtype in FLOATS else f"its kernel does not take {x.dtype}"

    def trains(self, *inputs: Any) -> bool:
        """Whether a call with these has a gradient to compute.

        Args:
            inputs: what `forward` was called with.
        """
        if forward_ad._current_level >= 0:  # a tangent is no requires_grad, and is lost under no_grad, too
            return True
        if not torch.is_grad_enabled():
            return False
        return any(isinstance(t, torch.Tensor) and t.requires_grad for t in (*inputs, *self.parameters()))

    def forward(self, x: torch.Tensor, *inputs: Any) -> Any:
        """What `choice(x, *inputs)` says."""
        device = x.device.type
        names = self.kernels(device, *inputs)
        if names and registered(names, device, self.trains(x, *inputs)) and self.unfit(device, x, *inputs) is None:
            return getattr(self, f"forward_{device}")(x, *inputs)
        return self.forward_native(x, *inputs)

    def choice(self, x: torch.Tensor, *inputs: Any) -> Choice:
        """What a call with these runs, and why; asks what `forward` asks.

        Args:
            x: the first input.
            inputs: the others.
        """
        device = x.device.type
        names = self.kernels(device, *inputs)
        trains = self.trains(x, *inputs)
        kernel = registered(names, device, trains)
        reason = self.unfit(device, x, *inputs) if kernel else absent(names, device, trains)
        if reason is not None:
            return Choice(device, NATIVE, "", reason)
        return Choice(device, f"forward_{device}", kernel, f"{device} has {kernel}")

    def kernel(self, device: str, *inputs: Any) -> str:
        """The operator that `forward_<device>` runs.

        Args:
            inputs: what `forward_<device>` was called with besides `x`.

        Raises:
            LayerError: there is none: who asks for `forward_musa` by name gets no other.
        """
        names = self.kernels(device, *inputs)
        name: str = registered(names, device, False)
        if not name:
            raise LayerError(
                f"{type(self).__name__}.forward_{device} has no kernel to run.",
                seen=absent(names, device, False),
                expected=" or ".join(names) or f"a device that {type(self).__name__} has a kernel for",
                hint="import the vendor's package, then look_again(); or call the module itself, which runs "
                "forward_native where there is no kernel",
            )
        return name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("forward_") and name.removeprefix("forward_") in DEVICES:
            return self.forward_native
        return super().__getattr__(name)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def registered(names: tuple[str, ...], device: str, trains: bool) -> str:
    """The first of `names` that this process has for `device`; `""` where it has none.

    Args:
        trains: it has to have a gradient, too. (Without one, torch computes the forward and leaves the gradient out.)
    """
    return _registered(names, device, trains)


@functools.cache
def _registered(names: tuple[str, ...], device: str, trains: bool) -> str:
    return next((name for name in names if _missing(name, device, trains) is None), "")


def look_again() -> None:
    """Forgets which kernels there are: for a process that imported a vendor's package after the first call. What is
    compiled stays as it is until `torch._dynamo.reset()`."""
    _registered.cache_clear()


def absent(names: tuple[str, ...], device: str, trains: bool) -> str:
    """Why none of `names` serves, in words.

    Args:
        device: device type.
        trains: whether the call has a gradient to compute.
    """
    if not names:
        return f"there is no kernel for {device}"
    return "; ".join(filter(None, (_missing(name, device, trains) for name in names)))


def dispatch_key(device: str) -> str | None:
    """The dispatch key of a device's kernels; None for a device that this torch does not have.

    Args:
        device: device type, `"musa"`.
    """
    if device in _KEYS:
        return _KEYS[device]
    return "PrivateUse1" if is_private(device) else None


def _missing(name: str, device: str, trains: bool) -> str | None:
    """Private names: `_dispatch_has_kernel_for_dispatch_key`, as in torch 2.11 to 2.15."""
    if name.startswith("nn."):
        return None if hasattr(nn, name.removeprefix("nn.")) else f"there is no {name}"
    key = dispatch_key(device)
    if key is None:
        return f"this process has no device {device}"
    namespace, _, operator = name.partition("::")
    if not hasattr(getattr(torch.ops, namespace), operator):
        return f"{name} is not registered"
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, name)
    if has("CompositeImplicitAutograd") and name not in _PLAIN:
        return None
    if not has(key):
        return f"{name} has no kernel for {device}"
    if trains and not (has("Autograd") or has(f"Autograd{key}")):
        return f"{name} has no gradient"
    return None


def musa_version() -> str | None:
    """The MUSA that this torch was built for; None where it was not. A torch without it has no such attribute, and a
    torch of somebody else's may have a None there."""
    version = getattr(torch.version, "musa", None)
    return None if version is None else str(version)
