"""sglang-kernel's copy of vLLM's rotary embedding, in place, with the schema that vLLM had before."""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.rope_vllm import REFUSES, bad, check_rotary, rotary_arguments, turn

_CALL = bad(0, 3)


def _rotary(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> None:
    if positions.dim() not in (1, 2):
        raise ValueError(f"positions {tuple(positions.shape)}")
    if key is not None and query.numel() % max(key.numel(), 1):
        raise ValueError("the query's heads are no multiple of the key's")
    for x in (query, key):
        if x is not None:
            if x.dtype != cos_sin_cache.dtype:
                raise TypeError(f"{x.dtype} turned by {cos_sin_cache.dtype}")
            turn(positions, x, head_size, cos_sin_cache, is_neox, 0, False)


def _arguments(draw: Draw) -> Call:
    return tuple(rotary_arguments(draw, False)), {}


def _mixed(draw: Draw) -> Call:
    (positions, query, key, size, cache, is_neox), _ = _CALL(draw)
    return (positions, query, key, size, cache.half(), is_neox), {}


@fake_kernel(
    "sgl_kernel::rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox) -> ()",
    reference=_rotary,
    source="sgl-project/sglang sgl-kernel/csrc/elementwise/pos_enc.cu; sglang-kernel 0.4.10's common_ops (schema)",
    library="sgl_kernel",
    arguments=_arguments,
    refuses=REFUSES | {"of one dtype": _mixed},
)
def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> None:
    """Turns `query` and `key` in place, as vLLM's does without an offset; shapes as there, but `cos_sin_cache` has the
    query's dtype."""
    check_rotary(positions, query, key, head_size)
    torch._check(
        query.dtype == cos_sin_cache.dtype and (key is None or key.dtype == query.dtype),
        lambda: f"query, key and cos_sin_cache have to be of one dtype, and cos_sin_cache is {cos_sin_cache.dtype}",
    )


KERNELS = (rotary_embedding,)
