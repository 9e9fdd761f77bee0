"""torch_musa's fused rotary embedding, which it adds to torch's own namespace: a forward and its backward.

`freq_cis` has angles, not cosines and sines: `[sequence, R]`, and the first `R` of the last dimension of `input` are
turned by them; the rest passes through. The output is a fresh contiguous tensor whatever the layout of the input, and
the kernel looks at dtypes only where there is something to compute: an empty input comes back as an empty output.

What mudnn does behind `rotary_interleaved` is not in the open source; its name and Megatron's use of it say: the
partners are elements `2i` and `2i + 1`, instead of `i` and `i + R / 2`. Nor is any check of shapes that mudnn makes, so
the fakes make none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "MooreThreads/torch_musa torch_musa/csrc/aten/ops/RoPE.cpp (Rope, RopeBackward)"


def _cos_sin(freq_cis: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    angles = freq_cis.float()[None, :, None] if batch_first else freq_cis.float()[:, None, None]
    return angles.cos(), angles.sin()


def _gather(x: Tensor, pairs: bool) -> Tensor:
    """The last dimension with what stands at even places first."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1) if pairs else x


def _scatter(x: Tensor, pairs: bool) -> Tensor:
    """Undoes `_gather`."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2) if pairs else x


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    first, second = _gather(x, interleaved).chunk(2, -1)
    return _scatter(torch.cat((-second, first), -1), interleaved)


def _refuse(x: Tensor) -> None:
    if x.numel() and x.dtype not in FLOATS:
        raise TypeError(f"rotary embedding of {x.dtype}")


def _forward(
    input: Tensor, freq_cis: Tensor, rotary_interleaved: bool, batch_first: bool, multi_latent_attention: bool = False
) -> Tensor:
    _refuse(input)
    cos, sin = _cos_sin(freq_cis, batch_first)
    turned, passed = input.float().split([cos.shape[-1], input.shape[-1] - cos.shape[-1]], -1)
    turned = _gather(turned, multi_latent_attention)
    turned = turned * cos + _quarter_turn(turned, rotary_interleaved) * sin
    return torch.cat((turned, passed), -1).to(input.dtype).contiguous()


def _backward(
    grad: Tensor, freq_cis: Tensor, rotary_interleaved: bool, batch_first: bool, multi_latent_attention: bool = False
) -> Tensor:
    _refuse(grad)
    cos, sin = _cos_sin(freq_cis, batch_first)
    turned, passed = grad.float().split([cos.shape[-1], grad.shape[-1] - cos.shape[-1]], -1)
    turned = turned * cos - _quarter_turn(turned * sin, rotary_interleaved)
    return torch.cat((_scatter(turned, multi_latent_attention), passed), -1).to(grad.dtype).contiguous()


def _arguments(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    interleaved, batch_first, latent = draw.flag(), draw.flag(), draw.flag()
    angles_dtype, given = draw.choice(torch.float32, dtype), draw.flag()
    batch, sequence, heads = draw.sizes(3)
    rotated = draw.size(least=1, times=2)
    input = draw.floats(
        *((batch, sequence) if batch_first else (sequence, batch)), heads, rotated + draw.size(times=2), dtype=dtype
    )
    args = (input, draw.floats(sequence, rotated, dtype=angles_dtype), interleaved, batch_first)
    return (*args, latent) if given or latent else args, {}


def _of_integers(draw: Draw) -> Call:
    input = draw.integers(3, 2, 2, 4, low=0, high=9)
    return (input, draw.floats(3, 4, dtype=torch.float32), False, False), {}


def _like(name: str, given: Tensor) -> Tensor:
    if given.dtype not in FLOATS:  # the kernel has returned by then if there is nothing to compute
        torch._check(given.numel() == 0, lambda: f"{name} has to be float32, float16 or bfloat16, and is {given.dtype}")
    return torch.empty_like(given, memory_format=torch.contiguous_format)


@fake_kernel(
    "aten::_fused_rope_forward(Tensor input, Tensor freq_cis, bool rotary_interleaved, bool batch_first, "
    "bool multi_latent_attention=False) -> Tensor",
    reference=_forward,
    source=_SOURCE,
    library="torch_musa",
    arguments=_arguments,
    refuses={"input has to be float32": _of_integers},
)
def fused_rope_forward(
    input: Tensor, freq_cis: Tensor, rotary_interleaved: bool, batch_first: bool, multi_latent_attention: bool = False
) -> Tensor:
    """`t * cos(freq_cis) + quarter_turn(t) * sin(freq_cis)` on the first `R` of the last dimension.

    `input` is `[S, B, H, D]`, or `[B, S, H, D]` if `batch_first`, float32, float16 or bfloat16; `freq_cis` `[S, R]`, R
    even and at most D. With `multi_latent_attention` the even elements are gathered in front of the odd ones first
    (and stay there). Returns `input`'s shape and dtype, contiguous.
    """
    return _like("input", input)


@fake_kernel(
    "aten::_fused_rope_backward(Tensor grad, Tensor freq_cis, bool rotary_interleaved, bool batch_first, "
    "bool multi_latent_attention=False) -> Tensor",
    reference=_backward,
    source=_SOURCE,
    library="torch_musa",
    arguments=_arguments,
    refuses={"grad has to be float32": _of_integers},
)
def fused_rope_backward(
    grad: Tensor, freq_cis: Tensor, rotary_interleaved: bool, batch_first: bool, multi_latent_attention: bool = False
) -> Tensor:
    """The forward's transpose: `grad` as its output, and the gradient of its input, contiguous, of `grad`'s dtype."""
    return _like("grad", grad)


KERNELS = (fused_rope_forward, fused_rope_backward)
