"""sgl_kernel's per-token-group quantisation, first version: int8 or fp8 elements and a scale per group of a row.

Three operators are one kernel: `sgl_per_token_group_quant_8bit`, and in older builds `..._fp8` and `..._int8`. What is
modelled is the kernel that the wheels sgl-kernel 0.3.21 and sglang-kernel 0.4.10 contain (their symbols name its
parameters); one in between had the group size 128 alone and the fixed eps of version 2.

The wheels declare what is written (`Tensor! output_q`). The builds for MUSA and XPU, and CUDA builds of 2025, register
the same operator without the marks: a fake kernel would then make the call dead code, so those forms, `UNDECLARED`, and
the two operators that never had another form are for `fake_kernels.shadow`.

Source: sgl-project/sglang sgl-kernel/csrc/gemm/per_token_group_quant_8bit.cu, sgl-kernel/csrc/common_extension.cc and
common_extension_musa.cc.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, FakeKernel
from fake_kernels.library.group_scales import check_scales, is_column_major
from fake_kernels.library.quantisation_sgl_calls import all_refused, bad, valid
from fake_kernels.library.rounding import RANGES, ceil_log2, exp2, to_8bit, write_exponents

LIBRARY = "sgl_kernel"
SOURCE = "sgl-project/sglang sgl-kernel/csrc/gemm/per_token_group_quant_8bit.cu"
_WRITES = ("output_q", "output_s")
_PLAIN = ("rows", "columns", "aligned")
_CALLS: dict[str, Any] = {
    "inputs": (torch.bfloat16, torch.float16, torch.float32),
    "group_sizes": (128, 64, 8, 16),
    "epsilons": (1e-10, 1e-6),
}


def _reference(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool = False,
) -> None:
    groups = input.shape[-1] // group_size
    rows = input.numel() // max(input.shape[-1], 1)
    turned = output_s.dim() == 2 and output_s.stride(0) < output_s.stride(1)
    per_scale = 4 if scale_ue8m0 else 1
    fits = output_s.shape == (rows, -(-groups // per_scale)) and output_s.dtype in (torch.float32, torch.int32)
    if not (fits and (output_s.dtype == torch.int32) == scale_ue8m0):
        raise ValueError(f"no scales for {rows} rows of {groups} groups: {output_s.dtype} {list(output_s.shape)}")
    if not (output_s.stride(0) == 1 if turned else output_s.is_contiguous() and not scale_ue8m0):
        raise ValueError(f"scales in no layout that the kernel has: strides {output_s.stride()}")
    if not (input.is_contiguous() and output_q.is_contiguous() and output_q.shape == input.shape):
        raise ValueError("input and output_q are contiguous and of one shape")
    if input.dtype not in FLOATS or output_q.dtype not in RANGES:
        raise TypeError(f"{input.dtype} to {output_q.dtype}")
    if input.shape[-1] % group_size or group_size % (16 // input.element_size()):
        raise ValueError(f"groups of {group_size} in a row of {input.shape[-1]}")
    values = input.float().reshape(rows, groups, group_size)
    scales = values.abs().amax(-1).clamp(min=eps) / fp8_max
    if scale_ue8m0:
        exponents = ceil_log2(scales.clamp(min=1e-10))
        scales = exp2(exponents)
        write_exponents(exponents, output_s, clear=False)
    else:
        output_s.copy_(scales)
    quantised = (values / scales.unsqueeze(-1)).clamp(fp8_min, fp8_max)
    output_q.copy_(to_8bit(quantised, output_q.dtype).view(output_q.shape))


def _reference_plain(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, int8_min: float, int8_max: float
) -> None:
    _reference(input, output_q, output_s, group_size, eps, int8_min, int8_max)


def _arguments(draw: Draw) -> Call:
    return valid(draw, **_CALLS), {}


def _fp8_arguments(draw: Draw) -> Call:
    return valid(draw, outputs=(torch.float8_e4m3fn,), **_CALLS), {}


def _plain_fp8_arguments(draw: Draw) -> Call:
    return valid(draw, outputs=(torch.float8_e4m3fn,), layouts=_PLAIN, **_CALLS)[:-1], {}


def _int8_arguments(draw: Draw) -> Call:
    return valid(draw, outputs=(torch.int8,), layouts=_PLAIN, **_CALLS)[:-1], {}


def _check(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    scale_ue8m0: bool = False,
) -> None:
    torch._check(input.is_contiguous(), lambda: f"input must be contiguous; its strides are {list(input.stride())}")
    torch._check(
        output_q.is_contiguous(), lambda: f"output_q must be contiguous; its strides are {list(output_q.stride())}"
    )
    torch._check(input.dtype in FLOATS, lambda: f"input has to be float32, float16 or bfloat16, not {input.dtype}")
    torch._check(output_q.dtype in RANGES, lambda: f"output_q has to be float8_e4m3fn or int8, not {output_q.dtype}")
    torch._check(
        output_q.shape == input.shape,
        lambda: f"output_q has to have the shape of input, {list(input.shape)}, not {list(output_q.shape)}",
    )
    vector = 16 // input.element_size()
    torch._check(
        group_size > 0 and group_size % vector == 0,
        lambda: (
            f"group_size has to be a multiple of {vector} for {input.dtype}, not {group_size}: the rest of a group "
            "would be left unwritten"
        ),
    )
    torch._check(
        input.shape[-1] % group_size == 0,
        lambda: f"a row of input, {input.shape[-1]}, has to be a multiple of group_size {group_size}",
    )
    torch._check(output_s.dim() == 2, lambda: f"output_s has to have 2 dimensions, not {output_s.dim()}")
    torch._check(
        not scale_ue8m0 or is_column_major(output_s),
        lambda: "UE8M0 scales have to be column-major: the kernel writes ordinary ones otherwise",
    )
    check_scales(output_s, math.prod(input.shape[:-1]), input.shape[-1] // group_size, ue8m0=scale_ue8m0)


def sgl_per_token_group_quant_8bit(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
) -> None:
    """Writes `output_q` and `output_s`; returns nothing.

    `scale = max(eps, max |group|) / fp8_max`; `output_q = input / scale`, clamped to `fp8_min` and `fp8_max`, rounded
    to nearest for fp8 and towards zero for int8. With `scale_ue8m0` the scale is rounded up to a power of two, and kept
    as exponent + 127 in one byte; the bytes of groups that do not exist are left as they were.

    Args:
        input: `[..., K]` float32, float16 or bfloat16, contiguous.
        output_q: of its shape, float8_e4m3fn or int8, contiguous.
        output_s: scales for `rows` (all dimensions but the last) and `K // group_size` groups, 2 dimensions, in any
            layout of `group_scales`; row-major only without `scale_ue8m0`.
        group_size: divides K; a multiple of 8 (of 4 for float32).
    """
    _check(input, output_q, output_s, group_size, scale_ue8m0)


def _plain_fp8(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, fp8_min: float, fp8_max: float
) -> None:
    """As `sgl_per_token_group_quant_8bit` without UE8M0: the operator as the first builds of 2025 had it."""
    _check(input, output_q, output_s, group_size)


def sgl_per_token_group_quant_int8(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, int8_min: float, int8_max: float
) -> None:
    """As `sgl_per_token_group_quant_8bit` without UE8M0. Only builds of 2025 have it, and none of them marks what is
    written."""
    _check(input, output_q, output_s, group_size)


def _refusals(length: int) -> dict[str, Callable[[Draw], Call]]:
    cases = all_refused(length) | {
        "group_size has to be a multiple of 8": bad(length, group_size=4, output_s=torch.zeros(3, 64)),
        "has to be a multiple of group_size 96": bad(length, group_size=96),
    }
    return cases | ({"UE8M0 scales have to be column-major": bad(length, scale_ue8m0=True)} if length > 7 else {})


def _record(
    schema: str, fn: Callable[..., None], arguments: Callable[[Draw], Call], *, declared: bool, plain: bool = False
) -> FakeKernel:
    return FakeKernel(
        f"sgl_kernel::{schema}",
        fn,
        _reference_plain if plain else _reference,
        SOURCE,
        LIBRARY,
        arguments,
        _refusals(7 if plain else 8),
        () if declared else _WRITES,
    )


_8BIT = "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0) -> ()"

KERNELS = (
    _record(
        f"sgl_per_token_group_quant_8bit(Tensor input, Tensor! output_q, Tensor! output_s, {_8BIT}",
        sgl_per_token_group_quant_8bit,
        _arguments,
        declared=True,
    ),
    _record(
        f"sgl_per_token_group_quant_fp8(Tensor input, Tensor output_q, Tensor output_s, {_8BIT}",
        sgl_per_token_group_quant_8bit,
        _fp8_arguments,
        declared=False,
    ),
    _record(
        "sgl_per_token_group_quant_int8(Tensor input, Tensor output_q, Tensor output_s, int group_size, float eps, "
        "float int8_min, float int8_max) -> ()",
        sgl_per_token_group_quant_int8,
        _int8_arguments,
        declared=False,
        plain=True,
    ),
)
UNDECLARED = (
    _record(
        f"sgl_per_token_group_quant_8bit(Tensor input, Tensor output_q, Tensor output_s, {_8BIT}",
        sgl_per_token_group_quant_8bit,
        _arguments,
        declared=False,
    ),
    _record(
        "sgl_per_token_group_quant_fp8(Tensor input, Tensor output_q, Tensor output_s, int group_size, float eps, "
        "float fp8_min, float fp8_max) -> ()",
        _plain_fp8,
        _plain_fp8_arguments,
        declared=False,
        plain=True,
    ),
)
