"""torch_musa's fused RMS norm and its backward, which its patched torch adds to torch's own namespace.

Present up to the torch_musa of torch 2.7; newer ones implement upstream's `aten::_fused_rms_norm` instead. The vendor's
own fake of the forward keeps permuted strides, and the kernel does not; its fake of the backward gives an empty tensor
where the kernel gives none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "MooreThreads/torch_musa torch_musa/csrc/aten/ops/RMSNorm.cpp (14ed48bb)"


def _forward(
    input: Tensor, normalized_shape: Sequence[int], eps: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if input.dtype not in FLOATS or (weight is not None and weight.dtype != input.dtype):
        raise RuntimeError(f"no RMS norm of {input.dtype} with {None if weight is None else weight.dtype}")
    wide = input.float()
    scale = None if weight is None else weight.float()
    output = torch.nn.functional.rms_norm(wide, list(normalized_shape), scale, eps)
    squares = wide.flatten(-len(normalized_shape)).square().mean(-1)
    return output.to(input.dtype).contiguous(), torch.rsqrt(squares + eps).contiguous()


def _draw_shapes(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    leading, normalized = draw.choice(1, 2, 0), draw.choice(1, 2)
    return draw.sizes(leading), draw.sizes(normalized)


def _forward_arguments(draw: Draw) -> Call:
    dtype, weighted = draw.choice(*FLOATS), draw.flag()
    leading, normalized = _draw_shapes(draw)
    input = draw.floats(*leading, *normalized, dtype=dtype)
    weight = draw.floats(*normalized, dtype=dtype) if weighted else None
    return (input, list(normalized), draw.choice(1e-6, 1e-5), weight), {}


def _other_sizes(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [5], 1e-6), {}


def _no_sizes(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [], 1e-6), {}


def _other_weight_sizes(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [4], 1e-6, draw.floats(3, dtype=torch.float32)), {}


def _other_weight_dtype(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float16), [4], 1e-6, draw.floats(4, dtype=torch.float32)), {}


def _doubles(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float64), [4], 1e-6), {}


@fake_kernel(
    "aten::_fused_rmsnorm_forward(Tensor input, SymInt[] normalized_shape, float eps, Tensor? weight=None) "
    "-> (Tensor output, Tensor invvar)",
    reference=_forward,
    source=_SOURCE,
    library="torch_musa",
    arguments=_forward_arguments,
    refuses={
        "last dimensions of input have to be normalized_shape": _other_sizes,
        "normalized_shape has to name at least one": _no_sizes,
        "weight has to be of normalized_shape": _other_weight_sizes,
        "weight has to be of the dtype of input": _other_weight_dtype,
        "float32, float16 or bfloat16": _doubles,
    },
)
def fused_rmsnorm_forward(
    input: Tensor, normalized_shape: Sequence[int], eps: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`input * invvar * weight`, where `invvar` is `rsqrt(mean(input ** 2) + eps)` over the last dimensions.

    Returns the output, like `input` and contiguous, and `invvar`, float32 and contiguous, of the sizes of `input`
    without `normalized_shape`. `weight` is of `normalized_shape` and of the dtype of `input`.
    """
    leading = input.dim() - len(normalized_shape)
    torch._check(len(normalized_shape) > 0, lambda: "normalized_shape has to name at least one dimension")
    torch._check(
        leading >= 0 and tuple(input.shape[leading:]) == tuple(normalized_shape),
        lambda: f"the last dimensions of input have to be normalized_shape {normalized_shape}, not {list(input.shape)}",
    )
    torch._check(input.dtype in FLOATS, lambda: f"RMS norm takes float32, float16 or bfloat16, not {input.dtype}")
    if weight is not None:
        torch._check(
            tuple(weight.shape) == tuple(normalized_shape),
            lambda: f"weight has to be of normalized_shape {normalized_shape}, not {list(weight.shape)}",
        )
        torch._check(
            weight.dtype == input.dtype,
            lambda: f"weight has to be of the dtype of input, {input.dtype}, not {weight.dtype}",
        )
    return input.new_empty(input.shape), input.new_empty(input.shape[:leading], dtype=torch.float32)


def _backward(
    grad_out: Tensor,
    invvar: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    eps: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    count = len(normalized_shape)
    wide = input.float()
    normal = wide * invvar.float().reshape(*invvar.shape, *[1] * count)
    scaled = grad_out.float() if weight is None else grad_out.float() * weight.float()
    mean = (scaled * normal).flatten(-count).mean(-1).reshape(*invvar.shape, *[1] * count)
    grad = (scaled - normal * mean) * invvar.float().reshape(*invvar.shape, *[1] * count)
    grad = grad.to(input.dtype).contiguous()
    if weight is None:
        return grad, None
    rows = (grad_out.float() * normal).reshape(invvar.numel(), *weight.shape)
    return grad, rows.sum(0).to(weight.dtype).contiguous()


def _backward_arguments(draw: Draw) -> Call:
    dtype, weighted = draw.choice(*FLOATS), draw.flag()
    leading, normalized = _draw_shapes(draw)
    grad, input = (draw.floats(*leading, *normalized, dtype=dtype) for _ in range(2))
    invvar = draw.floats(*leading, dtype=torch.float32).abs()
    weight = draw.floats(*normalized, dtype=dtype) if weighted else None
    return (grad, invvar, input, list(normalized), 1e-6, weight), {}


@fake_kernel(
    "aten::_fused_rmsnorm_backward(Tensor grad_out, Tensor invvar, Tensor input, SymInt[] normalized_shape, float eps, "
    "Tensor? weight=None) -> (Tensor, Tensor)",
    reference=_backward,
    source=_SOURCE,
    library="torch_musa",
    arguments=_backward_arguments,
)
def fused_rmsnorm_backward(
    grad_out: Tensor,
    invvar: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    eps: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `input` and of `weight`, contiguous and like these; of no weight there is none.

    `grad_out` is like `input`, and `invvar` as the forward returned it. The kernel checks nothing.
    """
    return input.new_empty(input.shape), None if weight is None else weight.new_empty(weight.shape)


KERNELS = (fused_rmsnorm_forward, fused_rmsnorm_backward)
