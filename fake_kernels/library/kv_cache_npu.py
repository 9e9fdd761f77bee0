"""Ascend's writes to caches: rows at slots, slices at positions, single elements or rows by coordinates.

The in-place operators declare what they write. The others return a copy, which on this device is contiguous whatever
the layout of the original: torch_npu's `clone` does not keep strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel

_OPAPI = "Ascend/op-plugin op_plugin/ops/opapi/"
_CLONE = "Ascend/pytorch torch_npu/csrc/aten/common/TensorFactories.cpp (NPUNativeFunctions::clone)"
_ATB = "Ascend/op-plugin op_plugin/ops/atb/"
_DENSE = ("contiguous", "transposed", "offset")


def _nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return input.index_put_(tuple(indices.long().unbind(-1)), updates) if indices.shape[-1] else input.copy_(updates)


def _nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return _nd_update_(input.clone(memory_format=torch.contiguous_format), indices, updates)


def _nd_arguments(draw: Draw) -> Call:
    dtype, index_dtype = draw.choice(*FLOATS), draw.choice(torch.int64, torch.int32)
    dims = draw.choice(2, 3, 4)
    coordinates, layout = draw.choice(*range(1, dims + 1)), draw.choice(*_DENSE)
    sizes = draw.sizes(dims, least=1)
    count = min(draw.size(), sizes[0])
    first = draw.permutation(sizes[0])[:count]  # no element is written twice
    others = [draw.integers(count, low=0, high=size, layout="contiguous") for size in sizes[1:coordinates]]
    indices = draw.placed(torch.stack([first, *others], -1).to(index_dtype))
    updates = draw.floats(count, *sizes[coordinates:], dtype=dtype)
    return (draw.floats(*sizes, dtype=dtype, layout=layout), indices, updates), {}


@fake_kernel(
    "npu::npu_scatter_nd_update(Tensor input, Tensor indices, Tensor updates) -> Tensor",
    reference=_nd_update,
    source=f"{_OPAPI}ScatterNdUpdateKernelNpuOpApi.cpp (npu_scatter_nd_update); {_CLONE}",
    library="torch_npu",
    arguments=_nd_arguments,
)
def scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A contiguous copy of `input` with `copy[indices[i, 0], ..., indices[i, k - 1]] = updates[i]`.

    `indices` is int64 or int32 `[..., k]`, `updates` `[..., *input.shape[k:]]`. What CANN refuses was not read.
    """
    return input.new_empty(input.shape)


@fake_kernel(
    "npu::npu_scatter_nd_update_(Tensor(a!) input, Tensor indices, Tensor updates) -> Tensor(a!)",
    reference=_nd_update_,
    source=f"{_OPAPI}ScatterNdUpdateKernelNpuOpApi.cpp (npu_scatter_nd_update_)",
    library="torch_npu",
    arguments=_nd_arguments,
)
def scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """The same in place; returns `input`."""
    return input


def _update_(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    length = updates.shape[axis]
    for row, start in enumerate(indices.tolist()):
        input[row].narrow(axis - 1 if axis > 0 else axis, start, length).copy_(updates[row])
    return input


def _update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    return _update_(input.clone(memory_format=torch.contiguous_format), indices, updates, axis)


def _update_arguments(draw: Draw) -> Call:
    dtype, dims, layout = draw.choice(*FLOATS, torch.int8), draw.choice(3, 4), draw.choice(*_DENSE)
    axis = draw.choice(-2, -1, dims - 2)
    sizes = list(draw.sizes(dims, least=1))
    part = list(sizes)
    part[axis] = min(draw.size(least=1), sizes[axis])
    input, updates = (draw.floats(*each, dtype=torch.float32).to(dtype) for each in (sizes, part))
    starts = draw.integers(sizes[0], low=0, high=sizes[axis] - part[axis] + 1)
    return (draw.placed(input, layout), starts, draw.placed(updates), axis), {}


@fake_kernel(
    "npu::scatter_update(Tensor input, Tensor indices, Tensor updates, int axis) -> Tensor",
    reference=_update,
    source=f"{_OPAPI}ScatterUpdateKernelNpuOpApi.cpp (scatter_update); {_CLONE}; CANN index/scatter/README.md",
    library="torch_npu",
    arguments=_update_arguments,
)
def scatter_update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """A contiguous copy of `input` `[B, ...]` with `updates[b]` written from `indices[b]` on along `axis`, for each b.

    `updates` has `input`'s sizes but for `axis`. What CANN refuses was not read.
    """
    return input.new_empty(input.shape)


@fake_kernel(
    "npu::scatter_update_(Tensor(a!) input, Tensor indices, Tensor updates, int axis) -> Tensor(a!)",
    reference=_update_,
    source=f"{_OPAPI}ScatterUpdateKernelNpuOpApi.cpp (scatter_update_); CANN index/scatter/README.md",
    library="torch_npu",
    arguments=_update_arguments,
)
def scatter_update_(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """The same in place; returns `input`."""
    return input


def _store(rows: Tensor, cache: Tensor, slots: Tensor, nz: bool) -> None:
    """`rows` `[T, N, D]` at `slots`; below 0: none. In NZ a cache is `[blocks, N * D / w, block size, w]`."""
    wanted, at = slots.long() >= 0, slots.long()
    block = cache.shape[2 if nz else 1]
    at, rows = at[wanted], rows[wanted]
    if nz:
        cache[at // block, :, at % block] = rows.flatten(1).unflatten(1, (-1, cache.shape[3]))
    else:
        cache[at // block, at % block] = rows


def _paged_arguments(draw: Draw, nz: bool, dtypes: tuple[torch.dtype, ...] = HALVES) -> list[Tensor]:
    dtype, slot_dtype = draw.choice(*dtypes), draw.choice(torch.int32, torch.int64)
    tokens, (spare, heads) = draw.size(), draw.sizes(2, least=1)
    width, value_width = draw.sizes(2, least=1, times=16 if nz else 1)
    block = draw.size(least=1)
    blocks = tokens + spare
    slots = draw.permutation(blocks * block)[:tokens]
    slots[-1:] = -1
    caches = [
        (blocks, heads * each // 16, block, 16) if nz else (blocks, block, heads, each) for each in (width, value_width)
    ]
    return [
        draw.floats(tokens, heads, width, dtype=dtype),
        draw.floats(tokens, heads, value_width, dtype=dtype),
        *(torch.zeros(each, dtype=dtype, device=draw.device) for each in caches),
        draw.placed(slots.to(slot_dtype)),
    ]


def _scatter_pa(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *,
    compress_lens: Tensor | None = None, compress_seq_offsets: Tensor | None = None, seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:  # fmt: skip
    if compress_lens is not None or cache_mode not in ("PA_NZ", "Norm"):
        raise NotImplementedError("the reference knows neither compression nor other modes")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        _store(rows, cache, slot_mapping, cache_mode == "PA_NZ")


def _scatter_pa_arguments(draw: Draw) -> Call:
    nz = draw.flag()
    return tuple(_paged_arguments(draw, nz)), {} if nz else {"cache_mode": "Norm"}


@fake_kernel(
    "npu::npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, Tensor? seq_lens=None, "
    'str? cache_mode="PA_NZ") -> ()',
    reference=_scatter_pa,
    source=f"{_OPAPI}ScatterPaKvCacheNpuOpApi.cpp; CANN attention/scatter_pa_kv_cache/README.md (cases 1 and 2)",
    library="torch_npu",
    arguments=_scatter_pa_arguments,
)
def scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *,
    compress_lens: Tensor | None = None, compress_seq_offsets: Tensor | None = None, seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:  # fmt: skip
    """Writes `key` `[T, N, D]` and `value` `[T, N, D2]` to the caches where `slot_mapping` `[T]` says (below 0:
    nowhere).

    `Norm`: caches `[blocks, block size, N, D]`; `PA_NZ`: `[blocks, N * D / w, block size, w]`, w of 32 bytes. op-plugin
    checks nothing.
    """


def _reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    for rows, cache in ((key, key_cache), (value, value_cache)):
        _store(rows, cache, slot_indices, False)


def _reshape_arguments(draw: Draw) -> Call:
    return tuple(_paged_arguments(draw, False)), {}


@fake_kernel(
    "atb::_npu_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_indices) -> ()",
    reference=_reshape_and_cache,
    source=f"{_ATB}ReshapeAndCachAtb.cpp; ATB ReshapeAndCacheOperation",
    library="torch_npu",
    arguments=_reshape_arguments,
)
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    """Writes rows to caches `[blocks, block size, N, D]` at the slots; op-plugin checks nothing."""


def _siso(key: Tensor, key_cache: Tensor, slot_indices: Tensor) -> None:
    _store(key, key_cache, slot_indices, False)


def _siso_arguments(draw: Draw) -> Call:
    key, _, cache, _, slots = _paged_arguments(draw, False)
    return (key, cache, slots), {}


@fake_kernel(
    "atb::_npu_reshape_and_cache_siso(Tensor key, Tensor(a!) key_cache, Tensor slot_indices) -> ()",
    reference=_siso,
    source=f"{_ATB}ReshapeAndCacheSisoAtb.cpp; ATB ReshapeAndCacheOperation",
    library="torch_npu",
    arguments=_siso_arguments,
)
def reshape_and_cache_siso(key: Tensor, key_cache: Tensor, slot_indices: Tensor) -> None:
    """The same for one cache."""


KERNELS = (
    scatter_nd_update,
    scatter_nd_update_,
    scatter_update,
    scatter_update_,
    scatter_pa_kv_cache,
    reshape_and_cache,
    reshape_and_cache_siso,
)
