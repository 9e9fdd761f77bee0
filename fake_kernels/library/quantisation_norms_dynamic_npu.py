"""torch_npu's RMS norm of a sum that quantises what it normalises, by scales that it computes per token.

A result that is not asked for has no dimensions, and no defined contents; torch_npu's own fake gives it the size 0.

Source: Ascend/op-plugin op_plugin/ops/opapi/AddRmsNormDynamicQuantKernelNpuOpApi.cpp; formulas:
docs/context/torch_npu-npu_add_rms_norm_dynamic_quant.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.dst_types_npu import DTYPES, INT4, INT8, empty_quantised, quantised, top
from fake_kernels.library.quantisation_norms_npu import bad, check, normalised

_HALF = torch.ones(3, 8, device="cpu").half()


def _dynamic(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if gamma.dim() != 1 or x1.dim() < 2 or (output_mask is not None and not any(output_mask)):
        raise ValueError(f"gamma of {gamma.dim()} dimensions, x1 of {x1.dim()}, {output_mask}")
    if any(given is not None and given.shape != gamma.shape for given in (smooth_scale1, smooth_scale2, beta)):
        raise ValueError(f"smooth scales and beta are of the shape of gamma, {list(gamma.shape)}")
    y, total = normalised(x1, x2, gamma, beta, epsilon)
    both = smooth_scale1 is not None and smooth_scale2 is not None
    asked = [True, both] if output_mask is None else output_mask
    results, scales = [], []
    for wanted, smooth in zip(asked, (smooth_scale1, smooth_scale2), strict=True):
        if not wanted:
            results.append(torch.zeros((), dtype=DTYPES[INT8 if y_dtype is None else y_dtype], device=y.device))
            scales.append(y.new_zeros(()))
            continue
        values = y if smooth is None else y * smooth.float()
        scale = values.abs().amax(-1, keepdim=True) / top(y_dtype)
        results.append(quantised(torch.where(scale == 0, 0.0, values / scale), y_dtype))
        scales.append(scale.squeeze(-1).contiguous())
    return results[0], results[1], total, scales[0], scales[1]


def _dynamic_arguments(draw: Draw) -> Call:
    dtype, y_dtype, with_beta = draw.choice(*HALVES), draw.choice(None, *DTYPES), draw.flag()
    mask = draw.choice(None, [True, True], [True, False], [False, True])
    smooth = [draw.flag() and (mask is None or mask[0]), draw.flag() and (mask is None or mask[1])]
    if mask is None and smooth[1]:
        smooth[0] = True  # the second goes with the first
    leading, columns = draw.sizes(draw.choice(1, 2), least=1), draw.size(least=1, times=8)
    x1, x2 = (draw.floats(*leading, columns, dtype=dtype) for _ in range(2))
    options: dict[str, Any] = {"output_mask": mask} if mask else {}
    for number, given in enumerate(smooth, 1):
        if given:
            options[f"smooth_scale{number}"] = draw.floats(columns, dtype=dtype)
    if with_beta:
        options["beta"] = draw.floats(columns, dtype=dtype)
    if y_dtype is not None:
        options["y_dtype"] = y_dtype
    return (x1, x2, draw.floats(columns, dtype=dtype)), options


@fake_kernel(
    "npu::npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, Tensor? smooth_scale1=None, "
    "Tensor? smooth_scale2=None, Tensor? beta=None, float epsilon=1e-06, bool[2]? output_mask=None, "
    "int? y_dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_dynamic,
    source="Ascend/op-plugin op_plugin/ops/opapi/AddRmsNormDynamicQuantKernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_dynamic_arguments,
    refuses={
        "x1 and x2 are of different sizes": bad(x2=_HALF[:2]),
        "x1 has to have 2 to 8 dimensions": bad(x1=_HALF[0], x2=_HALF[0]),
        "gamma has to have 1 dimension": bad(gamma=_HALF),
        "smooth_scale1 has to have the sizes of gamma": bad(smooth_scale1=torch.ones(1).half()),
        "at least one of the two": bad(output_mask=[False, False]),
        "divided by 8 for int4": bad(6, y_dtype=INT4),
        "dst_type 290 is not modelled": bad(y_dtype=290),
    },
)
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`y = rms_norm(x1 + x2) * gamma + beta`; twice `scale = max |y * smooth| / MAX`, `round(y * smooth / scale)`.

    Args:
        x1, x2: `[..., K]` float16 or bfloat16, 2 to 8 dimensions.
        gamma, beta, smooth_scale1, smooth_scale2: `[K]`.
        output_mask: which of the two is asked for; without it the first, and the second if both smooth scales are
            given.
        y_dtype: as `dst_type` of `npu_dynamic_quant`.

    Returns:
        The two quantised results, `[..., K]`, for int4 int32 `[..., K // 8]`; `x1 + x2`; the scales of the two, float32
        `[...]` without K. What was not asked for has no dimensions (and one element).
    """
    torch._check(2 <= x1.dim() <= 8, lambda: f"x1 has to have 2 to 8 dimensions, not {x1.dim()}")
    torch._check(gamma.dim() == 1, lambda: f"gamma has to have 1 dimension, not {gamma.dim()}")
    check(x1, x2, gamma, smooth_scale1=smooth_scale1, smooth_scale2=smooth_scale2, beta=beta)
    if output_mask is None:
        asked = [True, smooth_scale1 is not None and smooth_scale2 is not None]
    else:
        asked = list(output_mask)
        torch._check(any(asked), lambda: "output_mask has to ask for at least one of the two results")
    quantised_like = empty_quantised(x1, y_dtype)
    results = [
        quantised_like.new_empty(quantised_like.shape if wanted else (), dtype=quantised_like.dtype) for wanted in asked
    ]
    scales = [x1.new_empty(x1.shape[:-1] if wanted else (), dtype=torch.float32) for wanted in asked]
    return results[0], results[1], x1.new_empty(x1.shape), scales[0], scales[1]


KERNELS = (npu_add_rms_norm_dynamic_quant,)
