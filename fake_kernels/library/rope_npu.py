"""Ascend's rotary embeddings: one tensor at a time, or query and key together.

`npu_apply_rotary_pos_emb` is the one to know: its schema promises two new tensors, and its kernel turns query and key
in place and returns those two. No fake kernel can say that; the record has it as `writes` and `returns_arguments`. All
others return fresh contiguous tensors, also for permuted inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_OPAPI = "Ascend/op-plugin op_plugin/ops/opapi/"
_DENSE = ("contiguous", "transposed", "offset")
_DOCUMENT = "CANN aclnnApplyRotaryPosEmbV2, aclnnRotaryPositionEmbedding and aclnnInterleaveRope"


def quarter_turn(x: Tensor, mode: str) -> Tensor:
    """Reference: each pair of elements turned by 90 degrees: `half` pairs `i` with `i + D / 2`, `interleave` `2i` with
    `2i + 1`, `quarter` does `half` for either half of the last dimension."""
    if mode == "quarter":
        return torch.cat([quarter_turn(each, "half") for each in x.chunk(2, -1)], -1)
    if mode == "interleave":
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    first, second = x.tensor_split(2, -1)
    return torch.cat((-second, first), -1)


def _turned_back(x: Tensor, mode: str) -> Tensor:
    return -quarter_turn(x, mode)


def _one_of(mode: str, *modes: str) -> None:
    if mode not in modes:
        raise ValueError(f"a mode called {mode!r}")


def _rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    _one_of(rotary_mode, "half", "interleave")
    x, cos, sin = (each.to(input.dtype).float() for each in (input, r1, r2))
    turned = quarter_turn(x, rotary_mode) if rotate is None else x @ rotate.float()
    return (x * cos + turned * sin).to(input.dtype).contiguous()


def _rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    _one_of(rotary_mode, "half", "interleave")
    g, x, cos, sin = (each.to(input.dtype).float() for each in (grad, input, r1, r2))
    found = (
        g * cos + _turned_back(g * sin, rotary_mode),
        (g * x).sum_to_size(r1.shape),
        (g * quarter_turn(x, rotary_mode)).sum_to_size(r2.shape),
    )
    dx, dr1, dr2 = (each.to(input.dtype).contiguous() for each in found)
    return dx, dr1, dr2


def _rotary_arguments(draw: Draw) -> tuple[Tensor, Tensor, Tensor, str]:
    dtype, mode = draw.choice(*FLOATS), draw.choice("half", "interleave")
    angles, shared = draw.choice(dtype, torch.float32), draw.choice("1S1D", "11SD", "BSND")
    a, b, c, d = *draw.sizes(3), draw.size(least=1, times=2)
    shape = {"1S1D": (1, b, 1, d), "11SD": (1, 1, c, d), "BSND": (a, b, c, d)}[shared]
    x, cos = draw.floats(a, b, c, d, dtype=dtype), draw.floats(*shape, dtype=angles)
    return x, cos, draw.floats(*shape, dtype=angles), mode


def _mul_arguments(draw: Draw) -> Call:
    given = draw.flag()
    *tensors, mode = _rotary_arguments(draw)
    return (*tensors, mode) if given or mode != "half" else tuple(tensors), {}


def _mul_backward_arguments(draw: Draw) -> Call:
    x, cos, sin, mode = _rotary_arguments(draw)
    return (draw.floats(*x.shape, dtype=x.dtype), x, cos, sin, mode), {}


def _bad_mode(draw: Draw) -> Call:
    x = draw.floats(1, 2, 3, 4, dtype=torch.float16)
    return (x, x, x, "quarter"), {}


def _bad_mode_backward(draw: Draw) -> Call:
    (x, *_), _ = _bad_mode(draw)
    return (x, x, x, x, "quarter"), {}


@fake_kernel(
    'npu::npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
    reference=_rotary_mul,
    source=f"{_OPAPI}RotaryMulKernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_mul_arguments,
    refuses={"rotary_mode should be half or interleave": _bad_mode},
)
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """`input * r1 + quarter_turn(input) * r2`.

    `input` has four dimensions, `[B, N, S, D]` in any order of the first three; `r1` (cosine) and `r2` (sine) broadcast
    to it and are cast to its dtype. Returns `input`'s shape and dtype, contiguous. `rotate` is a matrix to multiply
    with instead of the turn; its kernel could not be read, and it does not change the shape.
    """
    torch._check(
        rotary_mode in ("half", "interleave"), lambda: f"rotary_mode should be half or interleave, not {rotary_mode!r}"
    )
    return input.new_empty(input.shape)


@fake_kernel(
    "npu::npu_rotary_mul_backward(Tensor grad, Tensor input, Tensor r1, Tensor r2, "
    'str rotary_mode="half") -> (Tensor, Tensor, Tensor)',
    reference=_rotary_mul_backward,
    source=f"{_OPAPI}RotaryMulBackwardKernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_mul_backward_arguments,
    refuses={"rotary_mode should be half or interleave": _bad_mode_backward},
)
def rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `input` (of `grad`'s shape), `r1` and `r2` (of theirs), contiguous, all three of `input`'s dtype."""
    torch._check(
        rotary_mode in ("half", "interleave"), lambda: f"rotary_mode should be half or interleave, not {rotary_mode!r}"
    )
    return input.new_empty(grad.shape), input.new_empty(r1.shape), input.new_empty(r2.shape)


def _interleave(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1).float()
    return (halves * cos.float() + quarter_turn(halves, "half") * sin.float()).to(x.dtype).contiguous()


def _interleave_arguments(draw: Draw) -> Call:
    dtype, per_token = draw.choice(torch.float16, torch.bfloat16), draw.flag()
    b, n, s, d = *draw.sizes(3), draw.size(least=1, times=2)
    shape = (b, 1, s if per_token else 1, d)
    x, cos = draw.floats(b, n, s, d, dtype=dtype), draw.floats(*shape, dtype=dtype)
    return (x, cos, draw.floats(*shape, dtype=dtype)), {}


@fake_kernel(
    "npu::npu_interleave_rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    reference=_interleave,
    source=f"Ascend/op-plugin op_plugin/ops/opapi (npu_interleave_rope); {_DOCUMENT}",
    library="torch_npu",
    arguments=_interleave_arguments,
)
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The even elements gathered in front of the odd ones, then turned by halves.

    `x` is `[B, N, S, D]`, `cos` and `sin` `[B, 1, S, D]` or `[B, 1, 1, D]`, all float16 or bfloat16. Returns `x`'s
    shape and dtype, contiguous. op-plugin checks nothing; CANN's kernel wants `D` to be 64 on most devices.
    """
    return x.new_empty(x.shape)


def _apply(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    _one_of(rotary_mode, "half", "quarter", "interleave")
    for x in (query, key):
        turned = x.float() * cos.float() + quarter_turn(x.float(), rotary_mode) * sin.float()
        x.copy_(turned)
    return query, key


def _apply_arguments(draw: Draw) -> Call:
    dtype, layout = draw.choice(*FLOATS), draw.choice("BSND", "TND", "SBND", "BNSD")
    mode, given = draw.choice("half", "quarter", "interleave"), draw.flag()
    b, s, n, m, d = *draw.sizes(4), draw.size(least=1, times=4)
    sizes = {"B": b, "S": s, "T": s, "D": d}

    def shape(heads: int) -> list[int]:
        return [sizes.get(name, heads) for name in layout]

    query, key = (draw.floats(*shape(heads), dtype=dtype, layout=draw.choice(*_DENSE)) for heads in (n, m))
    cos, sin = (draw.floats(*shape(1), dtype=dtype) for _ in range(2))
    plain = layout == "BSND" and mode == "half" and not given
    return (query, key, cos, sin, *(() if plain else (layout, mode))), {}


def _apply_bad_mode(draw: Draw) -> Call:
    x = draw.floats(1, 2, 3, 4, dtype=torch.float16)
    return (x, x, x, x, "BSND", "thirds"), {}


@fake_kernel(
    "npu::npu_apply_rotary_pos_emb(Tensor query, Tensor key, Tensor cos, Tensor sin, "
    'str layout="BSND", str rotary_mode="half") -> (Tensor, Tensor)',
    reference=_apply,
    source=f"{_OPAPI}ApplyRotaryPosEmbNpuOpApi.cpp; {_DOCUMENT}",
    library="torch_npu",
    arguments=_apply_arguments,
    refuses={"rotary_mode should be half, quarter or interleave": _apply_bad_mode},
    writes=("query", "key"),
    returns_arguments={0: "query", 1: "key"},
)
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Turns `query` and `key` in place, and returns them: neither is in the schema.

    `[B, S, N, D]` in the order that `layout` says (BSND, SBND, BNSD, TND; anything else is read as BSND); `cos` and
    `sin` have one head. `quarter` turns either half of the last dimension by halves.
    """
    torch._check(
        rotary_mode in ("half", "quarter", "interleave"),
        lambda: f"rotary_mode should be half, quarter or interleave, not {rotary_mode!r}",
    )
    return query, key


KERNELS = (rotary_mul, rotary_mul_backward, interleave_rope, apply_rotary_pos_emb)
