"""vLLM's product of quantised matrices, scaled back, into a tensor that the caller made.

Block-wise scales, which the kernel takes on newer hardware, are not modelled, and refused.

Source: vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/cutlass/scaled_mm_entry.cu and
c3x/scaled_mm_helper.hpp; the schema of vLLM 0.33.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel

_FP8 = torch.float8_e4m3fn


def _reference(out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None) -> None:
    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"{a.dtype} times {b.dtype}")
    if out.dtype not in (torch.float16, torch.bfloat16) or {a_scales.dtype, b_scales.dtype} != {torch.float32}:
        raise TypeError(f"{out.dtype} with scales {a_scales.dtype} and {b_scales.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"{list(a.shape)} times {list(b.shape)} into {list(out.shape)}")
    if (a.stride(1), out.stride(1), b.stride(0)) != (1, 1, 1) or out.stride(0) % 16 or b.stride(1) % 16:
        raise ValueError(f"strides {a.stride()}, {b.stride()}, {out.stride()}")
    if a_scales.numel() not in (1, a.shape[0]) or b_scales.numel() not in (1, b.shape[1]):
        raise ValueError(f"scales {list(a_scales.shape)} and {list(b_scales.shape)}")
    if not (a_scales.is_contiguous() and b_scales.is_contiguous()):
        raise ValueError("scales are contiguous")
    result = (a.double() @ b.double()).float() * a_scales.reshape(-1, 1) * b_scales.reshape(1, -1)
    if bias is not None:
        if bias.shape != b.shape[1:] or bias.dtype != out.dtype or not bias.is_contiguous():
            raise ValueError(f"bias {bias.dtype} {list(bias.shape)}")
        result = result + bias.float()
    out.copy_(result)


def _arguments(draw: Draw) -> Call:
    dtype, out_dtype, with_bias = draw.choice(_FP8, torch.int8), draw.choice(*HALVES), draw.flag()
    per_row, per_column, apart = draw.flag(), draw.flag(), draw.flag()
    rows, inner, columns = draw.size(least=1), draw.size(least=1, times=16), draw.size(least=1, times=16)
    a = draw.floats(rows, inner, dtype=dtype, layout="contiguous", scale=4.0)
    b = draw.floats(columns, inner, dtype=dtype, layout="contiguous", scale=4.0).t()
    out = draw.floats(rows, columns + 16 * apart, dtype=out_dtype, layout="contiguous")[:, :columns]
    a_scales = draw.floats(rows if per_row else 1, 1, dtype=torch.float32, layout="contiguous").abs()
    b_scales = draw.floats(1, columns if per_column else 1, dtype=torch.float32, layout="contiguous").abs()
    bias = draw.floats(columns, dtype=out_dtype, layout="contiguous") if with_bias else None
    return (out, a, b, a_scales, b_scales, bias), {}


def _bad(**changed: Any) -> Callable[[Draw], Call]:
    def draw_call(draw: Draw) -> Call:
        given = {
            "out": torch.zeros(3, 16).half(),
            "a": torch.ones(3, 32).to(_FP8),
            "b": torch.ones(16, 32).to(_FP8).t(),
            "a_scales": torch.ones(3, 1),
            "b_scales": torch.ones(1, 1),
            "bias": None,
        } | changed
        return tuple(draw.there(v) if isinstance(v, Tensor) else v for v in given.values()), {}

    return draw_call


@fake_kernel(
    "_C::cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
    reference=_reference,
    source="vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/cutlass/scaled_mm_entry.cu",
    library="vllm._C_stable_libtorch",
    arguments=_arguments,
    refuses={
        "a, b and out have to have 2 dimensions": _bad(a=torch.ones(1, 3, 32).to(_FP8)),
        "cannot be multiplied into out": _bad(out=torch.zeros(2, 16).half()),
        "a and out have to be row-major": _bad(a=torch.ones(32, 3).to(_FP8).t()),
        "b has to be column-major": _bad(b=torch.ones(32, 16).to(_FP8)),
        "have to lie a multiple of 16 elements apart": _bad(out=torch.zeros(3, 24).half()[:, :16]),
        "a and b have to be both float8_e4m3fn or both int8": _bad(a=torch.ones(3, 32).char()),
        "out has to be float16 or bfloat16": _bad(out=torch.zeros(3, 16)),
        "scales have to be contiguous float32": _bad(a_scales=torch.ones(3, 1).half()),
        "block-wise scales are not modelled": _bad(a_scales=torch.ones(3, 2)),
        "bias has to be 16 contiguous torch.float16": _bad(bias=torch.ones(16)),
    },
)
def cutlass_scaled_mm(
    out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None
) -> None:
    """Writes `out = (a @ b) * a_scales * b_scales + bias`; returns nothing.

    Args:
        out: `[M, N]` float16 or bfloat16, rows contiguous and a multiple of 16 elements apart.
        a: `[M, K]` float8_e4m3fn or int8, rows contiguous.
        b: `[K, N]` of its dtype, columns contiguous and a multiple of 16 elements apart.
        a_scales, b_scales: float32, one element, or M and N, contiguous.
        bias: `[N]` of the dtype of `out`, contiguous.
    """
    torch._check(
        a.dim() == 2 and b.dim() == 2 and out.dim() == 2,
        lambda: f"a, b and out have to have 2 dimensions, not {a.dim()}, {b.dim()} and {out.dim()}",
    )
    torch._check(
        out.shape[0] == a.shape[0] and a.shape[1] == b.shape[0] and b.shape[1] == out.shape[1],
        lambda: f"a {list(a.shape)} and b {list(b.shape)} cannot be multiplied into out {list(out.shape)}",
    )
    torch._check(
        a.stride(1) == 1 and out.stride(1) == 1,
        lambda: f"a and out have to be row-major, not of strides {a.stride()} and {out.stride()}",
    )
    torch._check(b.stride(0) == 1, lambda: f"b has to be column-major, not of strides {b.stride()}")
    torch._check(
        out.stride(0) % 16 == 0 and b.stride(1) % 16 == 0,
        lambda: (
            f"rows of out and columns of b have to lie a multiple of 16 elements apart, not {out.stride(0)} and "
            f"{b.stride(1)}"
        ),
    )
    torch._check(
        a.dtype == b.dtype and a.dtype in (_FP8, torch.int8),
        lambda: f"a and b have to be both float8_e4m3fn or both int8, not {a.dtype} and {b.dtype}",
    )
    torch._check(out.dtype in HALVES, lambda: f"out has to be float16 or bfloat16, not {out.dtype}")
    torch._check(
        a_scales.dtype == torch.float32
        and b_scales.dtype == torch.float32
        and a_scales.is_contiguous()
        and b_scales.is_contiguous(),
        lambda: (
            f"scales have to be contiguous float32, not {a_scales.dtype} and {b_scales.dtype} of strides "
            f"{a_scales.stride()} and {b_scales.stride()}"
        ),
    )
    torch._check(
        (a_scales.numel() == 1 or a_scales.numel() == a.shape[0])
        and (b_scales.numel() == 1 or b_scales.numel() == b.shape[1]),
        lambda: (
            f"scales have to be one each, or {a.shape[0]} and {b.shape[1]}, not {a_scales.numel()} and "
            f"{b_scales.numel()}: block-wise scales are not modelled"
        ),
    )
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.is_contiguous() and bias.dtype == out.dtype,
            lambda: f"bias has to be {b.shape[1]} contiguous {out.dtype} elements, not {bias.dtype} {list(bias.shape)}",
        )


KERNELS = (cutlass_scaled_mm,)
