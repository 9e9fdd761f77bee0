"""torch_npu's dynamic quantisation: the scale is computed from what is quantised, per token, per channel or per tensor.

Results are contiguous whatever the strides of the input; torch_npu's own fakes keep the strides of a permuted one. Not
modelled, and refused: hifloat8 and a `dst_type_max` of one's own, smooth scales other than per token, and fp8 for the
asymmetric one. The order of the eight int4 in an int32 was not found in writing; the first in the lowest bits is
assumed. Rows that are all zero (asymmetric: constant) have the scale 0; what the kernel writes for them was not read,
the reference writes zeros.

Source: Ascend/op-plugin op_plugin/ops/opapi/DynamicQuantKernelNpuOpApi.cpp, and for the formulas
docs/context/torch_npu-npu_dynamic_quant.md, torch_npu-npu_dynamic_quant_asymmetric.md and hicann/ops-nn
quant/dynamic_quant_v2/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.dst_types_npu import DTYPES, FP8_E4M3, INT4, INT8, empty_quantised, quantised, top
from fake_kernels.library.quantisation_reference_npu import expect, reduced, scales_of, smoothed

LIBRARY = "torch_npu"
SOURCE = "Ascend/op-plugin op_plugin/ops/opapi/DynamicQuantKernelNpuOpApi.cpp"
_MODES = ("pertoken", "perchannel", "pertensor")
_INTEGERS = (INT8, INT4)
_ARGUMENTS = (
    "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.) -> '
)


def _symmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    expect(input, smooth_scales, group_index, quant_mode, dst_type_max)
    values = smoothed(input, smooth_scales, group_index)
    scale = reduced(values.abs(), quant_mode, torch.amax) / top(dst_type)
    y = torch.where(scale == 0, 0.0, values / scale)
    return quantised(y, dst_type), scales_of(scale, quant_mode)


def _asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    expect(input, smooth_scales, group_index, quant_mode, dst_type_max)
    if dst_type not in (None, INT8, INT4):
        raise ValueError(f"no model of the asymmetric quantisation to {dst_type}")
    values = smoothed(input, smooth_scales, group_index)
    greatest = reduced(values, quant_mode, torch.amax)
    scale = (greatest - reduced(values, quant_mode, torch.amin)) / (2 * top(dst_type) + 1)
    offset = top(dst_type) - greatest / scale
    y = torch.where(scale == 0, 0.0, values / scale + offset)
    return quantised(y, dst_type), scales_of(scale, quant_mode), scales_of(offset, quant_mode)


def _draw(draw: Draw, dst_types: tuple[int | None, ...]) -> Call:
    dtype, dst_type, mode = draw.choice(*HALVES), draw.choice(*dst_types), draw.choice(*_MODES)
    smooth = draw.choice("none", "all", "groups") if mode == "pertoken" else "none"
    leading = draw.sizes(draw.choice(1, 2, 3), least=1)
    columns = draw.size(least=1, most=4, times=8)
    x = draw.floats(*leading, columns, dtype=dtype)
    options: dict[str, Any] = {} if dst_type is None else {"dst_type": dst_type}
    if mode != "pertoken" or draw.flag():
        options["quant_mode"] = mode
    if smooth == "all":
        options["smooth_scales"] = draw.floats(columns, dtype=dtype)
    if smooth == "groups":
        groups, rows = draw.size(least=1), x.numel() // columns
        ends = draw.integers(groups, low=0, high=rows + 1, dtype=torch.int32, layout="contiguous").sort().values
        ends[-1] = rows
        options |= {"smooth_scales": draw.floats(groups, columns, dtype=dtype), "group_index": ends}
    return (x,), options


def _arguments(draw: Draw) -> Call:
    return _draw(draw, (None, *DTYPES))


def _asymmetric_arguments(draw: Draw) -> Call:
    return _draw(draw, (None, *_INTEGERS))


def _bad(*shape: int, dtype: torch.dtype = torch.float16, **options: Any) -> Callable[[Draw], Call]:
    return lambda draw: ((draw.floats(*shape, dtype=dtype),), options)


_SCALES = torch.ones(8, dtype=torch.float16, device="cpu")
_REFUSES = {
    "input has to have more than 1 dimension": _bad(8),
    "input has to be float16 or bfloat16": _bad(3, 8, dtype=torch.float32),
    "divided by 8 for int4": _bad(3, 6, dst_type=INT4),
    "dst_type 290 is not modelled": _bad(3, 8, dst_type=290),
    "dst_type_max is not modelled": _bad(3, 8, dst_type_max=15.0),
    "quant_mode has to be one of": _bad(3, 8, quant_mode="pergroup"),
    "smooth_scales is modelled per token only": _bad(3, 8, smooth_scales=_SCALES, quant_mode="perchannel"),
    "smooth_scales has to be": _bad(3, 8, smooth_scales=_SCALES[:5]),
    "group_index has to be int32": _bad(3, 8, smooth_scales=_SCALES.view(1, 8), group_index=torch.tensor([3])),
}


def _check(
    input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, quant_mode: str, dst_type_max: float
) -> list[Any]:
    """Checks what the kernel or its documentation demands; the shape of the scales."""
    torch._check(input.dim() > 1, lambda: f"input has to have more than 1 dimension, not {input.dim()}")
    torch._check(input.dtype in HALVES, lambda: f"input has to be float16 or bfloat16, not {input.dtype}")
    torch._check(quant_mode in _MODES, lambda: f"quant_mode has to be one of {', '.join(_MODES)}, not {quant_mode!r}")
    torch._check(dst_type_max == 0.0, lambda: f"dst_type_max is not modelled; it is {dst_type_max}, not 0")
    if group_index is not None:
        torch._check(smooth_scales is not None, lambda: "group_index is modelled with smooth_scales only")
    if smooth_scales is not None:
        torch._check(quant_mode == "pertoken", lambda: f"smooth_scales is modelled per token only, not {quant_mode}")
        torch._check(
            smooth_scales.dim() == (1 if group_index is None else 2)
            and smooth_scales.shape[-1] == input.shape[-1]
            and smooth_scales.dtype == input.dtype,
            lambda: (
                f"smooth_scales has to be {input.dtype} [{'' if group_index is None else 'groups, '}"
                f"{input.shape[-1]}], not {smooth_scales.dtype} {list(smooth_scales.shape)}"
            ),
        )
        if group_index is not None:
            torch._check(
                group_index.dtype == torch.int32
                and group_index.dim() == 1
                and group_index.shape[0] == smooth_scales.shape[0],
                lambda: (
                    f"group_index has to be int32 [{smooth_scales.shape[0]}], not {group_index.dtype} "
                    f"{list(group_index.shape)}"
                ),
            )
    if quant_mode == "pertensor":
        return [1]
    return [*input.shape[:-2], input.shape[-1] if quant_mode == "perchannel" else input.shape[-2]]


@fake_kernel(
    f"npu::npu_dynamic_quant{_ARGUMENTS}(Tensor, Tensor)",
    reference=_symmetric,
    source=SOURCE,
    library=LIBRARY,
    arguments=_arguments,
    refuses=_REFUSES,
)
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`scale = max |x * smooth_scales| / MAX`, `y = round(x * smooth_scales / scale)`, MAX the greatest of the type.

    Args:
        input: `[..., M, K]` float16 or bfloat16.
        smooth_scales: `[K]` of its dtype; `[E, K]` with `group_index`.
        group_index: int32 `[E]`: where the rows end that each of the smooth scales is for; the last is the number of
            all rows.
        dst_type: int8 (1, or None), int4 (16), float8_e5m2 (23, 291) or float8_e4m3fn (24, 292).
        quant_mode: what shares a scale: "pertoken", "perchannel", "pertensor".

    Returns:
        `y` `[..., M, K]`, for int4 int32 `[..., M, K // 8]`; `scale` float32 `[..., M]`, perchannel `[..., K]`,
        pertensor `[1]`. Both contiguous.
    """
    shape = _check(input, smooth_scales, group_index, quant_mode, dst_type_max)
    return empty_quantised(input, dst_type), input.new_empty(shape, dtype=torch.float32)


@fake_kernel(
    f"npu::npu_dynamic_quant_asymmetric{_ARGUMENTS}(Tensor, Tensor, Tensor)",
    reference=_asymmetric,
    source=SOURCE,
    library=LIBRARY,
    arguments=_asymmetric_arguments,
    refuses={**_REFUSES, f"dst_type {FP8_E4M3} is not modelled": _bad(3, 8, dst_type=FP8_E4M3)},
)
def npu_dynamic_quant_asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`scale = (max x - min x) / (MAX - MIN)`, `offset = MAX - max x / scale`, `y = round(x / scale + offset)`.

    Arguments as of `npu_dynamic_quant`; `dst_type` int8 or int4. Returns `y`, `scale`, and `offset` like `scale`.
    """
    shape = _check(input, smooth_scales, group_index, quant_mode, dst_type_max)
    scale, offset = (input.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return empty_quantised(input, dst_type, _INTEGERS), scale, offset


KERNELS = (npu_dynamic_quant, npu_dynamic_quant_asymmetric)
