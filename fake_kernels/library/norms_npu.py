"""torch_npu's RMS norms.

All of them return, next to the normalised tensor, the reciprocal standard deviation: float32, with one dimension of
size 1 for each that `gamma` has. Results are contiguous whatever the strides of the arguments; torch_npu's own fakes
of them keep the strides of permuted arguments. What CANN's kernels compute is closed, and taken from the formulas of
op-plugin's documentation and tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_OPAPI = "Ascend/op-plugin op_plugin/ops/opapi/"


def normal(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The normalised tensor in float32, before `gamma`, and the reciprocal standard deviation with kept dimensions."""
    if x.dim() < gamma.dim() or x.shape[x.dim() - gamma.dim() :] != gamma.shape:
        raise RuntimeError(f"cannot normalise {x.shape} with a gamma of {gamma.shape}")
    dimensions = list(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dimensions, keepdim=True) + epsilon)
    return wide * rstd, rstd.contiguous()


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    normalised, rstd = normal(input, gamma, epsilon)
    return (normalised * gamma.float()).to(input.dtype).contiguous(), rstd


def _gemma(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    normalised, rstd = normal(input, gamma, epsilon)
    return (normalised * (1 + gamma.float())).to(input.dtype).contiguous(), rstd


def draw_shapes(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes that are not normalised, and those that are."""
    leading, normalized = draw.choice(1, 2, 0, 3), draw.choice(1, 2)
    return draw.sizes(leading), draw.sizes(normalized)


def _arguments(draw: Draw) -> Call:
    dtype, mixed = draw.choice(*FLOATS), draw.flag()
    leading, normalized = draw_shapes(draw)
    gamma = draw.floats(*normalized, dtype=torch.float32 if mixed else dtype)
    return (draw.floats(*leading, *normalized, dtype=dtype), gamma), {"epsilon": draw.choice(1e-6, 1e-5)}


def _more_dimensions(draw: Draw) -> Call:
    return (draw.floats(4, dtype=torch.float32), draw.floats(3, 4, dtype=torch.float32)), {}


def _other_sizes(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), draw.floats(3, dtype=torch.float32)), {}


def check_gamma(x: Tensor, gamma: Tensor, name: str) -> tuple[int, ...]:
    """The sizes of the reciprocal standard deviation of `x`, which the message calls `name`."""
    leading = x.dim() - gamma.dim()
    torch._check(leading >= 0, lambda: f"gamma has more dimensions, {gamma.dim()}, than {name}, {x.dim()}")
    torch._check(
        x.shape[leading:] == gamma.shape,
        lambda: f"the last dimensions of {name} have to be those of gamma, {list(gamma.shape)}, not {list(x.shape)}",
    )
    return (*x.shape[:leading], *[1] * gamma.dim())


@fake_kernel(
    "npu::npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    reference=_rms_norm,
    source=_OPAPI + "RmsNormKernelOpApi.cpp, op_plugin/utils/KernelNpuOutputSize.cpp",
    library="torch_npu",
    arguments=_arguments,
    refuses={"gamma has more dimensions": _more_dimensions, "have to be those of gamma": _other_sizes},
)
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """`input * rstd * gamma` over the dimensions of `gamma`, which are the last of `input`.

    Returns the result, like `input` and contiguous, and `rstd`, float32. `gamma` may be float32 where `input` is not.
    """
    rstd = check_gamma(input, gamma, "input")
    return input.new_empty(input.shape), input.new_empty(rstd, dtype=torch.float32)


@fake_kernel(
    "npu::npu_gemma_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    reference=_gemma,
    source=_OPAPI + "GemmaRmsNormKernelOpApi.cpp, op_plugin/utils/KernelNpuOutputSize.cpp",
    library="torch_npu",
    arguments=_arguments,
    refuses={"gamma has more dimensions": _more_dimensions, "have to be those of gamma": _other_sizes},
)
def npu_gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """`input * rstd * (1 + gamma)`; sizes and dtypes as of `npu_rms_norm`."""
    rstd = check_gamma(input, gamma, "input")
    return input.new_empty(input.shape), input.new_empty(rstd, dtype=torch.float32)


def _backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() < gamma.dim() or input.shape[input.dim() - gamma.dim() :] != gamma.shape:
        raise RuntimeError(f"cannot normalise {input.shape} with a gamma of {gamma.shape}")
    leading = list(range(input.dim() - gamma.dim()))
    normal, scaled = input.float() * rstd, dy.float() * gamma.float()
    mean = (scaled * normal).mean(list(range(len(leading), input.dim())), keepdim=True)
    products = dy.float() * normal
    dgamma = products.sum(leading) if leading else products
    return ((scaled - normal * mean) * rstd).to(input.dtype).contiguous(), dgamma.contiguous()


def _backward_arguments(draw: Draw) -> Call:
    dtype, mixed = draw.choice(*FLOATS), draw.flag()
    leading, normalized = draw_shapes(draw)
    dy, input = (draw.floats(*leading, *normalized, dtype=dtype) for _ in range(2))
    gamma = draw.floats(*normalized, dtype=torch.float32 if mixed else dtype)
    rstd = draw.floats(*leading, *[1] * len(normalized), dtype=torch.float32, layout="contiguous").abs()
    return (dy, input, gamma, rstd), {}


def _backward_of_other_sizes(draw: Draw) -> Call:
    x, gamma = draw.floats(3, 4, dtype=torch.float32), draw.floats(3, dtype=torch.float32)
    return (x, x, gamma, draw.floats(3, 1, dtype=torch.float32)), {}


@fake_kernel(
    "npu::npu_rms_norm_backward(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)",
    reference=_backward,
    source=_OPAPI + "RmsNormBackwardKernelOpApi.cpp",
    library="torch_npu",
    arguments=_backward_arguments,
    refuses={"have to be those of gamma": _backward_of_other_sizes},
)
def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `input`, like it, and of `gamma`, of its sizes and always float32; both contiguous."""
    check_gamma(input, gamma, "input")
    return input.new_empty(input.shape), gamma.new_empty(gamma.shape, dtype=torch.float32)


KERNELS = (npu_rms_norm, npu_gemma_rms_norm, npu_rms_norm_backward)
