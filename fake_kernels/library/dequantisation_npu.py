"""torch_npu's way back from int8, int4 and fp8 to floats.

The result is contiguous whatever the strides of the input; torch_npu's own fake keeps those of a permuted one. Not
modelled, and refused: hifloat8. The order of the eight int4 in an int32 was not found in writing; the first in the
lowest bits is assumed.

Source: Ascend/op-plugin op_plugin/ops/opapi/AntiQuantKernelNpuOpApi.cpp; formula:
docs/context/torch_npu-npu_anti_quant.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.dst_types_npu import FLOAT_DTYPES, INT4, INT8
from fake_kernels.library.rounding import unpack_int4

_PACKED = (torch.int32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16)
_SOURCES = {torch.int8: (INT8,), torch.int32: (INT4, 285), torch.float8_e4m3fn: (24, 292), torch.float8_e5m2: (23, 291)}


def _anti_quant(
    x: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> Tensor:
    if x.dtype not in _PACKED or (src_dtype is not None and src_dtype not in _SOURCES[x.dtype]) or not x.dim():
        raise TypeError(f"{x.dtype} as {src_dtype}")
    if dst_dtype not in (None, 5, 15) or scale.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"to {dst_dtype} with {scale.dtype}")
    if x.dtype.is_floating_point and scale.dtype != torch.float32:
        raise TypeError("fp8 has scales of float32")
    values = unpack_int4(x) if x.dtype == torch.int32 else x.float()
    if scale.dim() != 1 or scale.shape[0] not in (1, values.shape[-1]):
        raise ValueError(f"scales {list(scale.shape)} for {list(values.shape)}")
    if offset is not None:
        if offset.shape != scale.shape or offset.dtype != scale.dtype:
            raise ValueError(f"offset {offset.dtype} {list(offset.shape)}")
        values = values + offset.float()
    return (values * scale.float()).to(FLOAT_DTYPES[5 if dst_dtype is None else dst_dtype]).contiguous()


def _anti_quant_arguments(draw: Draw) -> Call:
    dtype, dst_dtype, one = draw.choice(*_PACKED), draw.choice(None, 5, 15), draw.flag()
    src_dtype = draw.choice(None, *_SOURCES[dtype])
    scale_dtype = torch.float32 if dtype.is_floating_point else draw.choice(torch.float32, torch.bfloat16)
    with_offset = draw.flag()
    shape = draw.shape(1, 3)
    if dtype.is_floating_point:
        x = draw.floats(*shape, dtype=dtype)
    else:
        bits = 31 if dtype == torch.int32 else 7
        x = draw.integers(*shape, low=-(2**bits), high=2**bits, dtype=dtype)
    count = 1 if one else shape[-1] * (8 if dtype == torch.int32 else 1)
    options: dict[str, Any] = {} if src_dtype is None else {"src_dtype": src_dtype}
    if dst_dtype is not None:
        options["dst_dtype"] = dst_dtype
    if with_offset:
        options["offset"] = draw.floats(count, dtype=scale_dtype)
    return (x, draw.floats(count, dtype=scale_dtype)), options


def _bad(x: Tensor, scale: Tensor, **options: Any) -> Callable[[Draw], Call]:
    return lambda draw: ((draw.there(x), draw.there(scale)), options)


_S = torch.ones(16, device="cpu")
_I = torch.ones(3, 16, dtype=torch.int8, device="cpu")


@fake_kernel(
    "npu::npu_anti_quant(Tensor x, Tensor scale, *, Tensor? offset=None, int? dst_dtype=None, int? src_dtype=None) "
    "-> Tensor",
    reference=_anti_quant,
    source="Ascend/op-plugin op_plugin/ops/opapi/AntiQuantKernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_anti_quant_arguments,
    refuses={
        "x has to be int8, int32": _bad(_I.float(), _S),
        "x has to have dimensions": _bad(_I[0, 0].int(), _S[:8]),
        "src_dtype 16 does not fit x of torch.int8": _bad(_I, _S, src_dtype=INT4),
        "dst_dtype 6 is not modelled": _bad(_I, _S, dst_dtype=6),
        "scale has to be float32 or bfloat16": _bad(_I, _S.half()),
        "scale of fp8 has to be float32": _bad(_I.to(torch.float8_e4m3fn), _S.bfloat16()),
        "scale has to be [1] or [16]": _bad(_I, _S[:3]),
        "offset has to be torch.float32 [16]": _bad(_I, _S, offset=torch.ones(1)),
    },
)
def npu_anti_quant(
    x: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> Tensor:
    """`(x + offset) * scale`.

    Args:
        x: `[..., K]` int8, float8_e4m3fn or float8_e5m2; or int32 `[..., K // 8]`, eight int4 in each.
        scale: `[1]` or `[K]` float32 or bfloat16; float32 for fp8.
        offset: like `scale`.
        dst_dtype: float16 (5, or None) or bfloat16 (15).
        src_dtype: what `x` holds, if given: int8 (1), int4 (16, 285), fp8 (23, 24, 291, 292).

    Returns:
        `[..., K]`, contiguous.
    """
    torch._check(
        x.dtype in _PACKED, lambda: f"x has to be int8, int32 (of int4), float8_e4m3fn or _e5m2, not {x.dtype}"
    )
    torch._check(x.dim() > 0, lambda: "x has to have dimensions")
    torch._check(
        src_dtype is None or src_dtype in _SOURCES[x.dtype],
        lambda: f"src_dtype {src_dtype} does not fit x of {x.dtype}; it may be {_SOURCES[x.dtype]}",
    )
    number = 5 if dst_dtype is None else dst_dtype
    torch._check(number in (5, 15), lambda: f"dst_dtype {number} is not modelled; of its values there are 5 and 15")
    torch._check(scale.dtype in _SCALES, lambda: f"scale has to be float32 or bfloat16, not {scale.dtype}")
    torch._check(
        not x.dtype.is_floating_point or scale.dtype == torch.float32,
        lambda: f"scale of fp8 has to be float32, not {scale.dtype}",
    )
    columns = x.shape[-1] * (8 if x.dtype == torch.int32 else 1)
    torch._check(
        scale.dim() == 1 and (scale.shape[0] == 1 or scale.shape[0] == columns),
        lambda: f"scale has to be [1] or [{columns}], not {list(scale.shape)}",
    )
    if offset is not None:
        torch._check(
            offset.dtype == scale.dtype and offset.dim() == 1 and offset.shape[0] == scale.shape[0],
            lambda: f"offset has to be {scale.dtype} {list(scale.shape)}, not {offset.dtype} {list(offset.shape)}",
        )
    return x.new_empty((*x.shape[:-1], columns), dtype=FLOAT_DTYPES[number])


KERNELS = (npu_anti_quant,)
