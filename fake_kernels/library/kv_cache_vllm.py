"""vLLM's writes of keys and values to paged caches; they declare what they write.

torch makes fakes for them by itself, which accept everything; these refuse what the kernels refuse. The caches may hold
8-bit floats (`kv_cache_dtype` other than "auto"), which the references do not compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "vllm-project/vllm csrc/cache_kernels.cu; vllm 0.33.0's _C_stable_libtorch.abi3.so (schema)"
_LIBRARY = "vllm._C_stable_libtorch"


def _same_type(rows: Tensor, kv_cache_dtype: str) -> None:
    if kv_cache_dtype != "auto" or rows.dtype not in FLOATS:
        raise NotImplementedError(f"the reference writes {rows.dtype} to caches of the same dtype only")


def _flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    _same_type(key, kv_cache_dtype)
    if key_cache.stride(0) != value_cache.stride(0):
        raise ValueError("blocks of the two caches are not equally far apart")
    wanted = slot_mapping >= 0
    at, block = slot_mapping[wanted], key_cache.shape[1]
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache[at // block, at % block] = rows[: slot_mapping.shape[0]][wanted]


def _rows(draw: Draw, *shape: int, dtype: torch.dtype, padded: bool) -> Tensor:
    """`[T, N, D]`, each token contiguous, as a slice of a fused projection is."""
    tokens, heads, width = shape
    wide = draw.floats(tokens, heads + padded, width, dtype=dtype, layout="contiguous")
    return wide[:, :heads]


def _flash_arguments(draw: Draw) -> Call:
    dtype, padded, joint = draw.choice(*FLOATS), draw.flag(), draw.flag()
    tokens, more, (heads, width, block, spare) = draw.size(), draw.size(), draw.sizes(4, least=1)
    rows = [_rows(draw, tokens + more, heads, width, dtype=dtype, padded=padded) for _ in range(2)]
    blocks = tokens + spare
    both = torch.zeros(blocks, 2, block, heads, width, dtype=dtype, device=draw.device)
    caches = both.unbind(1) if joint else [each.contiguous().clone() for each in both.unbind(1)]
    slots = draw.permutation(blocks * block)[:tokens]
    slots[-1:] = -1
    scales = [torch.ones((), device=draw.device) for _ in range(2)]
    return (*rows, *caches, slots, "auto", *scales), {}


def _blocks_apart(draw: Draw) -> Call:
    rows = draw.floats(2, 1, 4, dtype=torch.float16)
    caches = [torch.zeros(3, size, 1, 4, dtype=torch.float16, device=draw.device) for size in (2, 3)]
    slots = torch.tensor([0, 3], device=draw.device)
    return (rows, rows, *caches, slots, "auto", *[torch.ones((), device=draw.device)] * 2), {}


@fake_kernel(
    "_C_cache_ops::reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, "
    "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
    reference=_flash,
    source=_SOURCE,
    library=_LIBRARY,
    arguments=_flash_arguments,
    refuses={"blocks of key_cache and value_cache have to be equally far apart": _blocks_apart},
)
def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Writes rows of `key` and `value` `[T, N, D]` to caches `[blocks, block size, N, D]` where `slot_mapping` `[<= T]`
    says; below 0: nowhere. More rows than slots are padding."""
    strides = key_cache.stride(0), value_cache.stride(0)
    torch._check(
        strides[0] == strides[1],
        lambda: f"blocks of key_cache and value_cache have to be equally far apart, and are {strides}",
    )


def _reshape(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved_v: bool = False,
) -> None:
    _same_type(key, kv_cache_dtype)
    if interleaved_v:
        raise NotImplementedError("the reference does not know how interleaved values lie")
    wanted = slot_mapping >= 0
    at, block = slot_mapping[wanted], key_cache.shape[3]
    keys, values = (rows[: slot_mapping.shape[0]][wanted] for rows in (key, value))
    key_cache[at // block, :, :, at % block] = keys.unflatten(-1, (-1, key_cache.shape[4]))
    value_cache[at // block, :, :, at % block] = values


def _reshape_arguments(draw: Draw) -> Call:
    dtype, padded, together = draw.choice(*FLOATS), draw.flag(), draw.choice(2, 4)
    tokens, more, (heads, width, block, spare) = draw.size(), draw.size(), draw.sizes(4, least=1)
    rows = [_rows(draw, tokens + more, heads, width * together, dtype=dtype, padded=padded) for _ in range(2)]
    blocks = tokens + spare
    shapes = (blocks, heads, width, block, together), (blocks, heads, width * together, block)
    slots = draw.permutation(blocks * block)[:tokens]
    slots[-1:] = -1
    caches = [torch.zeros(shape, dtype=dtype, device=draw.device) for shape in shapes]
    return (*rows, *caches, slots, "auto", *[torch.ones((), device=draw.device) for _ in range(2)]), {}


@fake_kernel(
    "_C_cache_ops::reshape_and_cache(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, "
    "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, bool interleaved_v=False) -> ()",
    reference=_reshape,
    source=_SOURCE,
    library=_LIBRARY,
    arguments=_reshape_arguments,
)
def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved_v: bool = False,
) -> None:
    """The same to `key_cache` `[blocks, N, D / x, block size, x]` and `value_cache` `[blocks, N, D, block size]`. The
    kernel checks nothing; `interleaved_v` is newer than the version that could be read."""


KERNELS = (reshape_and_cache_flash, reshape_and_cache)
