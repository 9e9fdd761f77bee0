"""The numbers by which torch_npu's operators name the type they quantise to, and quantising to it.

`int? dst_type` is torch's own number of a dtype, or 256 plus CANN's. Those that stand for a type which torch cannot
compute with (hifloat8, fp4) are not modelled, and refused.

Source: torch_npu/op_plugin/meta/_meta_registrations.py (TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP), torch_npu 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.library.rounding import pack_int4

INT8, INT4, FP8_E5M2, FP8_E4M3 = 1, 16, 23, 24
"""torch.int8, torch.quint4x2 (eight to an int32), torch.float8_e5m2, torch.float8_e4m3fn."""
DTYPES = {
    INT8: torch.int8,
    INT4: torch.int32,
    FP8_E5M2: torch.float8_e5m2,
    FP8_E4M3: torch.float8_e4m3fn,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
}
FLOAT_DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
_TOPS = {torch.int8: 127.0, torch.int32: 7.0, torch.float8_e5m2: 57344.0, torch.float8_e4m3fn: 448.0}


def empty_quantised(like: Tensor, dst_type: int | None, modelled: tuple[int, ...] = tuple(DTYPES)) -> Tensor:
    """For fake kernels: the quantised tensor, contiguous, of the shape of `like`; int4 has an eighth of its columns."""
    number = INT8 if dst_type is None else dst_type
    torch._check(
        number in modelled, lambda: f"dst_type {number} is not modelled; of its values there are {sorted(modelled)}"
    )
    if number != INT4:
        return like.new_empty(like.shape, dtype=DTYPES[number])
    columns = like.shape[-1]
    torch._check(columns % 8 == 0, lambda: f"the last dimension has to be divided by 8 for int4, and is {columns}")
    return like.new_empty((*like.shape[:-1], columns // 8), dtype=torch.int32)


def top(dst_type: int | None) -> float:
    """For references: the greatest value of the type."""
    if dst_type is not None and dst_type not in DTYPES:
        raise ValueError(f"quantising to type {dst_type} is not modelled")
    return _TOPS[DTYPES[INT8 if dst_type is None else dst_type]]


def quantised(values: Tensor, dst_type: int | None) -> Tensor:
    """For references: float32 `values` rounded to nearest (even), saturating, contiguous; integers have 0 for NaN."""
    limit = top(dst_type)
    dtype = DTYPES[INT8 if dst_type is None else dst_type]
    if dtype.is_floating_point:
        return values.clamp(-limit, limit).to(dtype).contiguous()
    whole = values.nan_to_num(0.0).round().clamp(-limit - 1, limit)
    return pack_int4(whole) if dtype == torch.int32 else whole.to(dtype).contiguous()
