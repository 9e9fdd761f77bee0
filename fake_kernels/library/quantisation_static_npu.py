"""torch_npu's quantisation with scales given.

The result is contiguous whatever the strides of the input; torch_npu's own fake keeps those of a permuted one. Not
modelled, and refused: hifloat8 and fp8, and scales of more than one dimension. The order of the eight int4 in an int32
was not found in writing; the first in the lowest bits is assumed.

Source: Ascend/op-plugin op_plugin/ops/opapi/QuantizeKernelNpuOpApi.cpp, op_plugin/ops/aclops/QuantizeKernelNpu.cpp;
formulas: docs/context/torch_npu-npu_quantize.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.dst_types_npu import INT4, INT8
from fake_kernels.library.rounding import pack_int4

_QINT8, _QUINT8, _QINT32 = 12, 13, 14
_DIVIDED = {_QINT8: torch.int8, _QUINT8: torch.uint8, 3: torch.int32, _QINT32: torch.int32}
_MULTIPLIED = {INT8: torch.int8, _QINT8: torch.int8, INT4: torch.int32}
_LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int32: (-(2**31), 2**31 - 1)}


def _quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    if dtype not in (_DIVIDED if div_mode else _MULTIPLIED) or scales.dim() != 1 or input.dtype not in FLOATS:
        raise ValueError(f"no quantisation of {input.dtype} to {dtype} with scales of {scales.dim()} dimensions")
    along = range(input.dim())[axis] if div_mode else input.dim() - (2 if axis == -2 else 1)
    size = input.shape[along]
    if scales.shape[0] != size and (div_mode or scales.shape[0] != 1):
        raise ValueError(f"{scales.shape[0]} scales for {size} elements")
    if zero_points is not None and zero_points.shape != scales.shape:
        raise ValueError(f"zero points {list(zero_points.shape)} for scales {list(scales.shape)}")
    if dtype == INT4 and not div_mode and input.shape[-1] % 8:
        raise ValueError("int4 comes in eights")
    shape = [-1 if dim == along else 1 for dim in range(input.dim())]
    factors = scales.float().reshape(shape)
    values = input.float() / factors if div_mode else input.float() * factors
    if zero_points is not None:
        values = values + zero_points.float().reshape(shape)
    whole = values.round()
    if dtype == INT4 and not div_mode:
        return pack_int4(whole.clamp(-8, 7))
    target = (_DIVIDED if div_mode else _MULTIPLIED)[dtype]
    return whole.double().clamp(*_LIMITS[target]).to(target).contiguous()


def _quantize_arguments(draw: Draw) -> Call:
    from_dtype, div_mode, with_zeros = draw.choice(*FLOATS), draw.flag(), draw.flag()
    dtype = draw.choice(*(_DIVIDED if div_mode else _MULTIPLIED))
    dims = draw.choice(2, 3, 1)
    axis = draw.choice(-1, *([1] if dims > 1 else []), *([-2] if dims > 1 else []), *([0] if div_mode else []))
    one = not div_mode and draw.flag()
    shape = (*draw.sizes(dims - 1), draw.size(times=8))
    x = draw.floats(*shape, dtype=from_dtype, scale=50.0)
    along = range(dims)[axis] if div_mode else dims - (2 if axis == -2 else 1)
    count = 1 if one else shape[along]
    scales = draw.floats(count, dtype=torch.float32).abs() + 0.5
    kind = torch.int32 if div_mode else torch.float32
    zeros = draw.integers(count, low=-5, high=5, dtype=kind) if with_zeros else None
    return (x, scales, zeros, dtype, axis, div_mode), {}


def _bad(x: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any) -> Callable[[Draw], Call]:
    tensors = (x, scales, zeros)
    return lambda draw: ((*(None if t is None else draw.there(t) for t in tensors), *rest), {})


_X, _S = torch.ones(3, 16), torch.ones(16)


@fake_kernel(
    "npu::npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) "
    "-> Tensor",
    reference=_quantize,
    source="Ascend/op-plugin op_plugin/ops/opapi/QuantizeKernelNpuOpApi.cpp, ../aclops/QuantizeKernelNpu.cpp",
    library="torch_npu",
    arguments=_quantize_arguments,
    refuses={
        "dtype 24 is not modelled": _bad(_X, _S, None, 24, -1, False),
        "scales is modelled with 1 dimension only": _bad(_X, _S.view(1, 16), None, _QINT8),
        "scales has to have 16 elements": _bad(_X, _S[:1], None, _QINT8),
        "zero_points has to be [16]": _bad(_X, _S, torch.zeros(3), _QINT8),
        "axis 2 is no dimension": _bad(_X, _S, None, _QINT8, 2),
        "divided by 8 for int4": _bad(_X[:, :12], _S[:12], None, INT4, -1, False),
    },
)
def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """`round(input / scales + zero_points)`, or with `div_mode=False` `round(input * scales + zero_points)`.

    Args:
        input: `[...]` float32, float16 or bfloat16.
        scales: `[n]`, the size of the dimension `axis`; or `[1]` with `div_mode=False`.
        zero_points: of the shape of `scales`.
        dtype: qint8 (12), quint8 (13), qint32 (14) or int32 (3); with `div_mode=False` int8 (1), qint8 (12) or
            quint4x2 (16).
        axis: any dimension; with `div_mode=False` -2, and everything else is the last one.

    Returns:
        int8, uint8 or int32 of the shape of `input`; for quint4x2 int32 with an eighth of the last dimension.
    """
    known = _DIVIDED if div_mode else _MULTIPLIED
    torch._check(
        dtype in known,
        lambda: f"dtype {dtype} is not modelled with div_mode {div_mode}; of its values there are {[*known]}",
    )
    torch._check(input.dtype in FLOATS, lambda: f"input has to be float32, float16 or bfloat16, not {input.dtype}")
    torch._check(scales.dim() == 1, lambda: f"scales is modelled with 1 dimension only, not {scales.dim()}")
    dims = input.dim()
    torch._check(
        not div_mode or -dims <= axis < dims, lambda: f"axis {axis} is no dimension of an input that has {dims}"
    )
    size = input.shape[axis if div_mode or axis == -2 else -1]
    torch._check(
        scales.shape[0] == size or (not div_mode and scales.shape[0] == 1),
        lambda: f"scales has to have {size} elements, not {scales.shape[0]}",
    )
    if zero_points is not None:
        torch._check(
            zero_points.dim() == 1 and zero_points.shape[0] == scales.shape[0],
            lambda: f"zero_points has to be [{scales.shape[0]}], not {list(zero_points.shape)}",
        )
    if dtype == INT4 and not div_mode:
        columns = input.shape[-1]
        torch._check(columns % 8 == 0, lambda: f"the last dimension has to be divided by 8 for int4, and is {columns}")
        return input.new_empty((*input.shape[:-1], columns // 8), dtype=torch.int32)
    return input.new_empty(input.shape, dtype=known[dtype])


KERNELS = (npu_quantize,)
