"""torch_npu's casts between private storage formats, and the packing of weights.

A storage format (`FRACTAL_NZ`, ...) is a property of the memory that no size or stride shows. So a fake kernel cannot
see which one its argument has; where aliasing depends on it, it refuses what could be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel

_FORMAT = "Ascend/pytorch torch_npu/csrc/aten/common/FormatCastKernelNpu.cpp"
_DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.int8, torch.bool)
_BASE_FORMATS = {0: "NCHW", 1: "NHWC", 2: "ND", 27: "NDHWC", 30: "NCDHW"}  # aclFormat
_PRIVATE_FORMATS = (29, 3, 4)  # FRACTAL_NZ, NC1HWC0, FRACTAL_Z


def _format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    if acl_format in _BASE_FORMATS or not input.is_contiguous():
        raise RuntimeError(f"whether format {acl_format} of strides {input.stride()} is fresh depends on the machine")
    return input.clone(memory_format=torch.contiguous_format)


def _format_arguments(draw: Draw) -> Call:
    dtype, acl_format = draw.choice(*_DTYPES), draw.choice(*_PRIVATE_FORMATS)
    layout, customize = draw.choice("contiguous", "offset"), draw.choice(None, 1)
    shape = draw.shape(2, 4)
    return (draw.floats(*shape, dtype=dtype, layout=layout), acl_format), {"customize_dtype": customize}


def _to_nd(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float16, layout="contiguous"), 2), {}


def _permuted(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float16, layout="transposed"), 29), {}


_REFUSES = {"may return its argument itself": _to_nd, "has to be contiguous": _permuted}


def _check_format(input: Tensor, acl_format: int) -> None:
    torch._check(
        acl_format not in _BASE_FORMATS,
        lambda: (
            f"npu_format_cast to {_BASE_FORMATS[acl_format]} ({acl_format}) may return its argument itself, which "
            "its schema does not say, depending on a storage format that is not known while tracing: cast before the "
            "compiled function"
        ),
    )
    torch._check(
        input.is_contiguous(),
        lambda: f"input has to be contiguous, not of strides {input.stride()}: those of the result depend on the chip",
    )


@fake_kernel(
    "npu::npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
    reference=_format_cast,
    source=_FORMAT,
    library="torch_npu",
    arguments=_format_arguments,
    refuses=_REFUSES,
)
def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The values of `input` in another storage format: a new tensor of its sizes and dtype, contiguous.

    Three things that the kernel does are hidden from a graph. Where `input` has the format already, and where both
    formats are plain ones, it returns `input` itself: so plain formats are refused, and a tensor that already has the
    private format must not be cast to it in a compiled function. The strides of a result are those of `input` on some
    chips and contiguous ones on others: so other strides are refused. Memory may be padded; never view it otherwise.
    """
    _check_format(input, acl_format)
    return input.new_empty(input.shape)


def _format_cast_plain(input: Tensor, acl_format: int) -> Tensor:
    return _format_cast(input, acl_format)


def _plain_arguments(draw: Draw) -> Call:
    return _format_arguments(draw)[0], {}


@fake_kernel(
    "npu::_npu_format_cast(Tensor input, int acl_format) -> Tensor",
    reference=_format_cast_plain,
    source=_FORMAT,
    library="torch_npu",
    arguments=_plain_arguments,
    refuses=_REFUSES,
)
def _npu_format_cast(input: Tensor, acl_format: int) -> Tensor:
    """What `npu_format_cast` dispatches to; the same holds. torch_npu's own fake says fresh for plain formats too."""
    _check_format(input, acl_format)
    return input.new_empty(input.shape)


def _format_cast_in_place(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return input


@fake_kernel(
    "npu::npu_format_cast_.acl_format(Tensor(a!) input, int acl_format, *, int? customize_dtype=None, "
    "int? input_dtype=None) -> Tensor(a!)",
    reference=_format_cast_in_place,
    source=_FORMAT,
    library="torch_npu",
    arguments=_format_arguments,
)
def npu_format_cast_(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """`input` itself, whose memory is now of another storage format; no value changes."""
    return input


def _pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    if not weight.is_contiguous() or weight.dtype not in (torch.int32, torch.float32):
        raise RuntimeError(f"cannot pack {weight.dtype} of strides {weight.stride()}")
    if weight.dim() != 2 or weight.size(-1) % 8 or weight.numel() == 0:
        raise RuntimeError(f"cannot pack {tuple(weight.shape)}")
    if weight.dtype is not torch.int32:
        raise RuntimeError("packing of float32 into float4 depends on the chip")
    shifts = torch.arange(8, device=weight.device) * 4
    nibbles = (weight.long() & 0xF).reshape(weight.size(0), weight.size(1) // 8, 8)
    packed = (nibbles << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _pack_arguments(draw: Draw) -> Call:
    rows, columns = draw.size(least=1), draw.size(least=1, times=8)
    return (draw.integers(rows, columns, low=-8, high=8, dtype=torch.int32, layout="contiguous"),), {}


def _unpackable(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.int32, draw: Draw) -> Call:
    return (draw.integers(*shape, low=-8, high=8, dtype=dtype, layout=layout),), {}


@fake_kernel(
    "npu::npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    reference=_pack,
    source="Ascend/op-plugin op_plugin/ops/opapi/ConvertWeightToINT4PackKernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_pack_arguments,
    refuses={
        "weight has to be contiguous": lambda draw: _unpackable(8, 8, layout="transposed", draw=draw),
        "multiple of 8": lambda draw: _unpackable(3, 4, draw=draw),
        "weight has to be int32": lambda draw: _unpackable(3, 8, dtype=torch.int64, draw=draw),
        "weight has to be [k, n]": lambda draw: _unpackable(2, 3, 8, draw=draw),
        "weight is empty": lambda draw: _unpackable(0, 8, draw=draw),
    },
)
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """Eight int4 of a row of `weight` int32 `[k, n]` in one int32 each, the first lowest: `[k, n / 8]`, contiguous.

    `weight` is contiguous. The kernel waits for the device and packs on the host. It also takes float32 (into float4)
    and three dimensions, of which only newer chips make sense; these are refused. `inner_k_tiles` is not used.
    """
    torch._check(weight.is_contiguous(), lambda: f"weight has to be contiguous, not of strides {weight.stride()}")
    torch._check(weight.dim() == 2, lambda: f"weight has to be [k, n], not of sizes {list(weight.shape)}")
    torch._check(weight.dtype == torch.int32, lambda: f"weight has to be int32, not {weight.dtype}")
    rows, columns = weight.shape
    torch._check(rows > 0 and columns > 0, lambda: f"weight is empty: {list(weight.shape)}")
    torch._check(columns % 8 == 0, lambda: f"the last dimension of weight has to be a multiple of 8, not {columns}")
    return weight.new_empty((rows, columns // 8))


KERNELS = (npu_format_cast, _npu_format_cast, npu_format_cast_, npu_convert_weight_to_int4pack)
