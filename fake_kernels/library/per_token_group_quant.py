"""Per-token-group quantisation as a function: what a model calls, on the kernels that sgl_kernel brings.

The kernels write into tensors that the caller makes, of a shape and layout that decide what is written. This function
makes them as sglang does and calls the operator that the build at hand has. It traces with `fullgraph=True` once the
operators have fake kernels, or stand-ins where their schema hides what they write.

Source: sgl-project/sglang python/sglang/srt/layers/quantization/fp8_kernel.py, sglang_per_token_group_quant_fp8 and
sglang_per_token_group_quant_8bit (in 0.5.23: sglang/kernels/ops/quantization/fp8_kernel.py); for the choice of the
operator sgl_kernel/gemm.py of sglang-kernel 0.4.10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.errors import UnknownOperatorError
from fake_kernels.library.group_scales import empty_scales

_V2_GROUP_SIZES = (16, 32, 64, 128)


def per_token_group_quant(
    x: Tensor,
    group_size: int,
    eps: float = 1e-10,
    dtype: torch.dtype = torch.float8_e4m3fn,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantises groups of neighbouring elements of each row to 8 bits, with one scale per group.

    Args:
        x: `[..., K]` float16 or bfloat16 (float32 too with the first version of the kernel), contiguous;
            `[..., 2 * K]` with `fuse_silu_and_mul`.
        group_size: divides K.
        eps: lower bound of a group's greatest magnitude.
        dtype: float8_e4m3fn or int8.
        column_major_scales: see `group_scales`; needs two dimensions, or `masked_m`.
        scale_tma_aligned: with `column_major_scales`: columns begin at multiples of 4.
        scale_ue8m0: scales are powers of two; with `column_major_scales` packed exponents, int32.
        fuse_silu_and_mul: quantises `silu(x[..., :K]) * x[..., K:]`; needs packed scales.
        masked_m: int32 `[experts]`, how many rows of each matrix of a three-dimensional `x` there are; the others are
            left uninitialised. Needs `fuse_silu_and_mul`.

    Returns:
        The quantised tensor `[..., K]` of `dtype`, contiguous, and its scales in the layout asked for: float32
        `[..., K // group_size]`, or int32 `[..., ceil(K / group_size / 4)]`.

    Raises:
        UnknownOperatorError: no operator of sgl_kernel that can do this is registered.
        ValueError: `x` is not contiguous, K is no multiple of `group_size`, `dtype` is neither of the two, or the
            arguments do not go together: the kernels do not check that, and ignore some of them.
    """
    if not x.is_contiguous():
        raise ValueError("x has to be contiguous: the kernels read it row by row; call x.contiguous() first")
    if dtype not in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(f"dtype has to be torch.float8_e4m3fn or torch.int8, not {dtype}")
    columns = x.shape[-1] // 2 if fuse_silu_and_mul else x.shape[-1]
    if columns % group_size:
        raise ValueError(f"a row of {columns} elements cannot be cut into groups of {group_size}")
    if fuse_silu_and_mul and not (scale_ue8m0 and column_major_scales):
        raise ValueError("fuse_silu_and_mul needs column-major UE8M0 scales: the kernel would ignore it with others")
    if masked_m is not None and not (fuse_silu_and_mul and x.dim() == 3):
        raise ValueError("masked_m needs fuse_silu_and_mul and an x of 3 dimensions: the kernel would ignore it")
    if x.dim() != 2 and column_major_scales and masked_m is None:
        raise ValueError(f"column-major scales need an x of 2 dimensions, or masked_m; it has {x.dim()}")
    second = False  # decided by a branch: in a graph numbers may be symbols, and this may not
    if group_size in _V2_GROUP_SIZES and x.dtype in (torch.float16, torch.bfloat16) and abs(eps - 1e-10) < 1e-13:
        second = True
    only_second = fuse_silu_and_mul or masked_m is not None or (scale_ue8m0 and not column_major_scales)
    operator = _operator(dtype is torch.int8, second, only_second, scale_ue8m0)
    shape = (*x.shape[:-1], columns)
    q = torch.empty(shape, device=x.device, dtype=dtype)
    scales = empty_scales(
        shape,
        group_size,
        device=x.device,
        column_major=column_major_scales,
        tma_aligned=scale_tma_aligned,
        ue8m0=scale_ue8m0,
    )
    # without padded experts sgl_kernel takes scales of two dimensions: a view of the same memory
    flat = scales if x.dim() == 2 or masked_m is not None else scales.view(-1, scales.shape[-1])
    low, high = (-448.0, 448.0) if dtype == torch.float8_e4m3fn else (-128.0, 127.0)
    if x.numel() > 0:
        call = getattr(torch.ops.sgl_kernel, operator)
        if operator == "sgl_per_token_group_quant_8bit_v2":
            call(x, q, flat, group_size, eps, low, high, scale_ue8m0, fuse_silu_and_mul, masked_m)
        elif operator == "sgl_per_token_group_quant_int8":
            call(x, q, flat, group_size, eps, low, high)
        else:
            call(x, q, flat, group_size, eps, low, high, scale_ue8m0)
    return q, scales


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _operator(int8: bool, v2_can: bool, v2_must: bool, ue8m0: bool) -> str:
    """The name of the operator to call, in the order in which sglang prefers them. A graph has it as a constant."""
    v1 = [
        "sgl_per_token_group_quant_8bit",
        "sgl_per_token_group_quant_int8" if int8 else "sgl_per_token_group_quant_fp8",
    ]
    if int8 and ue8m0:
        v1.pop()
    names = ["sgl_per_token_group_quant_8bit_v2"] * (v2_can or v2_must) + v1 * (not v2_must)
    for name in names:
        if hasattr(torch.ops.sgl_kernel, name):
            return name
    raise UnknownOperatorError(
        "No kernel for this quantisation is registered.",
        seen=f"none of {', '.join(names)} in torch.ops.sgl_kernel",
        expected="one of them, from the vendor's build of sgl_kernel",
        hint="import sgl_kernel first; on a device without it call torch's own operators instead",
    )
