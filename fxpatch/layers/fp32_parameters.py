"""Parameters converted to float32 once, for layers that compute in float32 whatever their parameters are.

The problem: a cache of `weight.float()` that answers when it should not is a silently wrong model. Seed 001's is keyed
on `(data_ptr, _version, device, target, dtype)`, and answers wrongly, or fails, where

- a freed parameter's address is reused, or memory is lent to another parameter with another counter of writes:
  counters of different parameters may be equal;
- `param.data = other` puts other memory, or other strides over the same memory, under the same counter;
- a parameter is an inference tensor, of which `_version` cannot be read (it raises);
- a conversion is captured in a device graph (it has no value before a replay), or is traced (a proxy, a fake tensor, a
  constant in somebody's graph), or belongs to a transform of `torch.func`;
- forward-mode gradients are computed under `no_grad`: `detach()` drops them;
- the conversion runs on one stream and is used on another that has not waited for it;
- the module is copied or pickled: the cache goes along, with an address that means nothing there.

The rule: a conversion is valid while it is the same parameter object, over the same storage (both held weakly, so that
neither's address can come again), at the same place in it, with the same counter of writes, on the same stream.
Whatever of that cannot be known means that nothing is kept: what is traced, captured, transformed or differentiated is
converted plainly, and so are inference tensors and subclasses.

What torch does not count, no cache can see: writes through `param.data` (an alias with a counter of its own; measured
with torch 2.13: `param.data.add_(1)` leaves `param._version`), through NumPy or DLPack, by kernels whose schema hides
them, by FSDP2's all-gather (it restores the counter). A call with grad enabled and a change of mode (`train()`,
`eval()`) forget what was kept, so training between two evaluations is seen. What remains is for `forget()`: a served
model that is updated in place through `param.data.copy_()`, as engines' weight loaders do; before the first call they
need nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import forward_ad

_HOST = ("cpu", "meta")  # neither streams nor captures


@dataclass(frozen=True, slots=True)
class _Converted:
    """One parameter as it was when it was converted. `address`, `shape` and `dtype` say where in its storage it is, and
    a storage never changes its device; only contiguous ones are kept, so strides need no comparison."""

    parameter: weakref.ref[torch.Tensor]
    storage: weakref.ref[torch.UntypedStorage]
    version: int
    address: int
    dtype: torch.dtype
    shape: torch.Size
    value: torch.Tensor

    def holds(self, parameter: torch.Tensor | None) -> bool:
        return (
            parameter is not None
            and self.parameter() is parameter
            and self.version == parameter._version
            and self.address == parameter.data_ptr()
            and self.storage() is parameter.untyped_storage()
            and self.dtype == parameter.dtype
            and parameter.is_contiguous()
            and self.shape == parameter.shape
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """All of a layer's parameters, None for those that needed no conversion. Never changed, only replaced: a thread
    sees all of one or all of another."""

    device: torch.device
    stream: int
    of: tuple[_Converted | None, ...]


class Fp32Parameters:
    """The converted parameters of one layer. Copied or pickled, it is empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def of(self, device: torch.device, *parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Each parameter in float32 on `device`: itself where it is that already, the tensor of the last call where
        that is known to be right, else a new one.

        Args:
            device: of the layer's input.
            parameters: all of the layer's, in the same order in every call. None stays None.
        """
        if torch.compiler.is_compiling():
            return [None if each is None else each.float().to(device) for each in parameters]
        host = device.type in _HOST
        if not _may_keep(device, host):
            if torch.is_grad_enabled():
                self._entry = None  # training may write what torch does not count
            return [None if each is None else each.float().to(device) for each in parameters]
        stream = 0 if host else _stream(device)
        entry = self._entry
        if entry is not None and entry.stream == stream and entry.device == device:
            values: list[torch.Tensor | None] = []
            for parameter, kept in zip(parameters, entry.of, strict=True):
                if kept is None:
                    if not _as_it_is(parameter, device):
                        break
                    values.append(parameter)
                elif kept.holds(parameter):
                    values.append(kept.value)
                else:
                    break
            else:
                return values
        return self._convert(device, stream, parameters)

    def _convert(
        self, device: torch.device, stream: int, parameters: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Converts them all, and keeps that if each may be kept."""
        values: list[torch.Tensor | None] = []
        kept: list[_Converted | None] = []
        sure = True
        for parameter in parameters:
            if parameter is None or _as_it_is(parameter, device):
                values.append(parameter)
                kept.append(None)
                continue
            value, made = _converted(parameter, device)
            sure = sure and made is not None
            values.append(value)
            kept.append(made)
        self._entry = _Entry(device, stream, tuple(kept)) if sure and any(kept) else None
        return values

    def forget(self) -> None:
        """Drops what was converted."""
        self._entry = None

    def __len__(self) -> int:
        """How many conversions are kept."""
        entry = self._entry
        return 0 if entry is None else sum(each is not None for each in entry.of)

    def __reduce__(self) -> tuple[type[Fp32Parameters], tuple[()]]:
        return Fp32Parameters, ()


def forget_fp32_parameters(model: nn.Module) -> int:
    """`forget()` for all layers of a model, after writes that torch does not count; returns how many had something.

    Args:
        model: the layers may be anywhere in it.
    """
    found = [getattr(module, "fp32_parameters", None) for module in model.modules()]
    had = [each for each in found if isinstance(each, Fp32Parameters) and len(each)]
    for each in had:
        each.forget()
    return len(had)


def _converted(parameter: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, _Converted | None]:
    """The parameter converted, and what is to be kept of that; None where nothing may be."""
    if (
        type(parameter) not in (nn.Parameter, torch.Tensor)
        or parameter.is_inference()  # its writes are not counted
        or not parameter.is_contiguous()
        or (parameter.device != device and _capturing(parameter.device))
    ):
        return parameter.float().to(device), None
    storage, version, address = parameter.untyped_storage(), parameter._version, parameter.data_ptr()
    value = parameter.detach().float().to(device)
    refs = weakref.ref(parameter), weakref.ref(storage)
    made = _Converted(*refs, version, address, parameter.dtype, parameter.shape, value)
    return value, made if made.holds(parameter) else None  # else written meanwhile


def _as_it_is(parameter: torch.Tensor | None, device: torch.device) -> bool:
    return parameter is None or (parameter.dtype == torch.float32 and parameter.device == device)


def _may_keep(device: torch.device, host: bool) -> bool:
    """Whether a conversion means the same later as it does now.

    Private names, each as in torch 2.11 to 2.13: `forward_ad._current_level`, `_C._len_torch_dispatch_stack` (fake,
    proxy and other modes), `_C._functorch.peek_interpreter_stack`, `_C._is_tracing` (`torch.jit.trace`).
    """
    return (
        not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and (host or not _capturing(device))
    )


def _stream(device: torch.device) -> int:
    """The current stream of a device, as its module says; 0 where there is only one (mps)."""
    current = getattr(torch.get_device_module(device.type), "current_stream", None)
    return 0 if current is None else int(current(device).stream_id)


def _capturing(device: torch.device) -> bool:
    if device.type in _HOST:
        return False
    capturing = getattr(torch.get_device_module(device.type), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())
