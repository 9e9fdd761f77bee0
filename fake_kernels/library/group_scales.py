"""Where the scales of groups lie in memory: layouts of one shape, which kernels tell apart by their strides.

A per-token-group quantisation writes one scale per group of neighbouring elements of a row. The kernels of sgl_kernel
take the tensor of scales from the caller and see from its strides which layout is meant:

- row-major: float32 `[rows, groups]`, contiguous;
- column-major: float32 `[rows, groups]`, strides `(1, s)`: the scales of one column of groups lie together. With TMA
  alignment `s` is the number of rows rounded up to a multiple of 4, and the elements beside them are never touched;
- packed (UE8M0): int32 `[rows, ceil(groups / 4)]`, always column-major and TMA-aligned: the exponents of four
  neighbouring groups, one byte each, the first in the lowest byte.

Source: sgl-project/sglang python/sglang/srt/layers/quantization/fp8_kernel.py (in 0.5.23:
sglang/kernels/ops/quantization/fp8_kernel.py), create_per_token_group_quant_fp8_output_scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_scales(
    shape: Sequence[int],
    group_size: int,
    *,
    device: torch.device | str,
    column_major: bool = False,
    tma_aligned: bool = False,
    ue8m0: bool = False,
) -> Tensor:
    """Scales for a quantised tensor, uninitialised, in the layout that sglang allocates.

    Args:
        shape: of the quantised tensor, `[..., rows, columns]`.
        group_size: elements of a group; divides `columns`.
        device: where they are made.
        column_major: the scales of one column of groups lie together.
        tma_aligned: columns begin at a multiple of 4 elements; needs `column_major`, without which it says nothing.
        ue8m0: scales are powers of two: packed exponents if `column_major`, else float32 all the same.

    Returns:
        `[..., rows, columns // group_size]` float32, or `[..., rows, ceil(columns / group_size / 4)]` int32 if packed.

    Raises:
        ValueError: `ue8m0` with `column_major` and without `tma_aligned`, or column-major scales that are not aligned
            of a tensor that has not two dimensions; sglang has no such layout.
    """
    *batch, rows, columns = shape
    groups = columns // group_size
    if not column_major:
        return torch.empty((*shape[:-1], groups), device=device, dtype=torch.float32)
    if ue8m0 and not tma_aligned:
        raise ValueError("column-major UE8M0 scales have to be TMA-aligned: pass scale_tma_aligned=True")
    if not tma_aligned:
        if batch:
            raise ValueError(f"column-major scales of {len(shape)} dimensions have to be TMA-aligned")
        return torch.empty((groups, rows), device=device, dtype=torch.float32).t()
    if ue8m0:
        columns_of_scales, dtype = (groups + 3) // 4, torch.int32
    else:
        columns_of_scales, dtype = groups, torch.float32
    aligned = torch.empty((*batch, columns_of_scales, (rows + 3) // 4 * 4), device=device, dtype=dtype)
    return aligned.transpose(-1, -2)[..., :rows, :]


def is_column_major(scales: Tensor) -> bool:
    """As the kernels decide it."""
    return bool(scales.stride(-2) < scales.stride(-1))


def check_scales(scales: Tensor, rows: int, groups: int, *, ue8m0: bool) -> None:
    """Whether a kernel of sgl_kernel, given these scales, writes inside of them and where their strides say.

    The kernels check the number of dimensions only. They take the pointer for float32 or int32 by the flag alone,
    ignore the strides of row-major scales, and take 1 for the stride between the rows of column-major ones; what does
    not fit is written elsewhere, without an error. So it is refused here.

    Args:
        scales: `[..., rows, groups]`, or packed.
        rows: of one matrix.
        groups: of one row.
        ue8m0: whether they are powers of two.
    """
    column_major = is_column_major(scales)
    packed = ue8m0 and column_major
    dtype = torch.int32 if packed else torch.float32
    torch._check(
        scales.dtype == dtype,
        lambda: f"output_s has to be {dtype} for {'packed UE8M0' if packed else 'these'} scales, not {scales.dtype}",
    )
    columns = (groups + 3) // 4 if packed else groups
    torch._check(
        scales.shape[-2] == rows and scales.shape[-1] == columns,
        lambda: f"output_s has to be [{rows}, {columns}] in its last dimensions, not {list(scales.shape)}",
    )
    if column_major:
        torch._check(
            scales.stride(-2) == 1,
            lambda: f"column-major output_s has to have stride 1 between rows, not {scales.stride(-2)}",
        )
    else:
        torch._check(
            scales.is_contiguous(),
            lambda: f"row-major output_s has to be contiguous: the kernel ignores its strides {list(scales.stride())}",
        )
