"""sgl_kernel's products of quantised matrices, scaled back per row and per column.

Source: sgl-project/sglang sgl-kernel/csrc/gemm/fp8_gemm_kernel.cu, int8_gemm_kernel.cu. One scale for all rows of an
fp8 `mat_a` is taken by sglang-kernel 0.4.10 (unless on SM89 hardware), and refused by sgl-kernel 0.3.21 when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel

LIBRARY = "sgl_kernel"
_SOURCE = "sgl-project/sglang sgl-kernel/csrc/gemm/{}.cu"
_FP8 = torch.float8_e4m3fn


def check_matrices(mat_a: Tensor, mat_b: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """What all the kernels demand of the two matrices."""
    torch._check(mat_a.dim() == 2, lambda: f"mat_a must be a 2D tensor, not {mat_a.dim()}D")
    torch._check(mat_b.dim() == 2, lambda: f"mat_b must be a 2D tensor, not {mat_b.dim()}D")
    torch._check(mat_a.stride(1) == 1, lambda: f"mat_a must be a row major tensor, not of strides {mat_a.stride()}")
    torch._check(mat_b.stride(0) == 1, lambda: f"mat_b must be a column major tensor, not of strides {mat_b.stride()}")
    torch._check(
        mat_a.shape[1] == mat_b.shape[0],
        lambda: f"mat_a and mat_b shapes cannot be multiplied: {list(mat_a.shape)} and {list(mat_b.shape)}",
    )
    torch._check(mat_a.shape[1] % 16 == 0, lambda: f"mat_a must have a multiple of 16 columns, not {mat_a.shape[1]}")
    torch._check(mat_b.shape[1] % 8 == 0, lambda: f"mat_b must have a multiple of 8 columns, not {mat_b.shape[1]}")
    torch._check(mat_a.dtype == dtype, lambda: f"mat_a must be {dtype}, not {mat_a.dtype}")
    torch._check(mat_b.dtype == dtype, lambda: f"mat_b must be {dtype}, not {mat_b.dtype}")
    torch._check(out_dtype in HALVES, lambda: f"out_dtype must be float16 or bfloat16, not {out_dtype}")


def _scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    (rows, inner), (same, columns) = mat_a.shape, mat_b.shape
    if mat_a.dtype != mat_b.dtype or mat_a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"{mat_a.dtype} times {mat_b.dtype}")
    if inner != same or inner % 16 or columns % 8 or mat_a.stride(1) != 1 or mat_b.stride(0) != 1:
        raise ValueError(f"{list(mat_a.shape)} {mat_a.stride()} times {list(mat_b.shape)} {mat_b.stride()}")
    counts = (rows, 1) if mat_a.dtype == torch.float8_e4m3fn else (rows,)
    if scales_a.numel() not in counts or scales_b.numel() != columns:
        raise ValueError(f"scales {list(scales_a.shape)} and {list(scales_b.shape)}")
    if not (scales_a.is_contiguous() and scales_b.is_contiguous()) or {scales_a.dtype, scales_b.dtype} != {
        torch.float32
    }:
        raise ValueError("scales are contiguous float32")
    if out_dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"no result of {out_dtype}")
    product = mat_a.double() @ mat_b.double()
    result = product.float() * scales_a.reshape(-1, 1) * scales_b.reshape(1, -1)
    if bias is not None:
        if bias.numel() != columns or not bias.is_contiguous() or bias.dtype != out_dtype:
            raise ValueError(f"bias {bias.dtype} {list(bias.shape)}")
        result = result + bias.float().reshape(1, -1)
    return result.to(out_dtype)


def _check_scaled(
    mat_a: Tensor,
    mat_b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    check_matrices(mat_a, mat_b, dtype, out_dtype)
    for name, scales, count in (("scales_a", scales_a, mat_a.shape[0]), ("scales_b", scales_b, mat_b.shape[1])):
        one_will_do = name == "scales_a" and dtype == _FP8
        fits = scales.numel() == count or (one_will_do and scales.numel() == 1)
        torch._check(
            fits and scales.is_contiguous() and scales.dtype == torch.float32,
            lambda name=name, scales=scales, count=count: (
                f"{name} must be {count} contiguous float32 elements, not {scales.dtype} {list(scales.shape)}"
            ),
        )
    if bias is not None:
        torch._check(
            bias.numel() == mat_b.shape[1] and bias.is_contiguous() and bias.dtype == out_dtype,
            lambda: (
                f"bias must be {mat_b.shape[1]} contiguous {out_dtype} elements, not {bias.dtype} {list(bias.shape)}"
            ),
        )
    return mat_a.new_empty((mat_a.shape[0], mat_b.shape[1]), dtype=out_dtype)


def _matrices(draw: Draw, dtype: torch.dtype, rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor]:
    a = draw.floats(rows, inner, dtype=dtype, layout=draw.choice("contiguous", "offset"), scale=4.0)
    return a, draw.floats(columns, inner, dtype=dtype, layout="contiguous", scale=4.0).t()


def _arguments(dtype: torch.dtype) -> Callable[[Draw], Call]:
    def draw_call(draw: Draw) -> Call:
        out_dtype, flat, with_bias = draw.choice(*HALVES), draw.flag(), draw.flag()
        one = dtype == _FP8 and draw.flag()
        rows, inner, columns = draw.size(least=1), draw.size(least=1, times=16), draw.size(least=1, times=8)
        a, b = _matrices(draw, dtype, rows, inner, columns)
        scales = [
            draw.floats(count, dtype=torch.float32, layout="contiguous").abs()
            for count in (1 if one else rows, columns)
        ]
        if not flat:
            scales = [scales[0].view(-1, 1), scales[1].view(1, -1)]
        return (
            a,
            b,
            *scales,
            out_dtype,
            draw.floats(columns, dtype=out_dtype, layout="contiguous") if with_bias else None,
        ), {}

    return draw_call


def _bad(dtype: torch.dtype, **changed: Any) -> Callable[[Draw], Call]:
    def draw_call(draw: Draw) -> Call:
        given = {
            "a": torch.ones(3, 16).to(dtype),
            "b": torch.ones(8, 16).to(dtype).t(),
            "scales_a": torch.ones(3),
            "scales_b": torch.ones(8),
            "out_dtype": torch.bfloat16,
            "bias": None,
        } | changed
        return tuple(draw.there(v) if isinstance(v, Tensor) else v for v in given.values()), {}

    return draw_call


def _refusals(dtype: torch.dtype) -> dict[str, Callable[[Draw], Call]]:
    ones = torch.ones(16, 16).to(dtype)
    return {
        "mat_a must be a 2D tensor": _bad(dtype, a=ones.view(1, 16, 16)),
        "mat_a must be a row major tensor": _bad(dtype, a=ones.t()[:3]),
        "mat_b must be a column major tensor": _bad(dtype, b=ones[:, :8]),
        "shapes cannot be multiplied": _bad(dtype, b=torch.ones(8, 32).to(dtype).t()),
        "mat_a must have a multiple of 16 columns": _bad(dtype, a=ones[:3, :8], b=ones[:8, :8].t()),
        "mat_b must have a multiple of 8 columns": _bad(dtype, b=ones[:6].t(), scales_b=torch.ones(6)),
        f"mat_a must be {dtype}": _bad(dtype, a=torch.ones(3, 16)),
        f"mat_b must be {dtype}": _bad(dtype, b=torch.ones(8, 16).t()),
        "out_dtype must be float16 or bfloat16": _bad(dtype, out_dtype=torch.float32),
        "scales_a must be 3 contiguous float32": _bad(dtype, scales_a=torch.ones(2)),
        "scales_b must be 8 contiguous float32": _bad(dtype, scales_b=torch.ones(8).half()),
        "bias must be 8 contiguous torch.bfloat16": _bad(dtype, bias=torch.ones(8)),
    }


@fake_kernel(
    "sgl_kernel::fp8_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, ScalarType out_dtype, "
    "Tensor? bias) -> Tensor",
    reference=_scaled_mm,
    source=_SOURCE.format("fp8_gemm_kernel"),
    library=LIBRARY,
    arguments=_arguments(_FP8),
    refuses=_refusals(_FP8),
)
def fp8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """`(mat_a @ mat_b) * scales_a[:, None] * scales_b[None] + bias`: `[M, N]` of `out_dtype`, contiguous.

    Args:
        mat_a: `[M, K]` float8_e4m3fn, row-major; K a multiple of 16.
        mat_b: `[K, N]` float8_e4m3fn, column-major; N a multiple of 8.
        scales_a: M elements of float32, or one, contiguous.
        scales_b: N elements of float32, contiguous.
        out_dtype: float16 or bfloat16.
        bias: N elements of `out_dtype`, contiguous.
    """
    return _check_scaled(mat_a, mat_b, scales_a, scales_b, _FP8, out_dtype, bias)


@fake_kernel(
    "sgl_kernel::int8_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, ScalarType out_dtype, "
    "Tensor? bias) -> Tensor",
    reference=_scaled_mm,
    source=_SOURCE.format("int8_gemm_kernel"),
    library=LIBRARY,
    arguments=_arguments(torch.int8),
    refuses=_refusals(torch.int8),
)
def int8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """As `fp8_scaled_mm`, of int8 matrices, whose product is exact before it is scaled; `scales_a` has M elements."""
    return _check_scaled(mat_a, mat_b, scales_a, scales_b, torch.int8, out_dtype, bias)


KERNELS = (fp8_scaled_mm, int8_scaled_mm)
