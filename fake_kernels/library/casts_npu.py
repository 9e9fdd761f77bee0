"""torch_npu's casts between dtypes.

Every result is fresh and contiguous: also where the dtype is the same, since a clone is contiguous on an NPU. The two
backwards make their argument require a gradient as well, which no graph shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel

_CAST = "Ascend/op-plugin op_plugin/ops/opapi/CastKernelNpuOpApi.cpp"
_NUMBERS = {  # what c10::ScalarType and torch_npu call these dtypes
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
}
_DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.int8, torch.bool)


def _cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _cast_arguments(draw: Draw) -> Call:
    source, target = draw.choice(*_DTYPES), draw.choice(*_DTYPES)
    shape = draw.shape(0, 4)
    return (draw.floats(*shape, dtype=source, scale=20.0), target), {}


@fake_kernel(
    "npu::_npu_dtype_cast(Tensor input, ScalarType dtype) -> Tensor",
    reference=_cast,
    source=_CAST + "; Ascend/pytorch torch_npu/csrc/aten/common/TensorFactories.cpp (clone)",
    library="torch_npu",
    arguments=_cast_arguments,
)
def _npu_dtype_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """`input` in another dtype: fresh and contiguous, also where it has that dtype already."""
    return input.new_empty(input.shape, dtype=dtype)


def _cast_back(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype, copy=True, memory_format=torch.contiguous_format)


@fake_kernel(
    "npu::_npu_dtype_cast_backward(Tensor grad, ScalarType dtype) -> Tensor",
    reference=_cast_back,
    source=_CAST,
    library="torch_npu",
    arguments=_cast_arguments,
)
def _npu_dtype_cast_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` in the dtype that the argument of the cast had: fresh and contiguous."""
    return grad.new_empty(grad.shape, dtype=dtype)


def _numbered(number: int) -> torch.dtype:
    torch._check(
        number in _NUMBERS,
        lambda: f"dtype {number} is not one that torch has; torch_npu's own (int4, float4, hifloat8) are not covered",
    )
    return _NUMBERS[number]


def _cast_to_number(input: Tensor, dtype: int, input_dtype: int | None = None) -> Tensor:
    names = dict(
        zip(["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"], range(8), strict=True)
    )
    names |= {"bool": 11, "bfloat16": 15, "float8_e5m2": 23, "float8_e4m3fn": 24}
    found = [name for name, number in names.items() if number == dtype]
    if not found or input_dtype not in (None, *names.values()):
        raise RuntimeError(f"no torch.dtype is {dtype} or {input_dtype}")
    return _cast(input, getattr(torch, found[0]))


def _number_arguments(draw: Draw) -> Call:
    source, target, named = draw.choice(*_DTYPES), draw.choice(6, 5, 15, 3, 4, 0, 11, 24), draw.flag()
    own = next(number for number, dtype in _NUMBERS.items() if dtype is source)
    shape = draw.shape(0, 4)
    return (draw.floats(*shape, dtype=source, scale=20.0), target, own if named else None), {}


def _to_int4(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float16), 285), {}


@fake_kernel(
    "npu::npu_dtype_cast(Tensor input, int dtype, int? input_dtype=None) -> Tensor",
    reference=_cast_to_number,
    source=_CAST,
    library="torch_npu",
    arguments=_number_arguments,
    refuses={"is not one that torch has": _to_int4},
)
def npu_dtype_cast(input: Tensor, dtype: int, input_dtype: int | None = None) -> Tensor:
    """`input` in the dtype of that number: fresh and contiguous.

    torch_npu's own dtypes, which lie in uint8 memory of other sizes, are refused: nothing here computes with them.
    """
    if input_dtype is not None:
        _numbered(input_dtype)
    return input.new_empty(input.shape, dtype=_numbered(dtype))


def _back_arguments(draw: Draw) -> Call:
    source, target, named = draw.choice(*_DTYPES), draw.choice(*_DTYPES), draw.flag()
    number = next(number for number, dtype in _NUMBERS.items() if dtype is target)
    return (draw.floats(*draw.shape(0, 4), dtype=source, scale=20.0), target), {
        "input_dtype": number if named else None
    }


def _from_int4(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float16), torch.float16), {"input_dtype": 285}


def _cast_number_back(
    grad: Tensor, dtype: torch.dtype, grad_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return _cast(grad, dtype) if input_dtype is None else _cast_to_number(grad, input_dtype, grad_dtype)


@fake_kernel(
    "npu::npu_dtype_cast_backward(Tensor grad, ScalarType dtype, int? grad_dtype=None, int? input_dtype=None) "
    "-> Tensor",
    reference=_cast_number_back,
    source=_CAST,
    library="torch_npu",
    arguments=_back_arguments,
    refuses={"is not one that torch has": _from_int4},
)
def npu_dtype_cast_backward(
    grad: Tensor, dtype: torch.dtype, grad_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """`grad` in the dtype numbered `input_dtype`, or else in `dtype`: fresh and contiguous."""
    if grad_dtype is not None:
        _numbered(grad_dtype)
    return grad.new_empty(grad.shape, dtype=dtype if input_dtype is None else _numbered(input_dtype))


KERNELS = (_npu_dtype_cast, _npu_dtype_cast_backward, npu_dtype_cast, npu_dtype_cast_backward)
