"""vLLM's rotary embedding of query and key, in place: it returns nothing, and declares what it writes.

torch makes a fake for it by itself, which accepts everything; this one refuses what the kernel refuses. sglang-kernel
has a copy with an older schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "vllm-project/vllm csrc/pos_encoding_kernels.cu; vllm 0.33.0's _C_stable_libtorch.abi3.so (schema)"


def turn(
    positions: Tensor, x: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool, offset: int, inverse: bool
) -> None:
    """Reference: turns the heads of `x` in place."""
    rotary = cos_sin_cache.shape[1]
    tokens = positions.shape
    if rotary + offset > head_size or x.shape[: len(tokens)] != tokens or math.prod(x.shape[len(tokens) :]) % head_size:
        raise ValueError(f"positions {tuple(tokens)}, {tuple(x.shape)} in heads of {head_size}, {rotary} turned")
    cos, sin = cos_sin_cache[positions].float().unsqueeze(-2).chunk(2, -1)
    heads = x.unflatten(-1, (-1, head_size)) if x.dim() == len(tokens) + 1 else x
    part = heads[..., offset : offset + rotary]
    first, second = part.float().chunk(2, -1) if is_neox else (part[..., 0::2].float(), part[..., 1::2].float())
    sin = -sin if inverse else sin
    turned = first * cos - second * sin, second * cos + first * sin
    part.copy_(torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2))


def _rotary(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    if positions.dim() not in (1, 2):
        raise ValueError(f"positions {tuple(positions.shape)}")
    if key is not None and query.numel() % max(key.numel(), 1):
        raise ValueError("the query's heads are no multiple of the key's")
    for x in (query, key):
        if x is not None:
            turn(positions, x, head_size, cos_sin_cache, is_neox, rope_dim_offset, inverse)


def rotary_arguments(draw: Draw, mixed: bool) -> list[object]:
    """Draws what vLLM's and sglang's have in common; `mixed`: the cache may have another dtype than the query."""
    dtype, dims, flat, without_key = (
        draw.choice(*FLOATS),
        draw.choice(1, 2),
        draw.flag(),
        draw.choice(False, False, True),
    )
    cache_dtype, is_neox = draw.choice(dtype, torch.float32 if mixed else dtype), draw.flag()
    head_size, group, padding = draw.choice(4, 8), draw.choice(1, 2), draw.flag()
    rotary = draw.choice(head_size, head_size // 2)
    tokens, heads, most = draw.sizes(dims, least=1), draw.size(least=1), draw.size(least=1)

    def rows(count: int) -> Tensor:
        wide = draw.floats(*tokens, (count + padding) * head_size, dtype=dtype, layout="contiguous")
        part = wide[..., : count * head_size]
        return part if flat else part.unflatten(-1, (count, head_size))

    positions = draw.integers(*tokens, low=0, high=most, layout="contiguous")
    key = None if without_key else rows(heads)
    cache = draw.floats(most, rotary, dtype=cache_dtype, layout="contiguous")
    return [positions, rows(heads * group), key, head_size, cache, is_neox]


def _arguments(draw: Draw) -> Call:
    inverse, (*args, is_neox) = draw.flag(), rotary_arguments(draw, True)
    cache, head_size = args[4], args[3]
    assert isinstance(cache, Tensor)
    assert isinstance(head_size, int)
    offset = head_size - int(cache.shape[1])
    return (*args, is_neox, offset, inverse) if offset or inverse else (*args, is_neox), {}


def bad(place: int, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Draw], Call]:
    """Draws a call with one tensor of a wrong shape."""

    def call(draw: Draw) -> Call:
        shapes = [(3,), (3, 4, 8), (3, 2, 8), (5, 8)]
        shapes[place] = shape
        positions, query, key, cache = (torch.zeros(each, device=draw.device) for each in shapes)
        return (positions.long(), query, key, 8, cache, True), {}

    return call


REFUSES = {
    "positions has to be": bad(0, 1, 1, 3),
    "as many tokens as positions": bad(1, 4, 4, 8),
    "multiple of head_size": bad(1, 3, 12),
    "multiple of the key's": bad(2, 3, 3, 8),
}


def _heads(name: str, x: Tensor, positions: Tensor, head_size: int) -> int:
    for size, wanted in zip(x.shape, positions.shape, strict=False):
        torch._check(
            size == wanted,
            lambda: f"{name} has to have as many tokens as positions, {tuple(positions.shape)}: {tuple(x.shape)}",
        )
    hidden = math.prod(x.shape[positions.dim() :])
    torch._check(
        hidden % head_size == 0,
        lambda: f"{name} has to have a multiple of head_size, {head_size}, per token, and has {hidden}",
    )
    return hidden // head_size


def check_rotary(positions: Tensor, query: Tensor, key: Tensor | None, head_size: int) -> None:
    """The fakes' checks that vLLM's and sglang's kernels have in common."""
    dims, heads = positions.dim(), []
    torch._check(
        dims in (1, 2), lambda: f"positions has to be [tokens] or [batch, sequence], and is {tuple(positions.shape)}"
    )
    for name, x in (("query", query), ("key", key)):
        if x is not None:
            heads.append(_heads(name, x, positions, head_size))
    torch._check(
        heads[0] % heads[-1] == 0, lambda: f"the query's heads have to be a multiple of the key's, and are {heads}"
    )


@fake_kernel(
    "_C::rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    reference=_rotary,
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=_arguments,
    refuses=REFUSES | {"exceed head_size": bad(3, 5, 16)},
)
def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Turns `query` and `key` in place by the cosines and sines of their positions.

    `positions` int64 `[T]` or `[B, S]`; `query` and `key` `[*positions.shape, heads * head_size]`, or with the heads
    apart, each token's contiguous; `cos_sin_cache` `[most positions, R]`, cosines, then sines; R elements of a head are
    turned from `rope_dim_offset` on: halves if `is_neox`, else neighbours; the other way round if `inverse`.
    """
    check_rotary(positions, query, key, head_size)
    turned = cos_sin_cache.shape[1]
    torch._check(
        turned + rope_dim_offset <= head_size,
        lambda: f"{turned} turned from {rope_dim_offset} on exceed head_size, {head_size}",
    )


KERNELS = (rotary_embedding,)
