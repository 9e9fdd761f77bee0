"""sgl_kernel's gated activations, which write into an output that the caller made and return nothing.

The kernels check nothing: they read and write memory as if it were contiguous, in the dtype of `input`. What would make
them read or write the wrong memory without a word is refused here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, FakeKernel, fake_kernel

Activation = Callable[[Tensor], Tensor]
silu: Activation = torch.nn.functional.silu
gelu: Activation = torch.nn.functional.gelu
gelu_tanh: Activation = functools.partial(torch.nn.functional.gelu, approximate="tanh")


def gated(out: Tensor, input: Tensor, activation: Activation, *, first: bool = True) -> None:
    """The reference: the activation is rounded to the dtype of `input` before it is multiplied, as in the kernels."""
    if not (out.is_contiguous() and input.is_contiguous()) or out.dtype != input.dtype:
        raise RuntimeError("the memory is not what the kernel takes it for")
    if input.size(-1) != 2 * out.size(-1) or out.numel() * 2 != input.numel():
        raise RuntimeError(f"{tuple(out.shape)} is not half of {tuple(input.shape)}")
    left, right = input.float().chunk(2, -1)
    activated, other = (left, right) if first else (right, left)
    out.copy_(activation(activated).to(input.dtype).float() * other)


def check_gated(out: Tensor, input: Tensor) -> None:
    """What `gated` demands of its arguments: `out` `[..., d]`, `input` `[..., 2 * d]`."""
    check_memory(out, input)
    torch._check(
        (*out.shape[:-1], 2 * out.shape[-1]) == tuple(input.shape),
        lambda: (
            f"the output has to be half of input, {list(input.shape)}, in the last dimension, not {list(out.shape)}"
        ),
    )


def check_memory(out: Tensor, input: Tensor) -> None:
    """Both contiguous and of one floating dtype."""
    torch._check(
        input.dtype in FLOATS and out.dtype == input.dtype,
        lambda: f"the output and input have to be of one floating dtype, not {out.dtype} and {input.dtype}",
    )
    torch._check(
        out.is_contiguous() and input.is_contiguous(),
        lambda: f"the output and input have to be contiguous, not of strides {out.stride()} and {input.stride()}",
    )


def draw_gated(draw: Draw, *, columns: int = 1) -> Call:
    """An output and an input of twice `columns` times some number of columns."""
    dtype, count = draw.choice(*FLOATS), draw.choice(1, 2, 0)
    layouts = [draw.choice("contiguous", "offset") for _ in range(2)]
    rows, wide = draw.sizes(count), draw.size(least=1, times=columns)
    return (
        draw.floats(*rows, wide, dtype=dtype, layout=layouts[0]),
        draw.floats(*rows, 2 * wide, dtype=dtype, layout=layouts[1]),
    ), {}


def _permuted(draw: Draw) -> Call:
    return (torch.empty(16, 8, device=draw.device), draw.floats(16, 16, dtype=torch.float32, layout="transposed")), {}


def _as_wide(draw: Draw) -> Call:
    return (torch.empty(4, 16, device=draw.device), draw.floats(4, 16, dtype=torch.float32, layout="contiguous")), {}


def _another_dtype(draw: Draw) -> Call:
    return (torch.empty(4, 8, device=draw.device), draw.floats(4, 16, dtype=torch.float16, layout="contiguous")), {}


REFUSES: dict[str, Callable[[Draw], Call]] = {
    "have to be contiguous": _permuted,
    "has to be half of input": _as_wide,
    "of one floating dtype": _another_dtype,
}


def _record(name: str, activation: Activation) -> FakeKernel:
    @fake_kernel(
        f"sgl_kernel::{name}(Tensor! out, Tensor input) -> ()",
        reference=functools.partial(gated, activation=activation),
        source="sgl-project/sglang sgl-kernel/csrc/elementwise/activation.cu; schema: sglang-kernel 0.4.10",
        library="sgl_kernel",
        arguments=functools.partial(draw_gated, columns=8),
        refuses=REFUSES,
    )
    def record(out: Tensor, input: Tensor) -> None:
        """The activation of the first half of `input` `[..., 2 * d]`, times the second, into `out` `[..., d]`."""
        check_gated(out, input)

    return record


silu_and_mul = _record("silu_and_mul", silu)
gelu_and_mul = _record("gelu_and_mul", gelu)
gelu_tanh_and_mul = _record("gelu_tanh_and_mul", gelu_tanh)

KERNELS = (silu_and_mul, gelu_and_mul, gelu_tanh_and_mul)
