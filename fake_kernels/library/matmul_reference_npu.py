"""The reference of torch_npu's product of int8 matrices, and the types it has.

Source: Ascend/op-plugin docs/context/torch_npu-npu_quant_matmul.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8, HALF, BFLOAT16 = 1, 5, 15
RESULTS = {INT8: torch.int8, HALF: torch.float16, BFLOAT16: torch.bfloat16}
BIASES = (torch.int32, torch.bfloat16, torch.float32, torch.float16)


def _scale_of(scale: Tensor) -> Tensor:
    if scale.dtype != torch.int64:
        return scale.float()
    low = scale & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32).view(torch.float32)


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    if any(each is not None for each in (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes, y_scale)):
        raise ValueError("no model of other types, groups or y_scale")
    if {x1.dtype, x2.dtype} != {torch.int8} or output_dtype not in (None, *RESULTS):
        raise TypeError(f"{x1.dtype} times {x2.dtype} as {output_dtype}")
    result_dtype = torch.int8 if output_dtype is None else RESULTS[output_dtype]
    rows, columns = x1.shape[-2], x2.shape[-1]
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.int64) or scale.dim() != 1:
        raise TypeError(f"scale {scale.dtype} {list(scale.shape)}")
    if scale.shape[0] not in (1, columns) or (scale.dtype == torch.bfloat16 and result_dtype != torch.bfloat16):
        raise ValueError(f"scale {scale.dtype} {list(scale.shape)} for {columns} columns of {result_dtype}")
    if pertoken_scale is not None and (pertoken_scale.dtype != torch.float32 or pertoken_scale.shape != (rows,)):
        raise ValueError(f"per token {pertoken_scale.dtype} {list(pertoken_scale.shape)} for {rows} rows")
    if offset is not None and (offset.dtype != torch.float32 or offset.dim() != 1 or len(offset) not in (1, columns)):
        raise ValueError(f"offset {offset.dtype} {list(offset.shape)}")
    if bias is not None and (bias.shape != (columns,) or bias.dtype not in BIASES):
        raise ValueError(f"bias {bias.dtype} {list(bias.shape)}")
    if bias is not None and bias.dtype == torch.bfloat16 and result_dtype != torch.bfloat16:
        raise TypeError("a bfloat16 bias goes with a bfloat16 result")
    if bias is not None and bias.dtype == torch.float16 and (pertoken_scale is None or result_dtype != torch.float16):
        raise TypeError("a float16 bias goes with a scale per token and a float16 result")
    product = x1.double() @ x2.double()
    if bias is not None and bias.dtype == torch.int32:
        product = product + bias.double()
    result = product.float() * _scale_of(scale)
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        result = result + bias.float()
    if result_dtype == torch.int8:
        result = (result if offset is None else result + offset).round().clamp(-128, 127)
    return result.to(result_dtype).contiguous()
