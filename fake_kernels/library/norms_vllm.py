"""vLLM's RMS norms, into an output that the caller made or in place; they return nothing.

The schemas are those of vLLM 0.33.0, in which `weight` may be left out: then nothing is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "vllm-project/vllm csrc/libtorch_stable/layernorm_kernels.cu, csrc/libtorch_stable/torch_bindings.cpp"


def _normalise(wide: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return normal if weight is None else normal * weight.float()


def _rms_norm(result: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    given = [result] if weight is None else [result, weight]
    if not all(each.is_contiguous() for each in given) or result.numel() != input.numel():
        raise RuntimeError("the memory is not what the kernel takes it for")
    if input.dtype not in FLOATS or {each.dtype for each in given} != {input.dtype}:
        raise RuntimeError(f"dtypes {[input.dtype, *(each.dtype for each in given)]}")
    if not 2 <= input.dim() <= 4:
        raise RuntimeError(f"{input.dim()} dimensions")
    if weight is None:
        result.copy_(_normalise(input.float(), None, epsilon).reshape(result.shape))
        return
    if weight.dim() not in (1, 2) or weight.shape != (*input.shape[: weight.dim() - 1], input.size(-1)):
        raise RuntimeError(f"weight {tuple(weight.shape)} for {tuple(input.shape)}")
    scale = weight if weight.dim() == 1 else weight.reshape(input.size(0), *[1] * (input.dim() - 2), input.size(-1))
    result.copy_(_normalise(input.float(), scale, epsilon).reshape(result.shape))


def _rms_norm_arguments(draw: Draw) -> Call:
    dtype, count, grouped, given = draw.choice(*FLOATS), draw.choice(1, 2, 3), draw.flag(), draw.choice(True, False)
    rows, columns = draw.sizes(count, least=1), draw.size(least=1)
    result = draw.floats(*rows, columns, dtype=dtype, layout="contiguous")
    weight = draw.floats(*rows[: int(grouped)], columns, dtype=dtype, layout="contiguous") if given else None
    return (result, draw.floats(*rows, columns, dtype=dtype), weight, 1e-6), {}


def _call(result: tuple[int, ...], input: tuple[int, ...], weight: tuple[int, ...], layout: str, draw: Draw) -> Call:
    return (
        draw.floats(*result, dtype=torch.float32, layout=layout),
        draw.floats(*input, dtype=torch.float32, layout="contiguous"),
        draw.floats(*weight, dtype=torch.float32, layout="contiguous"),
        1e-6,
    ), {}


def _weight_of_another_dtype(draw: Draw) -> Call:
    return (*_call((3, 8), (3, 8), (8,), "contiguous", draw)[0][:2], draw.floats(8, dtype=torch.float16), 1e-6), {}


@fake_kernel(
    "_C::rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
    reference=_rms_norm,
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=_rms_norm_arguments,
    refuses={
        "result has to be contiguous": lambda draw: _call((3, 8), (3, 8), (8,), "transposed", draw),
        "weight has to be of sizes": lambda draw: _call((3, 8), (3, 8), (4,), "contiguous", draw),
        "2 to 4 dimensions": lambda draw: _call((8,), (8,), (8,), "contiguous", draw),
        "of one floating dtype": _weight_of_another_dtype,
    },
)
def rms_norm(result: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """The RMS norm over the last dimension of `input`, which has 2 to 4, into the contiguous `result`.

    `weight` is None, `[hidden]`, or `[groups, hidden]` with one row for each index of the first dimension of `input`.
    The kernel takes all memory for the dtype of `input` and does not check it.
    """
    _check_dtypes(input, result, weight)
    torch._check(2 <= input.dim() <= 4, lambda: f"input has to have 2 to 4 dimensions, not {input.dim()}")
    torch._check(result.is_contiguous(), lambda: f"result has to be contiguous, not of strides {result.stride()}")
    if weight is None:
        return
    torch._check(weight.is_contiguous(), lambda: f"weight has to be contiguous, not of strides {weight.stride()}")
    wanted = (*input.shape[: weight.dim() - 1], input.shape[-1])
    torch._check(
        weight.dim() in (1, 2) and tuple(weight.shape) == wanted,
        lambda: (
            f"weight has to be of sizes {[input.shape[-1]]} or {[input.shape[0], input.shape[-1]]}, "
            f"not {list(weight.shape)}"
        ),
    )


def _fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    given = [residual] if weight is None else [residual, weight]
    if not all(each.is_contiguous() for each in given) or residual.shape != input.shape:
        raise RuntimeError("the memory is not what the kernel takes it for")
    if input.dtype not in FLOATS or {each.dtype for each in given} != {input.dtype}:
        raise RuntimeError(f"dtypes {[input.dtype, *(each.dtype for each in given)]}")
    residual.copy_((input.float() + residual.float()).to(residual.dtype))  # rounded before it is normalised
    input.copy_(_normalise(residual.float(), weight, epsilon))


def _fused_arguments(draw: Draw) -> Call:
    dtype, padding, given = draw.choice(*FLOATS), draw.choice(0, 8), draw.choice(True, False)
    rows, columns = draw.size(least=1), draw.size(least=1)
    input = draw.floats(rows, columns + padding, dtype=dtype, layout="contiguous")[:, :columns]
    residual = draw.floats(rows, columns, dtype=dtype, layout="contiguous")
    weight = draw.floats(columns, dtype=dtype, layout="contiguous") if given else None
    return (input, residual, weight, 1e-6), {}


def _permuted_residual(draw: Draw) -> Call:
    result, input, weight, epsilon = _call((3, 8), (3, 8), (8,), "transposed", draw)[0]
    return (input, result, weight, epsilon), {}


@fake_kernel(
    "_C::fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    reference=_fused_add_rms_norm,
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=_fused_arguments,
    refuses={"residual has to be contiguous": _permuted_residual, "of one floating dtype": _weight_of_another_dtype},
)
def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """`residual` becomes `input + residual`, and `input` the RMS norm of that; both `[tokens, hidden]`, in place.

    `residual` and `weight` `[hidden]` are contiguous; the rows of `input` may lie apart.
    """
    _check_dtypes(input, residual, weight)
    torch._check(residual.is_contiguous(), lambda: f"residual has to be contiguous, not of strides {residual.stride()}")
    torch._check(weight is None or weight.is_contiguous(), lambda: "weight has to be contiguous")


def _check_dtypes(input: Tensor, other: Tensor, weight: Tensor | None) -> None:
    dtypes = [input.dtype, other.dtype, *([] if weight is None else [weight.dtype])]
    torch._check(
        input.dtype in FLOATS and set(dtypes) == {input.dtype},
        lambda: f"all have to be of one floating dtype, not {dtypes}",
    )


KERNELS = (rms_norm, fused_add_rms_norm)
