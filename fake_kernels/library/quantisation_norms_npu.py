"""torch_npu's RMS norm of a sum that quantises what it normalises, by scales given.

What CANN's kernels compute is closed, and taken from the formulas of op-plugin's documentation. A second quantised
result that was not asked for has no defined contents; the reference has zeros there.

Source: Ascend/op-plugin op_plugin/ops/opapi/AddRmsNormQuantKernelOpApi.cpp; formulas:
docs/context/torch_npu-npu_add_rms_norm_quant.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.dst_types_npu import DTYPES, INT4, empty_quantised, quantised

LIBRARY = "torch_npu"
_WHOLE = tuple(number for number in DTYPES if number != INT4)
_Results = tuple[Tensor, Tensor, Tensor]


def normalised(x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """For references: what is quantised, in float32, and the sum."""
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{x1.dtype} {list(x1.shape)} and {x2.dtype} {list(x2.shape)}")
    if gamma.dim() > x1.dim() or x1.shape[x1.dim() - gamma.dim() :] != gamma.shape:
        raise ValueError(f"gamma {list(gamma.shape)} for {list(x1.shape)}")
    total = (x1.float() + x2.float()).to(x1.dtype).contiguous()
    wide = total.float()
    over = tuple(range(-gamma.dim(), 0))
    y = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + epsilon) * gamma.float()
    return (y if beta is None else y + beta.float()), total


def _static(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> _Results:
    if axis != -1 or dst_type == INT4:
        raise ValueError(f"axis {axis}, to {dst_type}")
    y, total = normalised(x1, x2, gamma, beta, epsilon)
    results = []
    for scales, zeros in ((scales1, zero_points1), (scales2, zero_points2)):
        if any(given is not None and given.shape != gamma.shape for given in (scales, zeros, beta)):
            raise ValueError(f"scales and zero points are of the shape of gamma, {list(gamma.shape)}")
        if scales is None:
            results.append(quantised(torch.zeros_like(y), dst_type))
            continue
        scaled = y / scales.float() if div_mode else y * scales.float()
        results.append(quantised(scaled if zeros is None else scaled + zeros.float(), dst_type))
    return results[0], results[1], total


def _static_arguments(draw: Draw) -> Call:
    dtype, dst_type, div_mode = draw.choice(*HALVES), draw.choice(None, *_WHOLE), draw.flag()
    with_zeros, with_beta, second = draw.flag(), draw.flag(), draw.flag()
    leading, columns = draw.sizes(draw.choice(1, 2, 0), least=1), draw.size(least=1)
    x1, x2 = (draw.floats(*leading, columns, dtype=dtype) for _ in range(2))
    scales = [draw.floats(columns, dtype=torch.float32).abs() + 0.1 for _ in range(2)]
    zeros = [draw.integers(columns, low=-3, high=3, dtype=torch.int32) if with_zeros else None for _ in range(2)]
    beta = draw.floats(columns, dtype=dtype) if with_beta else None
    args = (x1, x2, draw.floats(columns, dtype=dtype), scales[0], zeros[0], beta, *([scales[1], zeros[1]] * second))
    return args, {"div_mode": div_mode} | ({} if dst_type is None else {"dst_type": dst_type})


def check(x1: Tensor, x2: Tensor, gamma: Tensor, **like_gamma: Tensor | None) -> None:
    """For fake kernels: types and sizes."""
    torch._check(
        x1.dtype in HALVES and x2.dtype == x1.dtype,
        lambda: f"x1 and x2 have to be both float16 or both bfloat16, not {x1.dtype} and {x2.dtype}",
    )
    torch._check(x1.shape == x2.shape, lambda: f"x1 and x2 are of different sizes: {list(x1.shape)}, {list(x2.shape)}")
    torch._check(
        gamma.dim() <= x1.dim() and x1.shape[x1.dim() - gamma.dim() :] == gamma.shape,
        lambda: f"gamma has to have the last sizes of x1, {list(x1.shape)}, not {list(gamma.shape)}",
    )
    for name, tensor in like_gamma.items():
        torch._check(
            tensor is None or tensor.shape == gamma.shape,
            lambda name=name: f"{name} has to have the sizes of gamma, {list(gamma.shape)}",
        )


def bad(columns: int = 8, **changed: Any) -> Callable[[Draw], Call]:
    """A call of what both operators have, apart from what is `changed`; `rest` are more positional arguments."""

    def draw_call(draw: Draw) -> Call:
        half = torch.ones(3, columns).half()
        given = {"x1": half, "x2": half, "gamma": half[0]} | changed
        args = [draw.there(given.pop(name)) for name in ("x1", "x2", "gamma")]
        rest = given.pop("rest", ())
        return (*args, *(draw.there(value) if isinstance(value, Tensor) else value for value in rest)), given

    return draw_call


_HALF = torch.ones(3, 8, device="cpu").half()
_REST = (torch.ones(8), None)


@fake_kernel(
    "npu::npu_add_rms_norm_quant(Tensor x1, Tensor x2, Tensor gamma, Tensor scales1, Tensor? zero_points1, "
    "Tensor? beta=None, Tensor? scales2=None, Tensor? zero_points2=None, *, int axis=-1, float epsilon=1e-06, "
    "bool div_mode=True, int? dst_type=None) -> (Tensor, Tensor, Tensor)",
    reference=_static,
    source="Ascend/op-plugin op_plugin/ops/opapi/AddRmsNormQuantKernelOpApi.cpp",
    library=LIBRARY,
    arguments=_static_arguments,
    refuses={
        "x1 and x2 have to be both": bad(x1=_HALF.float(), rest=_REST),
        "x1 and x2 are of different sizes": bad(x2=_HALF[:2], rest=_REST),
        "gamma has to have the last sizes of x1": bad(gamma=_HALF[0, :5], rest=_REST),
        "scales1 has to have the sizes of gamma": bad(rest=(torch.ones(1), None)),
        "axis has to be -1": bad(rest=_REST, axis=0),
        "dst_type 16 is not modelled": bad(rest=_REST, dst_type=INT4),
    },
)
def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> _Results:
    """`y = rms_norm(x1 + x2) * gamma + beta`, quantised twice: `round(y / scales + zero_points)`, `* scales` without
    `div_mode`.

    Args:
        x1, x2: `[...]` float16 or bfloat16.
        gamma, beta, scales1, scales2, zero_points1, zero_points2: the last sizes of `x1`.
        dst_type: int8 (1, or None), float8_e5m2 (23, 291) or float8_e4m3fn (24, 292).

    Returns:
        Quantised with the first scales; with the second (without defined contents if there are none); `x1 + x2`. All
        of the shape of `x1`, contiguous.
    """
    torch._check(axis == -1, lambda: f"axis has to be -1, not {axis}")
    check(
        x1, x2, gamma, scales1=scales1, zero_points1=zero_points1, beta=beta, scales2=scales2, zero_points2=zero_points2
    )
    first, second = (empty_quantised(x1, dst_type, _WHOLE) for _ in range(2))
    return first, second, x1.new_empty(x1.shape)


KERNELS = (npu_add_rms_norm_quant,)
