"""torch_npu's norms with a mean: layer norm, deep norm and its backward, group norms with an activation.

Results are contiguous whatever the strides of the arguments; torch_npu's own fakes keep the strides of permuted ones,
and that of the backward of deep norm gives the gradients of gamma and beta in the dtype of gamma: the kernel's are
float32. What CANN's kernels compute is closed, and taken from the formulas of op-plugin's documentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.norms_npu import check_gamma, draw_shapes

_OPAPI = "Ascend/op-plugin op_plugin/ops/opapi/"
_YAML = "Ascend/op-plugin op_plugin/config/op_plugin_functions.yaml (gen_opapi)"


def _layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    wide = [None if each is None else each.float() for each in (weight, bias)]
    result = torch.nn.functional.layer_norm(input.float(), list(normalized_shape), wide[0], wide[1], eps)
    return result.to(input.dtype).contiguous()


def _layer_norm_arguments(draw: Draw) -> Call:
    dtype, weighted, biased = draw.choice(*FLOATS), draw.flag(), draw.flag()
    leading, normalized = draw.choice(1, 2, 0), [draw.choice(4, 1, 3) for _ in range(draw.choice(1, 2))]
    weight, bias = (draw.floats(*normalized, dtype=dtype) if given else None for given in (weighted, biased))
    return (draw.floats(*draw.sizes(leading), *normalized, dtype=dtype), normalized, weight, bias), {}


def _shape_of_too_many(draw: Draw) -> Call:
    return (draw.floats(4, dtype=torch.float32), [3, 4]), {}


@fake_kernel(
    "npu::npu_layer_norm_eval(Tensor input, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05) -> Tensor",
    reference=_layer_norm_eval,
    source="Ascend/op-plugin op_plugin/ops/aclops/LayerNormEvalKernelNpu.cpp",
    library="torch_npu",
    arguments=_layer_norm_arguments,
    refuses={"normalized_shape has more dimensions": _shape_of_too_many},
)
def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    """Layer norm over the last dimensions: like `input`, contiguous. The kernel reads only how many dimensions
    `normalized_shape` has, and reshapes `weight` and `bias` to the sizes of `input`."""
    count = len(normalized_shape)
    torch._check(
        count <= input.dim(),
        lambda: f"normalized_shape has more dimensions, {count}, than input, {input.dim()}",
    )
    return input.new_empty(input.shape)


def _refuse_other_sizes(x: Tensor, gamma: Tensor) -> None:
    if x.dim() < gamma.dim() or x.shape[x.dim() - gamma.dim() :] != gamma.shape:
        raise RuntimeError(f"cannot normalise {x.shape} with a gamma of {gamma.shape}")


def _deep_norm(
    x: Tensor, gx: Tensor, beta: Tensor, gamma: Tensor, alpha: float = 0.3, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_other_sizes(x, gamma)
    total = x.float() * alpha + gx.float()
    over = list(range(x.dim() - gamma.dim(), x.dim()))
    mean = total.mean(over, keepdim=True)
    rstd = torch.rsqrt((total - mean).square().mean(over, keepdim=True) + epsilon)
    y = (total - mean) * rstd * gamma.float() + beta.float()
    return mean.contiguous(), rstd.contiguous(), y.to(x.dtype).contiguous()


def _deep_norm_arguments(draw: Draw) -> Call:
    dtype, alpha = draw.choice(*FLOATS), draw.choice(0.3, 1.0)
    leading, normalized = draw_shapes(draw)
    x, gx = (draw.floats(*leading, *normalized, dtype=dtype) for _ in range(2))
    beta, gamma = (draw.floats(*normalized, dtype=dtype) for _ in range(2))
    return (x, gx, beta, gamma, alpha), {}


def _deep_norm_of_other_sizes(draw: Draw) -> Call:
    x, gamma = draw.floats(3, 4, dtype=torch.float32), draw.floats(3, dtype=torch.float32)
    return (x, x, gamma, gamma), {}


@fake_kernel(
    "npu::npu_deep_norm(Tensor x, Tensor gx, Tensor beta, Tensor gamma, float alpha=0.29999999999999999, "
    "float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor, Tensor)",
    reference=_deep_norm,
    source=_OPAPI + "DeepNormKernelOpApi.cpp",
    library="torch_npu",
    arguments=_deep_norm_arguments,
    refuses={"have to be those of gamma": _deep_norm_of_other_sizes},
)
def npu_deep_norm(
    x: Tensor, gx: Tensor, beta: Tensor, gamma: Tensor, alpha: float = 0.3, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of `alpha * x + gx`: mean and reciprocal standard deviation, float32 with one dimension of size 1 for
    each of `gamma`, then the result, like `x`."""
    statistics = check_gamma(x, gamma, "x")
    mean, rstd = (x.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    return mean, rstd, x.new_empty(x.shape)


def _deep_norm_backward(
    dy: Tensor, x: Tensor, gx: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, alpha: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_other_sizes(x, gamma)
    leading = list(range(x.dim() - gamma.dim()))
    over = list(range(len(leading), x.dim()))
    normal = (x.float() * alpha + gx.float() - mean) * rstd
    scaled = dy.float() * gamma.float()
    inner = scaled - scaled.mean(over, keepdim=True) - normal * (scaled * normal).mean(over, keepdim=True)
    dgx = inner * rstd
    dbeta, dgamma = dy.float(), dy.float() * normal
    if leading:
        dbeta, dgamma = dbeta.sum(leading), dgamma.sum(leading)
    dx = (alpha * dgx).to(x.dtype).contiguous()
    return dx, dgx.to(gx.dtype, copy=True).contiguous(), dbeta.clone().contiguous(), dgamma.contiguous()


def _deep_norm_backward_arguments(draw: Draw) -> Call:
    dtype, alpha = draw.choice(*FLOATS), draw.choice(0.3, 1.0)
    leading, normalized = draw_shapes(draw)
    dy, x, gx = (draw.floats(*leading, *normalized, dtype=dtype) for _ in range(3))
    ones = [1] * len(normalized)
    mean, rstd = (draw.floats(*leading, *ones, dtype=torch.float32, layout="contiguous") for _ in range(2))
    return (dy, x, gx, draw.floats(*normalized, dtype=dtype), mean, rstd.abs(), alpha), {}


@fake_kernel(
    "npu::npu_deep_norm_backward(Tensor dy, Tensor x, Tensor gx, Tensor gamma, Tensor mean, Tensor rstd, "
    "float alpha=0.29999999999999999) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_deep_norm_backward,
    source=_OPAPI + "DeepNormBackwardKernelOpApi.cpp",
    library="torch_npu",
    arguments=_deep_norm_backward_arguments,
)
def npu_deep_norm_backward(
    dy: Tensor, x: Tensor, gx: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, alpha: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `x` and `gx`, like these, and of beta and `gamma`, float32 and of the sizes of `gamma`."""
    check_gamma(x, gamma, "x")
    dbeta, dgamma = (gamma.new_empty(gamma.shape, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), gx.new_empty(gx.shape), dbeta, dgamma


KERNELS = (npu_layer_norm_eval, npu_deep_norm, npu_deep_norm_backward)
