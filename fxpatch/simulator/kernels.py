"""Operators that need a kernel of their own, and the registration of all of them.

Everything else goes to `dispatch.fallback`. Here is what the fallback cannot see or must not be asked: allocation
(torch makes fake tensors through it too), copies across devices, growing in place, and what has no CPU kernel:
convolutions, for which torch has hooks that out-of-tree devices are to override, and recurrent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator import pinned, rnn
from fxpatch.simulator.capture import refuse
from fxpatch.simulator.dispatch import fallback, kernel_of
from fxpatch.simulator.graph import capturing
from fxpatch.simulator.storage import (
    CPU,
    alias_of,
    block_of,
    check_index,
    check_sole_user,
    host_view,
    on_device,
    point,
    to_device,
)
from fxpatch.simulator.untraced import untraced

META = torch.device("meta")
aten = torch.ops.aten
# without a CPU kernel, and with a composite one that knows torch's own devices only, or that asks the host
_NOT_AS_COMPOSITES = ("aten::mode.values", "aten::_grouped_mm")
libraries: list[torch.library.Library] = []  # a library's kernels go when it does


def register() -> None:
    """Registers the fallback and the kernels below, for the rest of the process."""
    boxed = torch.library.Library("_", "IMPL")
    boxed.fallback(untraced(fallback), "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    for name, kernel in _KERNELS.items():
        own.impl(name, untraced(kernel), "PrivateUse1")
    for name in _with_cpu_kernel():
        own.impl(name.removeprefix("aten::"), kernel_of(name), "PrivateUse1")
    libraries.extend((boxed, own, pinned.register()))


def _with_cpu_kernel() -> list[str]:
    """ATen operators to run the CPU's kernel for. Without a kernel of the device's own, torch would take some apart,
    into an allocation and an `out=` call or into other operators; and a kernel is called faster than the fallback."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    return [
        name
        for name in names
        if (has_kernel(name, "CPU") or name in _NOT_AS_COMPOSITES) and name.removeprefix("aten::") not in _KERNELS
    ]


def _empty(
    size: list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    _check_options(layout, device, pin_memory)
    form = memory_format or torch.contiguous_format
    graph = capturing()
    if graph is None:
        return to_device(torch.empty(size, dtype=dtype, device=CPU, memory_format=form))
    return graph.new_tensor(torch.empty(size, dtype=dtype, device=META, memory_format=form))


def _empty_strided(
    size: list[int],
    stride: list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> torch.Tensor:
    _check_options(layout, device, pin_memory)
    graph = capturing()
    if graph is None:
        return to_device(torch.empty_strided(size, stride, dtype=dtype, device=CPU))
    return graph.new_tensor(torch.empty_strided(size, stride, dtype=dtype, device=META))


def _zero_tensor(size: list[int], **options: Any) -> torch.Tensor:
    """torch's tensor that is zero and has no memory; here it has some, since another name for none cannot be told."""
    return _empty(size, **options).zero_()


def _check_options(layout: torch.layout | None, device: torch.device | None, pin_memory: bool | None) -> None:
    check_index(device)
    if pin_memory:
        raise RuntimeError(f"Only dense CPU tensors can be pinned, not a tensor on {private_type()}")
    if layout not in (None, torch.strided):
        raise NotImplementedError(f"a simulated device has dense tensors only, not {layout}")


def _copy_(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    # not at _copy_from, where torch's own copy_ ends: that resolves a conjugated source by copying it, without end
    graph = capturing()
    if graph is None or not src.numel():
        _writable(dst).copy_(_writable(src))  # two names of one storage, so that copy_ sees where they overlap
        return dst
    if not (on_device(src) and on_device(dst)):
        refuse("a copy between host and device")
    source, target = _writable(src), _writable(dst)
    expanded = source.expand(target.shape)  # a wrong shape shows now, not at replay
    graph.record(lambda: target.copy_(expanded), "aten::copy_", [src], [dst])
    return dst


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    block = None if tensor.is_cpu else block_of(tensor.untyped_storage())
    return _writable(tensor) if block is None else block.read(tensor)


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    return host_view(tensor, alias_of(tensor.untyped_storage())) if on_device(tensor) else tensor


def _to_copy(
    tensor: torch.Tensor, *, device: torch.device | None = None, non_blocking: bool = False, **options: Any
) -> torch.Tensor:
    # composite in torch; there, non_blocking to the CPU asks for pinned memory, which only C++ can provide
    arrives = device is None or device.type == private_type()
    check_index(device if arrives else None)
    if capturing() is not None:
        if arrives and on_device(tensor):
            recorded: torch.Tensor = fallback(aten._to_copy.default, tensor, device=device, **options)
            return recorded
        if tensor.numel():
            refuse("a copy between host and device")
    host: torch.Tensor = aten._to_copy.default(_readable(tensor), device=CPU if arrives else device, **options)
    return to_device(host) if arrives else host


def _resize_(
    tensor: torch.Tensor, size: list[int], *, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    if tensor.shape == torch.Size(size) and memory_format is None:
        return tensor  # with the strides it has
    form = memory_format or torch.contiguous_format
    layout = torch.empty(size, dtype=tensor.dtype, device=META, memory_format=form)
    wanted = layout.as_strided(layout.shape, layout.stride(), tensor.storage_offset())
    storage = tensor.untyped_storage()
    needed = tensor.storage_offset() * tensor.itemsize + layout.untyped_storage().nbytes()
    if needed <= storage.nbytes() or not wanted.numel():
        point(tensor, storage, like=wanted)
        return tensor
    check_sole_user(tensor, wanted.shape)
    grown = _empty([int(needed)], dtype=torch.uint8)
    kept = torch.empty(0, dtype=torch.uint8, device=CPU).set_(alias_of(storage))
    target = _writable(grown)[: kept.numel()]
    graph = capturing()
    if graph is None:
        target.copy_(kept)
    else:
        graph.record(lambda: target.copy_(kept), "aten::resize_", [tensor], [grown])
    point(tensor, grown.untyped_storage(), like=wanted)
    return tensor


def _native_dropout(tensor: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    # what the CPU's does, which cannot be told where to draw from
    if train is False:
        return tensor.clone(), torch.ones_like(tensor, dtype=torch.bool)
    kept = torch.empty_like(tensor, dtype=torch.bool).bernoulli_(1 - p)
    return tensor.mul(kept).mul_(0 if p == 1 else 1 / (1 - p)), kept


def _histc(tensor: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    # accelerators count integers too (mixture-of-experts models do), the CPU does not
    if tensor.is_floating_point():
        counts: torch.Tensor = fallback(aten.histc.default, tensor, bins, min, max)
        return counts
    return _histc(tensor.double(), bins, min, max).to(tensor.dtype)


def _record_stream(tensor: torch.Tensor, stream: torch.Stream) -> None:
    """There is one stream, and memory is not reused before its launches are done."""


def _convolution(*args: Any) -> torch.Tensor:
    # contiguous whatever comes in: so says torch's fake kernel for a device that overrides convolutions
    result: torch.Tensor = fallback(aten.convolution.default, *args)
    return result.contiguous()


def _convolution_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> Any:
    bias_size = [weight.shape[1] * groups if transposed else weight.shape[0]]
    geometry = (stride, padding, dilation, transposed, output_padding, groups, output_mask)
    results = fallback(aten.convolution_backward.default, grad, input, weight, bias_size, *geometry)
    return tuple(result if result is None else result.contiguous() for result in results)


_KERNELS: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_efficientzerotensor": _zero_tensor,
    "copy_": _copy_,
    "_to_copy": _to_copy,
    "resize_": _resize_,
    "native_dropout": _native_dropout,
    "histc": _histc,
    "record_stream": _record_stream,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    "_thnn_fused_lstm_cell": rnn.lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": rnn.lstm_cell_backward,
    "_thnn_fused_gru_cell": rnn.gru_cell,
    "_thnn_fused_gru_cell_backward": rnn.gru_cell_backward,
}
