"""sgl_kernel's fp8 product with scales per block of 128, and the unpacking of AWQ weights.

Two conditions are not the kernels' own: the block-wise product drops what is left over of a block, and AWQ reads its
tensors as if they were contiguous and of fitting sizes. Both go wrong silently, and so are refused here.

Source: sgl-project/sglang sgl-kernel/csrc/gemm/fp8_blockwise_gemm_kernel.cu, awq_kernel.cu; in sgl-kernel 0.3.21, no
longer in sglang-kernel 0.4.10; the build for MUSA has AWQ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.matmul_sgl import check_matrices

LIBRARY = "sgl_kernel"
_SOURCE = "sgl-project/sglang sgl-kernel/csrc/gemm/{}.cu"
_FP8 = torch.float8_e4m3fn
_BLOCK = 128


def _is_vector(scales: Tensor) -> bool:
    return scales.is_contiguous() and (scales.shape[0] == 1 or scales.shape[1] == 1)


def _blockwise(mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    if {mat_a.dtype, mat_b.dtype} != {torch.float8_e4m3fn} or out_dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{mat_a.dtype} times {mat_b.dtype} as {out_dtype}")
    (rows, inner), (same, columns) = mat_a.shape, mat_b.shape
    if inner != same or inner % 128 or columns % 128 or mat_a.stride(1) != 1 or mat_b.stride(0) != 1:
        raise ValueError(f"{list(mat_a.shape)} {mat_a.stride()} times {list(mat_b.shape)} {mat_b.stride()}")
    if {scales_a.dtype, scales_b.dtype} != {torch.float32}:
        raise TypeError(f"scales of {scales_a.dtype} and {scales_b.dtype}")
    if scales_a.shape != (rows, inner // 128) or scales_b.shape != (inner // 128, columns // 128):
        raise ValueError(f"scales {list(scales_a.shape)} and {list(scales_b.shape)}")
    if any(s.stride(0) != 1 and not (s.is_contiguous() and 1 in s.shape) for s in (scales_a, scales_b)):
        raise ValueError("scales lie column by column")
    a = mat_a.float() * scales_a.repeat_interleave(128, 1)
    b = mat_b.float() * scales_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (a @ b).to(out_dtype)


def _blockwise_arguments(draw: Draw) -> Call:
    out_dtype = draw.choice(*HALVES)
    rows, *blocks = draw.size(least=1), draw.size(least=1, most=3), draw.size(least=1, most=3)
    inner, columns = (_BLOCK * count for count in blocks)
    a = draw.floats(rows, inner, dtype=_FP8, layout="contiguous")
    b = draw.floats(columns, inner, dtype=_FP8, layout="contiguous").t()
    scales_a = draw.floats(inner // _BLOCK, rows, dtype=torch.float32, layout="contiguous").t()
    scales_b = draw.floats(columns // _BLOCK, inner // _BLOCK, dtype=torch.float32, layout="contiguous").t()
    return (a, b, scales_a, scales_b, out_dtype), {}


def _bad(**changed: Any) -> Callable[[Draw], Call]:
    def draw_call(draw: Draw) -> Call:
        given = {
            "a": torch.ones(3, 256).to(_FP8),
            "b": torch.ones(256, 256).to(_FP8).t(),
            "scales_a": torch.ones(2, 3).t(),
            "scales_b": torch.ones(2, 2).t(),
            "out_dtype": torch.bfloat16,
        } | changed
        return tuple(draw.there(v) if isinstance(v, Tensor) else v for v in given.values()), {}

    return draw_call


@fake_kernel(
    "sgl_kernel::fp8_blockwise_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, "
    "ScalarType out_dtype) -> Tensor",
    reference=_blockwise,
    source=_SOURCE.format("fp8_blockwise_gemm_kernel"),
    library=LIBRARY,
    arguments=_blockwise_arguments,
    refuses={
        "mat_b must be a column major tensor": _bad(b=torch.ones(256, 256).to(_FP8)),
        "K and N must be multiples of 128": _bad(a=torch.ones(3, 144).to(_FP8), b=torch.ones(256, 144).to(_FP8).t()),
        "scales_a must be [3, 2]": _bad(scales_a=torch.ones(2, 2).t()),
        "scales_b must be [2, 2]": _bad(scales_b=torch.ones(2, 3).t()),
        "scales_a must be M major": _bad(scales_a=torch.ones(3, 2)),
        "scales_b must be K major": _bad(scales_b=torch.ones(2, 2)),
        "scales must be float32": _bad(scales_b=torch.ones(2, 2).half().t()),
        "out_dtype must be float16 or bfloat16": _bad(out_dtype=torch.float32),
    },
)
def fp8_blockwise_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The product of the matrices, each block of 128 times its scale: `[M, N]` of `out_dtype`, contiguous.

    Args:
        mat_a: `[M, K]` float8_e4m3fn, row-major, K a multiple of 128.
        mat_b: `[K, N]` float8_e4m3fn, column-major, N a multiple of 128.
        scales_a: float32 `[M, K // 128]`, with stride 1 between rows.
        scales_b: float32 `[K // 128, N // 128]`, with stride 1 between rows.
        out_dtype: float16 or bfloat16.
    """
    check_matrices(mat_a, mat_b, _FP8, out_dtype)
    (rows, inner), columns = mat_a.shape, mat_b.shape[1]
    torch._check(
        inner % _BLOCK == 0 and columns % _BLOCK == 0,
        lambda: f"K and N must be multiples of 128, not {inner} and {columns}: the kernel drops the rest",
    )
    torch._check(
        scales_a.dim() == 2 and scales_a.shape[0] == rows and scales_a.shape[1] == inner // _BLOCK,
        lambda: f"scales_a must be [{rows}, {inner // _BLOCK}], not {list(scales_a.shape)}",
    )
    torch._check(
        scales_b.dim() == 2 and scales_b.shape[0] == inner // _BLOCK and scales_b.shape[1] == columns // _BLOCK,
        lambda: f"scales_b must be [{inner // _BLOCK}, {columns // _BLOCK}], not {list(scales_b.shape)}",
    )
    torch._check(
        scales_a.stride(0) == 1 or _is_vector(scales_a),
        lambda: f"scales_a must be M major, not of strides {scales_a.stride()}",
    )
    torch._check(
        scales_b.stride(0) == 1 or _is_vector(scales_b),
        lambda: f"scales_b must be K major, not of strides {scales_b.stride()}",
    )
    torch._check(
        scales_a.dtype == torch.float32 and scales_b.dtype == torch.float32,
        lambda: f"scales must be float32, not {scales_a.dtype} and {scales_b.dtype}",
    )
    return mat_a.new_empty((rows, columns), dtype=out_dtype)


def _unpacked(packed: Tensor) -> Tensor:
    """int32 `[rows, n]` -> 4-bit numbers `[rows, 8 * n]`, float32: AWQ has columns 0, 2, 4, 6, 1, 3, 5, 7 in turn."""
    shifts = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=packed.device)
    return ((packed.to(torch.int64).unsqueeze(-1) >> shifts) & 15).flatten(-2).float()


def _awq(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    (rows, packed), groups = qweight.shape, scales.shape[0]
    if {qweight.dtype, qzeros.dtype} != {torch.int32} or scales.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{qweight.dtype}, {scales.dtype}, {qzeros.dtype}")
    if scales.shape[1] != packed * 8 or qzeros.shape != (groups, packed) or rows % groups:
        raise ValueError(f"{list(qweight.shape)}, {list(scales.shape)} and {list(qzeros.shape)} do not go together")
    if not (qweight.is_contiguous() and scales.is_contiguous() and qzeros.is_contiguous()):
        raise ValueError("all three are contiguous")
    each = rows // groups
    offset = _unpacked(qweight) - _unpacked(qzeros).repeat_interleave(each, 0)
    return (offset * scales.float().repeat_interleave(each, 0)).to(scales.dtype)


def _packed(draw: Draw, rows: int, columns: int) -> Tensor:
    return draw.integers(rows, columns, low=-(2**31), high=2**31, dtype=torch.int32, layout="contiguous")


def _awq_arguments(draw: Draw) -> Call:
    dtype, each = draw.choice(*HALVES), draw.choice(1, 2, 8)
    groups, columns = draw.size(least=1), draw.size(least=1)
    scales = draw.floats(groups, columns * 8, dtype=dtype, layout="contiguous")
    return (_packed(draw, groups * each, columns), scales, _packed(draw, groups, columns)), {}


def _bad_awq(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Callable[[Draw], Call]:
    return lambda draw: (tuple(draw.there(tensor) for tensor in (qweight, scales, qzeros)), {})


_W, _S, _Z = torch.zeros(6, 4, dtype=torch.int32), torch.ones(3, 32).half(), torch.zeros(3, 4, dtype=torch.int32)


@fake_kernel(
    "sgl_kernel::awq_dequantize(Tensor qweight, Tensor scales, Tensor qzeros) -> Tensor",
    reference=_awq,
    source=_SOURCE.format("awq_kernel"),
    library=LIBRARY,
    arguments=_awq_arguments,
    refuses={
        "qweight and qzeros have to be int32": _bad_awq(_W.long(), _S, _Z),
        "scales has to be float16 or bfloat16": _bad_awq(_W, _S.float(), _Z),
        "scales has to be [groups, 32]": _bad_awq(_W, _S[:, :8].contiguous(), _Z),
        "qzeros has to be [3, 4]": _bad_awq(_W, _S, _Z[:2]),
        "6 rows do not fall into 4 groups": _bad_awq(_W, torch.ones(4, 32).half(), torch.zeros(4, 4).int()),
        "scales has to be contiguous": _bad_awq(_W, torch.ones(32, 3).half().t(), _Z),
    },
)
def awq_dequantize(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    """`(weight - zero) * scale`, unpacked from four bits: `[K, N]` of the dtype of `scales`, contiguous.

    Args:
        qweight: int32 `[K, N // 8]`, contiguous.
        scales: float16 or bfloat16 `[groups, N]`, contiguous; `K // groups` rows share one.
        qzeros: int32 `[groups, N // 8]`, contiguous.
    """
    torch._check(
        qweight.dtype == torch.int32 and qzeros.dtype == torch.int32,
        lambda: f"qweight and qzeros have to be int32, not {qweight.dtype} and {qzeros.dtype}",
    )
    torch._check(scales.dtype in HALVES, lambda: f"scales has to be float16 or bfloat16, not {scales.dtype}")
    columns = qweight.shape[1] * 8
    torch._check(
        scales.dim() == 2 and scales.shape[1] == columns,
        lambda: f"scales has to be [groups, {columns}], not {list(scales.shape)}",
    )
    groups = scales.shape[0]
    torch._check(
        qzeros.dim() == 2 and qzeros.shape[0] == groups and qzeros.shape[1] == qweight.shape[1],
        lambda: f"qzeros has to be [{groups}, {qweight.shape[1]}], not {list(qzeros.shape)}",
    )
    torch._check(
        qweight.shape[0] % groups == 0, lambda: f"{qweight.shape[0]} rows do not fall into {groups} groups of one size"
    )
    for name, tensor in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros)):
        torch._check(
            tensor.is_contiguous(),
            lambda name=name, tensor=tensor: (
                f"{name} has to be contiguous: the kernel ignores strides {tensor.stride()}"
            ),
        )
    return qweight.new_empty((qweight.shape[0], columns), dtype=scales.dtype)


KERNELS = (fp8_blockwise_scaled_mm, awq_dequantize)
