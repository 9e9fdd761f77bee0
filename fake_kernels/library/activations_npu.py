"""torch_npu's SiLU and Mish, and their backwards.

Results are contiguous whatever the strides of the arguments; torch_npu's own fakes keep the strides of permuted ones.
What CANN's kernels compute is closed, and taken from op-plugin's documentation and the names of CANN's operators:
`Swish` with a scale of 1 is SiLU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_ACLOPS = "Ascend/op-plugin op_plugin/ops/aclops/"


def _one(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    return (draw.floats(*draw.shape(0, 4), dtype=dtype),), {}


def _dense(draw: Draw) -> Call:
    dtype, layout = draw.choice(*FLOATS), draw.choice("contiguous", "transposed", "offset")
    return (draw.floats(*draw.shape(2, 3), dtype=dtype, layout=layout),), {}


def _alike(draw: Draw, count: int) -> tuple[Tensor, ...]:
    dtype = draw.choice(*FLOATS)
    shape = draw.shape(0, 3)
    return tuple(draw.floats(*shape, dtype=dtype) for _ in range(count))


def _two(draw: Draw) -> Call:
    return _alike(draw, 2), {}


def _three(draw: Draw) -> Call:
    return _alike(draw, 3), {}


def _silu(input: Tensor) -> Tensor:
    return torch.nn.functional.silu(input.float()).to(input.dtype).contiguous()


@fake_kernel(
    "npu::npu_silu(Tensor input) -> Tensor",
    reference=_silu,
    source=_ACLOPS + "SiluKernelNpu.cpp",
    library="torch_npu",
    arguments=_one,
)
def npu_silu(input: Tensor) -> Tensor:
    """SiLU, `input * sigmoid(input)`: like `input`, contiguous."""
    return input.new_empty(input.shape)


@fake_kernel(
    "npu::npu_silu_(Tensor(a!) input) -> Tensor(a!)",
    reference=lambda input: input.copy_(_silu(input)),
    source=_ACLOPS + "SiluKernelNpu.cpp",
    library="torch_npu",
    arguments=_dense,
)
def npu_silu_(input: Tensor) -> Tensor:
    """SiLU in place: `input` itself, with the strides that it has."""
    return input


def _silu_backward(grad_output: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x0.float())
    found = grad_output.float() * (sigmoid + x1.float() * (1 - sigmoid))
    return found.to(grad_output.dtype).contiguous()


@fake_kernel(
    "npu::npu_silu_backward(Tensor grad_output, Tensor x0, Tensor x1) -> Tensor",
    reference=_silu_backward,
    source=_ACLOPS + "SiluKernelNpu.cpp",
    library="torch_npu",
    arguments=_three,
)
def npu_silu_backward(grad_output: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """The gradient of SiLU, whose argument was `x0` and result `x1`: like `grad_output`, contiguous."""
    return grad_output.new_empty(grad_output.shape)


def _mish(input: Tensor) -> Tensor:
    return torch.nn.functional.mish(input.float()).to(input.dtype).contiguous()


@fake_kernel(
    "npu::npu_mish(Tensor input) -> Tensor",
    reference=_mish,
    source=_ACLOPS + "MishKernelNpu.cpp",
    library="torch_npu",
    arguments=_one,
)
def npu_mish(input: Tensor) -> Tensor:
    """Mish, `input * tanh(softplus(input))`: like `input`, contiguous."""
    return input.new_empty(input.shape)


def _mish_backward(grad: Tensor, input: Tensor) -> Tensor:
    wide = input.float()
    bend = torch.tanh(torch.nn.functional.softplus(wide))
    return (grad.float() * (bend + wide * (1 - bend * bend) * torch.sigmoid(wide))).to(input.dtype).contiguous()


@fake_kernel(
    "npu::npu_mish_backward(Tensor grad, Tensor input) -> Tensor",
    reference=_mish_backward,
    source=_ACLOPS + "MishKernelNpu.cpp",
    library="torch_npu",
    arguments=_two,
)
def npu_mish_backward(grad: Tensor, input: Tensor) -> Tensor:
    """The gradient of Mish: like `input`, contiguous."""
    return input.new_empty(input.shape)


KERNELS = (npu_silu, npu_silu_, npu_silu_backward, npu_mish, npu_mish_backward)
