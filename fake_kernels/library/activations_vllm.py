"""vLLM's activations, which write into an output that the caller made and return nothing.

As with sgl_kernel's, the kernels check nothing, and what would make them read or write the wrong memory is refused.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, FakeKernel, fake_kernel
from fake_kernels.library.activations_sgl import (
    REFUSES,
    Activation,
    check_gated,
    check_memory,
    draw_gated,
    gated,
    gelu,
    gelu_tanh,
    silu,
)

_SOURCE = "vllm-project/vllm csrc/activation_kernels.cu, csrc/torch_bindings.cpp"


@fake_kernel(
    "_C::silu_and_mul(Tensor! result, Tensor input) -> ()",
    reference=lambda result, input: gated(result, input, silu),
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=draw_gated,
    refuses=REFUSES,
)
def silu_and_mul(result: Tensor, input: Tensor) -> None:
    """SiLU of the first half of `input` `[..., 2 * d]`, times the second, into `result` `[..., d]`."""
    check_gated(result, input)


def _gated(name: str, activation: Activation, *, first: bool = True) -> FakeKernel:
    @fake_kernel(
        f"_C::{name}(Tensor! out, Tensor input) -> ()",
        reference=functools.partial(gated, activation=activation, first=first),
        source=_SOURCE,
        library="vllm._C_stable_libtorch",
        arguments=draw_gated,
        refuses=REFUSES,
    )
    def record(out: Tensor, input: Tensor) -> None:
        """The activation of one half of `input` `[..., 2 * d]`, times the other, into `out` `[..., d]`."""
        check_gated(out, input)

    return record


mul_and_silu = _gated("mul_and_silu", silu, first=False)
gelu_and_mul = _gated("gelu_and_mul", gelu)
gelu_tanh_and_mul = _gated("gelu_tanh_and_mul", gelu_tanh)


def _gelu_quick(wide: Tensor) -> Tensor:
    return wide * torch.sigmoid(1.702 * wide)


def _whole(out: Tensor, input: Tensor, activation: Activation) -> None:
    if not (out.is_contiguous() and input.is_contiguous()) or (out.dtype, out.shape) != (input.dtype, input.shape):
        raise RuntimeError("the memory is not what the kernel takes it for")
    out.copy_(activation(input.float()))


def _whole_arguments(draw: Draw) -> Call:
    dtype, count = draw.choice(*FLOATS), draw.choice(2, 1, 3)
    shape = draw.sizes(count, least=1)
    return tuple(draw.floats(*shape, dtype=dtype, layout="contiguous") for _ in range(2)), {}


def _other_sizes(draw: Draw) -> Call:
    return (torch.empty(4, 8, device=draw.device), draw.floats(4, 16, dtype=torch.float32, layout="contiguous")), {}


def _elementwise(name: str, activation: Activation) -> FakeKernel:
    @fake_kernel(
        f"_C::{name}(Tensor! out, Tensor input) -> ()",
        reference=functools.partial(_whole, activation=activation),
        source=_SOURCE,
        library="vllm._C_stable_libtorch",
        arguments=_whole_arguments,
        refuses={"has to be of the sizes of input": _other_sizes},
    )
    def record(out: Tensor, input: Tensor) -> None:
        """The activation of `input`, element by element, into `out`, which is like it. In half precision the kernels
        of `gelu_new` and `gelu_fast` round in between, and differ from the reference by a few units in the last place.
        """
        check_memory(out, input)
        torch._check(
            out.shape == input.shape,
            lambda: f"the output has to be of the sizes of input, {list(input.shape)}, not {list(out.shape)}",
        )

    return record


gelu_new = _elementwise("gelu_new", gelu_tanh)
gelu_fast = _elementwise("gelu_fast", gelu_tanh)
gelu_quick = _elementwise("gelu_quick", _gelu_quick)

KERNELS = (silu_and_mul, mul_and_silu, gelu_and_mul, gelu_tanh_and_mul, gelu_new, gelu_fast, gelu_quick)
