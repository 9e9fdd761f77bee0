"""What the references of torch_npu's dynamic quantisation have in common: smoothing, and what shares a scale.

Source: Ascend/op-plugin docs/context/torch_npu-npu_dynamic_quant.md, hicann/ops-nn quant/dynamic_quant_v2/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def smoothed(input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None) -> Tensor:
    values = input.float()
    if smooth_scales is None:
        return values
    if smooth_scales.dtype != input.dtype or smooth_scales.shape[-1] != input.shape[-1]:
        raise ValueError(f"smooth scales {smooth_scales.dtype} {list(smooth_scales.shape)} for {list(input.shape)}")
    if group_index is None:
        return values * smooth_scales.float()
    ends = group_index.tolist()
    rows = values.reshape(-1, values.shape[-1])
    if len(ends) != len(smooth_scales) or ends[-1:] != [len(rows)] or ends != sorted(ends):
        raise ValueError(f"groups that end at {ends} do not cut {len(rows)} rows into {len(smooth_scales)}")
    counts = torch.diff(group_index.long(), prepend=group_index.new_zeros(1).long())
    return (rows * smooth_scales.float().repeat_interleave(counts, 0)).view(values.shape)


def reduced(values: Tensor, quant_mode: str, extreme: Callable[..., Tensor]) -> Tensor:
    """The extreme value that belongs to each element, in the shape of `values` with 1 where it was taken over."""
    dims: Any = {"pertoken": -1, "perchannel": -2, "pertensor": tuple(range(values.dim()))}[quant_mode]
    return extreme(values, dims, True)


def scales_of(scale: Tensor, quant_mode: str) -> Tensor:
    if quant_mode == "pertensor":
        return scale.reshape(1)
    return scale.squeeze(-1 if quant_mode == "pertoken" else -2).contiguous()


def expect(input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, mode: str, own_top: float) -> None:
    if input.dtype not in (torch.float16, torch.bfloat16) or input.dim() < 2:
        raise TypeError(f"{input.dtype} of {input.dim()} dimensions is not quantised")
    if (
        mode not in ("pertoken", "perchannel", "pertensor")
        or own_top
        or (smooth_scales is not None and mode != "pertoken")
    ):
        raise ValueError(f"no model of mode {mode} with {own_top}")
    if smooth_scales is not None and smooth_scales.dim() != (1 if group_index is None else 2):
        raise ValueError(f"smooth scales of {smooth_scales.dim()} dimensions")
    if group_index is not None and (smooth_scales is None or group_index.dtype != torch.int32):
        raise ValueError("groups are of smooth scales, by int32")
