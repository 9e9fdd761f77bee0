"""vLLM's quantisation to int8: with a scale given, or one per row (token); with or without a zero point (azp).

The kernels check that tensors are contiguous and that there is one scale; not that `result`, `scale` and `azp` have the
types and sizes that they write, which is checked here. For a row of one value the zero point is not defined: the kernel
divides by zero.

Source: vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/int8/scaled_quant.cu (1051220e), csrc/libtorch_stable/
torch_bindings.cpp; schemas of vLLM 0.33.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

LIBRARY = "vllm._C_stable_libtorch"
_SOURCE = "vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/int8/scaled_quant.cu"


def _check(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None, count: int) -> None:
    torch._check(input.dtype in FLOATS, lambda: f"input has to be float32, float16 or bfloat16, not {input.dtype}")
    torch._check(
        result.dtype == torch.int8 and result.shape == input.shape,
        lambda: f"result has to be int8 {list(input.shape)}, not {result.dtype} {list(result.shape)}",
    )
    torch._check(
        scale.dtype == torch.float32 and scale.numel() == count,
        lambda: f"scale has to be {count} float32 elements, not {scale.dtype} {list(scale.shape)}",
    )
    torch._check(
        azp is None or (azp.dtype == torch.int32 and azp.numel() == count),
        lambda: f"azp has to be {count} int32 elements, not {azp.dtype if azp is not None else ''}",
    )
    for name, tensor in (("input", input), ("result", result), ("scale", scale), ("azp", azp)):
        torch._check(
            tensor is None or tensor.is_contiguous(),
            lambda name=name, tensor=tensor: f"{name} has to be contiguous; its strides are {tensor.stride()}",
        )


def _expect(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None, count: int) -> None:
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16) or result.dtype != torch.int8:
        raise TypeError(f"{input.dtype} to {result.dtype}")
    if scale.dtype != torch.float32 or (azp is not None and azp.dtype != torch.int32):
        raise TypeError("scales are float32, zero points int32")
    if result.shape != input.shape or {scale.numel(), count if azp is None else azp.numel()} != {count}:
        raise ValueError(f"{list(input.shape)} to {list(result.shape)} with {count} scales")
    if not all(tensor.is_contiguous() for tensor in (input, result, scale, *([] if azp is None else [azp]))):
        raise ValueError("all are contiguous")


def _to_int8(values: Tensor) -> Tensor:
    return values.clamp(-128, 127).to(torch.int8)


def _static(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    _expect(result, input, scale, azp, 1)
    values, one = input.float(), scale.reshape(())
    if azp is None:
        result.copy_(_to_int8((values / one).round()))
    else:
        result.copy_(_to_int8((values * (1.0 / one)).round() + azp.reshape(()).float()))


def _dynamic(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    rows = input.numel() // input.shape[-1]
    _expect(result, input, scale, azp, rows)
    values = input.float().reshape(rows, -1)
    if azp is None:
        largest = values.abs().amax(-1)
        scale.copy_((largest / 127.0).reshape(scale.shape))
        factors = torch.where(largest == 0, 0.0, 127.0 / largest)
        result.copy_(_to_int8((values * factors.unsqueeze(-1)).round()).view(result.shape))
        return
    least = values.amin(-1)
    scales = (values.amax(-1) - least) / 255.0
    zeros = (-128.0 - least / scales).round()
    scale.copy_(scales.reshape(scale.shape))
    azp.copy_(zeros.to(torch.int32).reshape(azp.shape))
    result.copy_(_to_int8((values * (1.0 / scales).unsqueeze(-1)).round() + zeros.unsqueeze(-1)).view(result.shape))


def _tensors(draw: Draw) -> tuple[Tensor, Tensor]:
    dtype = draw.choice(*FLOATS)
    shape = (*draw.sizes(draw.choice(1, 2), least=1), draw.size(least=2))
    x = draw.floats(*shape, dtype=dtype, layout="contiguous")
    return draw.integers(*shape, low=-128, high=128, dtype=torch.int8, layout="contiguous"), x


def _static_arguments(draw: Draw) -> Call:
    with_azp, flat = draw.flag(), draw.flag()
    q, x = _tensors(draw)
    scale = torch.full((1,) if flat else (), 0.02, device=draw.device)
    return (q, x, scale, torch.full((1,), 3, dtype=torch.int32, device=draw.device) if with_azp else None), {}


def _dynamic_arguments(draw: Draw) -> Call:
    with_azp, flat = draw.flag(), draw.flag()
    q, x = _tensors(draw)
    shape = (x.numel() // x.shape[-1],) if flat else (*x.shape[:-1], 1)
    azp = torch.zeros(shape, dtype=torch.int32, device=draw.device) if with_azp else None
    return (q, x, torch.ones(shape, device=draw.device), azp), {}


def _bad(*tensors: Tensor) -> Callable[[Draw], Call]:
    return lambda draw: ((*(draw.there(tensor) for tensor in tensors), *[None] * (4 - len(tensors))), {})


def _refusals(count: int) -> dict[str, Callable[[Draw], Call]]:
    q, x, s = torch.zeros(3, 8, dtype=torch.int8), torch.ones(3, 8), torch.ones(count)
    return {
        "input has to be float32, float16 or bfloat16": _bad(q, x.double(), s),
        "result has to be int8 [3, 8]": _bad(q[:2], x, s),
        f"scale has to be {count} float32 elements": _bad(q, x, torch.ones(2)),
        f"azp has to be {count} int32 elements": _bad(q, x, s, torch.ones(count)),
        "input has to be contiguous": _bad(q, torch.ones(8, 3).t(), s),
        "result has to be contiguous": _bad(q.t().contiguous().t(), x, s),
    }


@fake_kernel(
    "_C::static_scaled_int8_quant(Tensor! result, Tensor input, Tensor scale,Tensor? azp) -> ()",
    reference=_static,
    source=_SOURCE,
    library=LIBRARY,
    arguments=_static_arguments,
    refuses=_refusals(1),
)
def static_scaled_int8_quant(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    """Writes `result = round(input / scale) + azp`, to nearest even and saturating; returns nothing.

    Args:
        result: int8, of the shape of `input`, contiguous.
        input: float32, float16 or bfloat16, contiguous.
        scale: one element of float32.
        azp: one element of int32.
    """
    _check(result, input, scale, azp, 1)


@fake_kernel(
    "_C::dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()",
    reference=_dynamic,
    source=_SOURCE,
    library=LIBRARY,
    arguments=_dynamic_arguments,
    refuses={
        **_refusals(3),
        "scale has to be contiguous": _bad(torch.zeros(3, 8).char(), torch.ones(3, 8), torch.ones(6)[::2]),
    },
)
def dynamic_scaled_int8_quant(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    """Writes a scale per row and `result`; returns nothing.

    Without `azp`: `scale = max |row| / 127`, `result = round(row / scale)`. With it: `scale = (max - min) / 255`,
    `azp = round(-128 - min / scale)`, `result = round(row / scale) + azp`.

    Args:
        result: int8, of the shape of `input`, contiguous.
        input: `[..., columns]` float32, float16 or bfloat16, contiguous.
        scale: float32, as many elements as rows, contiguous.
        azp: int32, likewise.
    """
    _check(result, input, scale, azp, math.prod(input.shape[:-1]))


KERNELS = (static_scaled_int8_quant, dynamic_scaled_int8_quant)
