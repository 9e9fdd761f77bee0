"""vLLM's dynamic quantisation to fp8: with one scale for the tensor, and with one per row (token).

Both, and the static one, step from row to row by the stride of the dimension before the last: a tensor of more than two
dimensions has to be contiguous, which they do not check. Nor do they check that `result` and `scale` have the sizes
that they write.

Source: vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/fp8/common.cu (094be773), csrc/libtorch_stable/
torch_bindings.cpp; schemas of vLLM 0.33.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

LIBRARY = "vllm._C_stable_libtorch"
SOURCE = "vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/fp8/common.cu"
_FP8 = torch.float8_e4m3fn


def check(result: Tensor, input: Tensor, scale: Tensor) -> None:
    torch._check(input.dtype in FLOATS, lambda: f"input has to be float32, float16 or bfloat16, not {input.dtype}")
    torch._check(result.dtype == _FP8, lambda: f"result has to be float8_e4m3fn, not {result.dtype}")
    torch._check(scale.dtype == torch.float32, lambda: f"scale has to be float32, not {scale.dtype}")
    torch._check(input.dim() >= 2, lambda: f"input has to have 2 dimensions or more, not {input.dim()}")
    torch._check(
        result.shape == input.shape,
        lambda: f"result has to have the shape of input, {list(input.shape)}, not {list(result.shape)}",
    )
    for name, tensor in (("input", input), ("result", result)):
        torch._check(
            tensor.stride(-1) == 1 if tensor.dim() == 2 else tensor.is_contiguous(),
            lambda name=name, tensor=tensor: (
                f"rows of {name} have to be contiguous, and all of it if it has more than 2 "
                f"dimensions; its strides are {tensor.stride()}"
            ),
        )


def expect(result: Tensor, input: Tensor, scale: Tensor) -> tuple[int, int]:
    if input.dim() < 2 or result.shape != input.shape:
        raise ValueError(f"{list(input.shape)} to {list(result.shape)}")
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{input.dtype} is not quantised")
    if (result.dtype, scale.dtype) != (torch.float8_e4m3fn, torch.float32):
        raise TypeError(f"to {result.dtype} with {scale.dtype}")
    if not all(t.stride(-1) == 1 and (t.dim() == 2 or t.is_contiguous()) for t in (input, result)):
        raise ValueError(f"strides {input.stride()} and {result.stride()}")
    return input.numel() // input.shape[-1], input.shape[-1]


def to_fp8(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=448.0).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)  # NaN: fmin with 448 gives 448


def _dynamic(result: Tensor, input: Tensor, scale: Tensor) -> None:
    expect(result, input, scale)
    if scale.numel() != 1:
        raise ValueError(f"one scale, not {list(scale.shape)}")
    scale.copy_((input.float().abs().amax() / 448.0).reshape(scale.shape))
    result.copy_(to_fp8(input.float() * (1.0 / scale.reshape(()))))


def _per_token(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    rows, columns = expect(result, input, scale)
    if scale.numel() < rows or not scale.is_contiguous():
        raise ValueError(f"{rows} scales, not {list(scale.shape)}")
    values = input.float().reshape(rows, columns)
    largest = values.abs().amax(-1)
    if scale_ub is not None:
        if scale_ub.dtype != torch.float32 or scale_ub.numel() != 1:
            raise ValueError(f"bound {scale_ub.dtype} {list(scale_ub.shape)}")
        largest = torch.minimum(largest, scale_ub.reshape(1))
    scales = (largest / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    scale.view(-1)[:rows] = scales
    result.copy_(to_fp8(values / scales.unsqueeze(-1)).view(result.shape))


def tensors(draw: Draw, rows_times: int = 1, columns_times: int = 1) -> tuple[Tensor, Tensor]:
    dtype, padded, deep = draw.choice(*FLOATS), draw.flag(), draw.flag()
    leading = [rows_times * draw.size(least=1)] if not deep else [2, rows_times * draw.size(least=1)]
    columns = columns_times * draw.size(least=1)
    x = draw.floats(*leading, columns, dtype=dtype, layout="contiguous")
    if padded and not deep:  # rows that lie apart
        x = draw.floats(*leading, columns + 3, dtype=dtype, layout="contiguous")[:, :columns]
    return draw.floats(*leading, columns, dtype=_FP8, layout="contiguous"), x


def _dynamic_arguments(draw: Draw) -> Call:
    q, x = tensors(draw)
    return (q, x, torch.ones((1,) if draw.flag() else (), device=draw.device)), {}


def _per_token_arguments(draw: Draw) -> Call:
    bounded, flat = draw.flag(), draw.flag()
    q, x = tensors(draw)
    rows = x.numel() // x.shape[-1]
    bound = torch.full((1,), 0.5, device=draw.device) if bounded else None
    return (q, x, torch.ones((rows,) if flat else (rows, 1), device=draw.device), bound), {}


Q, X = torch.zeros(3, 8).to(_FP8), torch.ones(3, 8)


def bad(result: Tensor, input: Tensor, scale: Tensor, *rest: Any) -> Callable[[Draw], Call]:
    return lambda draw: ((*(draw.there(t) for t in (result, input, scale)), *rest), {})


def refusals(count: int, *rest: Any) -> dict[str, Callable[[Draw], Call]]:
    s = torch.ones(count)
    return {
        "input has to be float32, float16 or bfloat16": bad(Q, X.double(), s, *rest),
        "result has to be float8_e4m3fn": bad(Q.char(), X, s, *rest),
        "scale has to be float32": bad(Q, X, s.half(), *rest),
        "result has to have the shape of input": bad(Q[:2], X, s, *rest),
        "rows of input have to be contiguous": bad(Q, torch.ones(8, 3).t(), s, *rest),
        "input has to have 2 dimensions or more": bad(Q[0], X[0], s[:1], *rest),
    }


@fake_kernel(
    "_C::dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
    reference=_dynamic,
    source=SOURCE,
    library=LIBRARY,
    arguments=_dynamic_arguments,
    refuses={**refusals(1), "scale has to have 1 element": bad(Q, X, torch.ones(3))},
)
def dynamic_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    """Writes `scale = max |input| / 448` and `result = input / scale`; returns nothing.

    Args:
        result: float8_e4m3fn, of the shape of `input`, rows contiguous.
        input: `[..., rows, columns]` float32, float16 or bfloat16, rows contiguous.
        scale: one element of float32.

    If all is zero the kernel writes 448 everywhere, with the scale 0.
    """
    check(result, input, scale)
    torch._check(scale.numel() == 1, lambda: f"scale has to have 1 element, not {scale.numel()}")


@fake_kernel(
    "_C::dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    reference=_per_token,
    source=SOURCE,
    library=LIBRARY,
    arguments=_per_token_arguments,
    refuses={
        **refusals(3, None),
        "scale has to have at least 3 elements": bad(Q, X, torch.ones(2), None),
        "scale has to be contiguous": bad(Q, X, torch.ones(6)[::2], None),
        "scale_ub has to be 1 element of float32": bad(Q, X, torch.ones(3), torch.ones(2)),
    },
)
def dynamic_per_token_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    """Writes a scale per row, `max(min(max |row|, scale_ub) / 448, 1 / (448 * 512))`, and `result = input / scale`.

    Args:
        result, input: as of `dynamic_scaled_fp8_quant`.
        scale: float32, contiguous, at least as many elements as rows; those after them stay as they are.
        scale_ub: one element of float32.
    """
    check(result, input, scale)
    rows = math.prod(input.shape[:-1])
    torch._check(scale.numel() >= rows, lambda: f"scale has to have at least {rows} elements, not {scale.numel()}")
    torch._check(
        scale.is_contiguous(), lambda: f"scale has to be contiguous: the kernel ignores its strides {scale.stride()}"
    )
    if scale_ub is not None:
        torch._check(
            scale_ub.dtype == torch.float32 and scale_ub.numel() == 1,
            lambda: f"scale_ub has to be 1 element of float32, not {scale_ub.dtype} {list(scale_ub.shape)}",
        )


KERNELS = (dynamic_scaled_fp8_quant, dynamic_per_token_scaled_fp8_quant)
