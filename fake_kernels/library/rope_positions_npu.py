"""Ascend's rotary embeddings that look cosines and sines up by position: `npu_mrope`, and `atb::_npu_rotary_embedding`.

The ATB one, read in op-plugin, keeps what it makes of the first `cos_sin_cache` it is ever given, for the rest of the
process: another call with another cache silently turns by the first one's angles. The reference does not imitate that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.rope_npu import quarter_turn

_LAYOUTS = ("contiguous", "strided", "offset")


def _turned(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, half: bool) -> Tensor:
    """`x` `[T, N * head_size]`, the first `2 * cos.shape[-1]` of each head turned."""
    width = 2 * cos.shape[-1]
    turned, passed = x.float().unflatten(-1, (-1, head_size)).split([width, head_size - width], -1)
    cos, sin = (each.repeat(1, 2) if half else each.repeat_interleave(2, -1) for each in (cos, sin))
    turned = turned * cos[:, None] + quarter_turn(turned, "half" if half else "interleave") * sin[:, None]
    return torch.cat((turned, passed), -1).flatten(-2)


def _mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    if rotary_mode not in (None, "half", "interleave"):
        raise ValueError(f"a mode called {rotary_mode!r}")
    if cache_mode not in (None, "default"):
        raise NotImplementedError("the reference does not know how an interleaved cache is put together")
    cos, sin = cos_sin_cache[positions].float().chunk(2, -1)
    if positions.dim() == 2:
        sections = list(mrope_section or ())
        cos, sin = (torch.cat([part[i] for i, part in enumerate(each.split(sections, -1))], -1) for each in (cos, sin))
    results = [_turned(x, cos, sin, head_size, rotary_mode != "interleave").to(x.dtype) for x in (query, key)]
    return results[0].contiguous(), results[1].contiguous()


def _mrope_arguments(draw: Draw) -> Call:
    dtype, sections = draw.choice(*FLOATS), draw.choice(None, [1, 1, 2], [2, 1, 1])
    mode, head_size = draw.choice(None, "half", "interleave"), draw.choice(8, 12)
    layouts = [draw.choice(*_LAYOUTS) for _ in range(2)]
    tokens, heads, heads_of_keys, most = draw.sizes(4, least=1)
    shape = (tokens,) if sections is None else (3, tokens)
    query, key = (
        draw.floats(tokens, count * head_size, dtype=dtype, layout=layout)
        for count, layout in zip((heads, heads_of_keys), layouts, strict=True)
    )
    args = (draw.integers(*shape, low=0, high=most), query, key, draw.floats(most, 8, dtype=dtype), head_size)
    return args, ({} if mode is None else {"rotary_mode": mode}) | ({"mrope_section": sections} if sections else {})


def _bad_mode(draw: Draw) -> Call:
    x = draw.floats(2, 8, dtype=torch.float16)
    return (torch.zeros(2, dtype=torch.int64, device=draw.device), x, x, x, 8), {"rotary_mode": "quarter"}


@fake_kernel(
    "npu::npu_mrope(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, int head_size, *, "
    'int[]? mrope_section=None, str? rotary_mode="half", str? cache_mode="default") -> (Tensor, Tensor)',
    reference=_mrope,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_mrope); "
    "CANN posembedding/rope_with_sin_cos_cache/docs/aclnnRopeWithSinCosCache.md",
    library="torch_npu",
    arguments=_mrope_arguments,
    refuses={"rotary_mode should be half or interleave": _bad_mode},
)
def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    """Query and key turned by the cosines and sines of their positions.

    `positions` int64 `[T]`, or `[3, T]` with the lengths of the three sections; `query` and `key` `[T, N * head_size]`;
    `cos_sin_cache` `[most positions, R]`. Returns tensors like both, made by `empty_like`, which keeps dense strides in
    recent torch_npu and did not before: for permuted inputs, as they are allocated here, the former.
    """
    torch._check(
        rotary_mode in (None, "half", "interleave"),
        lambda: f"rotary_mode should be half or interleave, not {rotary_mode!r}",
    )
    return torch.empty_like(query), torch.empty_like(key)


def _rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox_style: bool
) -> None:
    cos, sin = cos_sin_cache[positions.flatten()].float().chunk(2, -1)
    for x in (query, key):
        rows = x.reshape(cos.shape[0], -1)
        x.copy_(_turned(rows, cos, sin, head_size, is_neox_style).reshape(x.shape))


def _rotary_arguments(draw: Draw) -> Call:
    dtype, neox, head_size = draw.choice(*HALVES), draw.flag(), draw.choice(4, 8)
    tokens, heads, heads_of_keys, most = draw.sizes(4, least=1)
    query, key = (
        draw.floats(tokens, count * head_size, dtype=dtype, layout="contiguous") for count in (heads, heads_of_keys)
    )
    positions = draw.integers(tokens, low=0, high=most)
    return (positions, query, key, head_size, draw.floats(most, head_size, dtype=dtype), neox), {}


@fake_kernel(
    "atb::_npu_rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!) key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox_style) -> ()",
    reference=_rotary_embedding,
    source="Ascend/op-plugin op_plugin/ops/atb/RopeAtb.cpp",
    library="torch_npu",
    arguments=_rotary_arguments,
)
def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox_style: bool
) -> None:
    """Turns `query` and `key` `[T, N * head_size]` in place by `cos_sin_cache` `[most positions, head_size]`: by halves
    if `is_neox_style`, else neighbours. op-plugin checks nothing."""


KERNELS = (mrope, rotary_embedding)
