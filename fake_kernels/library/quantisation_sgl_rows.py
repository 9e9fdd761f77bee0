"""sgl_kernel's fp8 quantisation with one scale per row (token), and with one for a whole tensor.

The wheels declare what is written (`Tensor! output_q`); the build for MUSA (which has the first of the two) and CUDA
builds of 2025 register the same operators without the marks (`UNDECLARED`): a fake kernel would make those calls dead
code.

Source: sgl-project/sglang sgl-kernel/csrc/gemm/per_token_quant_fp8.cu, per_tensor_quant_fp8.cu, and
sgl-kernel/csrc/common_extension.cc. `sgl_per_tensor_quant_fp8` is in sgl-kernel 0.3.21 and no longer in
sglang-kernel 0.4.10.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, FakeKernel
from fake_kernels.library.rounding import to_8bit

LIBRARY = "sgl_kernel"
_SOURCE = "sgl-project/sglang sgl-kernel/csrc/gemm/per_{}_quant_fp8.cu"
_FP8 = torch.float8_e4m3fn


def _check(input: Tensor, output_q: Tensor, output_s: Tensor, scales: int) -> None:
    for name, tensor in (("input", input), ("output_q", output_q), ("output_s", output_s)):
        torch._check(
            tensor.is_contiguous(),
            lambda name=name, tensor=tensor: f"{name} must be contiguous; its strides are {list(tensor.stride())}",
        )
    torch._check(input.dtype in FLOATS, lambda: f"input has to be float32, float16 or bfloat16, not {input.dtype}")
    # the kernel takes the next three for granted, and writes beside the tensors where they do not hold
    torch._check(output_q.dtype == _FP8, lambda: f"output_q has to be float8_e4m3fn, not {output_q.dtype}")
    torch._check(
        output_q.shape == input.shape,
        lambda: f"output_q has to have the shape of input, {list(input.shape)}, not {list(output_q.shape)}",
    )
    torch._check(
        output_s.dtype == torch.float32 and output_s.numel() == scales,
        lambda: f"output_s has to be {scales} float32 elements, not {output_s.dtype} {list(output_s.shape)}",
    )


def _expect(input: Tensor, output_q: Tensor, output_s: Tensor, scales: int) -> None:
    if not (input.is_contiguous() and output_q.is_contiguous() and output_s.is_contiguous()):
        raise ValueError("all three are contiguous")
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{input.dtype} is not quantised")
    if (output_q.dtype, output_s.dtype) != (torch.float8_e4m3fn, torch.float32):
        raise TypeError(f"quantised to {output_q.dtype} and {output_s.dtype}")
    if output_q.shape != input.shape or output_s.numel() != scales:
        raise ValueError(f"{list(input.shape)} to {list(output_q.shape)} and {list(output_s.shape)}")


def _per_token(input: Tensor, output_q: Tensor, output_s: Tensor) -> None:
    if input.dim() != 2 or input.shape[1] % 4:
        raise ValueError(f"{list(input.shape)} is no matrix with rows of a multiple of 4")
    _expect(input, output_q, output_s, len(input))
    values = input.float()
    largest = torch.cat([values.abs(), values.new_zeros(len(values), 1)], -1).amax(-1)
    scales = largest / 448.0
    output_s.copy_(scales.view(output_s.shape))
    factors = torch.where(scales == 0, 0.0, 1.0 / scales)
    output_q.copy_(to_8bit(values * factors.unsqueeze(-1), output_q.dtype))


def _per_token_arguments(draw: Draw) -> Call:
    dtype, flat = draw.choice(*FLOATS), draw.flag()
    rows, columns = draw.size(), draw.size(times=4)
    x = draw.floats(rows, columns, dtype=dtype, layout="contiguous")
    q = draw.floats(rows, columns, dtype=_FP8, layout="contiguous")
    return (x, q, torch.zeros((rows,) if flat else (rows, 1), device=draw.device)), {}


def _per_token_call(x: Tensor, q: Tensor, s: Tensor) -> Callable[[Draw], Call]:
    return lambda draw: (tuple(draw.there(tensor) for tensor in (x, q, s)), {})


def sgl_per_token_quant_fp8(input: Tensor, output_q: Tensor, output_s: Tensor) -> None:
    """Writes `output_q` and `output_s`; returns nothing. `scale = max |row| / 448`, `output_q = input / scale`.

    Args:
        input: `[T, K]` float32, float16 or bfloat16, contiguous, K a multiple of 4.
        output_q: `[T, K]` float8_e4m3fn, contiguous.
        output_s: T elements of float32, contiguous; sglang makes it `[T, 1]`.

    A row of zeros gets the scale 0. The kernel for many tokens then writes zeros, as the reference does, and the one
    for few writes 448, which times the scale is the same.
    """
    torch._check(input.dim() == 2, lambda: f"input has to have 2 dimensions, not {input.dim()}")
    torch._check(
        input.shape[1] % 4 == 0, lambda: f"a row of input has to be a multiple of 4 elements, not {input.shape[1]}"
    )
    _check(input, output_q, output_s, input.shape[0])


def _per_tensor(input: Tensor, output_q: Tensor, output_s: Tensor, is_static: bool) -> None:
    _expect(input, output_q, output_s, 1)
    values = input.float()
    if not is_static:  # the kernel takes the maximum with what is there
        largest = torch.cat([values.abs().reshape(-1), values.new_zeros(1)]).amax()
        output_s.copy_(torch.maximum(output_s, (largest / 448.0).view(output_s.shape)))
    output_q.copy_(to_8bit(values * (1.0 / output_s.view(())), output_q.dtype))


def _per_tensor_arguments(draw: Draw) -> Call:
    dtype, is_static, flat = draw.choice(*FLOATS), draw.flag(), draw.flag()
    shape = draw.shape(1, 3)
    x = draw.floats(*shape, dtype=dtype, layout="contiguous")
    s = torch.full((1,) if flat else (), 0.01 if is_static else 0.0, device=draw.device)
    return (x, draw.floats(*shape, dtype=_FP8, layout="contiguous"), s, is_static), {}


def _per_tensor_call(x: Tensor, q: Tensor, s: Tensor) -> Callable[[Draw], Call]:
    return lambda draw: ((*(draw.there(tensor) for tensor in (x, q, s)), False), {})


def sgl_per_tensor_quant_fp8(input: Tensor, output_q: Tensor, output_s: Tensor, is_static: bool) -> None:
    """Writes `output_q`, and `output_s` too if not `is_static`; returns nothing. `output_q = input / output_s`.

    Args:
        input: float32, float16 or bfloat16, contiguous.
        output_q: of its shape, float8_e4m3fn, contiguous.
        output_s: one element of float32. If not `is_static` it becomes the maximum of what it was and
            `max |input| / 448`: the caller has to set it to zero first.
    """
    _check(input, output_q, output_s, 1)


_X, _Q = torch.ones(3, 8), torch.zeros(3, 8).to(_FP8)
_TURNED = torch.ones(8, 3, device="cpu").t()


def _refusals(
    call: Callable[[Tensor, Tensor, Tensor], Callable[[Draw], Call]], scales: int
) -> dict[str, Callable[[Draw], Call]]:
    s = torch.zeros(scales)
    return {
        "input must be contiguous": call(_TURNED, _Q, s),
        "output_q must be contiguous": call(_X, _TURNED.to(_FP8), s),
        "input has to be float32, float16 or bfloat16": call(_X.double(), _Q, s),
        "output_q has to be float8_e4m3fn": call(_X, _Q.char(), s),
        "output_q has to have the shape of input": call(_X, _Q[:2], s),
        f"output_s has to be {scales} float32 elements": call(_X, _Q, torch.zeros(scales + 1)),
    }


_TOKEN = _refusals(_per_token_call, 3) | {
    "output_s must be contiguous": _per_token_call(_X, _Q, torch.zeros(6)[::2]),
    "input has to have 2 dimensions": _per_token_call(_X.view(1, 3, 8), _Q.view(1, 3, 8), torch.zeros(1)),
    "a row of input has to be a multiple of 4": _per_token_call(_X.view(4, 6), _Q.view(4, 6), torch.zeros(4)),
}


def _records(declared: bool) -> tuple[FakeKernel, ...]:
    outputs = "Tensor! output_q, Tensor! output_s" if declared else "Tensor output_q, Tensor output_s"
    writes = () if declared else ("output_q", "output_s")
    return (
        FakeKernel(
            f"sgl_kernel::sgl_per_token_quant_fp8(Tensor input, {outputs}) -> ()",
            sgl_per_token_quant_fp8,
            _per_token,
            _SOURCE.format("token"),
            LIBRARY,
            _per_token_arguments,
            _TOKEN,
            writes,
        ),
        FakeKernel(
            f"sgl_kernel::sgl_per_tensor_quant_fp8(Tensor input, {outputs}, bool is_static) -> ()",
            sgl_per_tensor_quant_fp8,
            _per_tensor,
            _SOURCE.format("tensor"),
            LIBRARY,
            _per_tensor_arguments,
            _refusals(_per_tensor_call, 1),
            writes,
        ),
    )


KERNELS = _records(declared=True)
UNDECLARED = _records(declared=False)
