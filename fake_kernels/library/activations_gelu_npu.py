"""torch_npu's GELUs, and their backwards.

Results are contiguous whatever the strides of the arguments; torch_npu's own fakes keep the strides of permuted ones,
and that of the backward of GELU the dtype of one argument: the kernel's is the promoted one. What CANN's kernels
compute is closed, and taken from its documentation: `FastGelu` is `x * sigmoid(1.702 * x)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_ACLOPS = "Ascend/op-plugin op_plugin/ops/aclops/"
_YAML = "Ascend/op-plugin op_plugin/config/op_plugin_functions.yaml (gen_opapi)"
_MODES = ("none", "tanh")


def _one(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    return (draw.floats(*draw.shape(0, 4), dtype=dtype),), {}


def _alike(draw: Draw, count: int) -> tuple[Tensor, ...]:
    dtype = draw.choice(*FLOATS)
    shape = draw.shape(0, 3)
    return tuple(draw.floats(*shape, dtype=dtype) for _ in range(count))


def _two(draw: Draw) -> Call:
    return _alike(draw, 2), {}


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.nn.functional.gelu(input.float(), approximate=approximate).to(input.dtype).contiguous()


def _gelu_arguments(draw: Draw) -> Call:
    approximate = draw.choice(*_MODES)
    return _one(draw)[0], {"approximate": approximate}


def _gelu_of_another_mode(draw: Draw) -> Call:
    return _one(draw)[0], {"approximate": "erf"}


@fake_kernel(
    'npu::npu_gelu(Tensor input, *, str approximate="none") -> Tensor',
    reference=_gelu,
    source="Ascend/op-plugin op_plugin/ops/opapi (aclnnGeluV2, npu_gelu); " + _YAML,
    library="torch_npu",
    arguments=_gelu_arguments,
    refuses={"approximate has to be none or tanh": _gelu_of_another_mode},
)
def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU, with the error function (`none`) or the tanh approximation: like `input`, contiguous."""
    _check_mode(approximate)
    return input.new_empty(input.shape)


def _gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    grad, wide = torch.broadcast_tensors(grad_output.float(), input.float())
    found: Tensor = torch.ops.aten.gelu_backward(grad.contiguous(), wide.contiguous(), approximate=approximate)
    return found.to((grad_output * input).dtype).contiguous()


def _gelu_backward_arguments(draw: Draw) -> Call:
    approximate, rank, fewer = draw.choice(*_MODES), draw.choice(1, 2, 3), draw.choice(0, 1)
    grad_dtype, dtype = draw.choice(*FLOATS), draw.choice(*FLOATS)
    shape = draw.sizes(rank)
    grad = draw.floats(*shape[fewer:], dtype=grad_dtype)
    return (grad, draw.floats(*shape, dtype=dtype)), {"approximate": approximate}


def _gelu_backward_of_other_sizes(draw: Draw) -> Call:
    return (draw.floats(3, dtype=torch.float32), draw.floats(4, dtype=torch.float32)), {}


def _gelu_backward_of_another_mode(draw: Draw) -> Call:
    return _alike(draw, 2), {"approximate": "erf"}


@fake_kernel(
    'npu::npu_gelu_backward(Tensor grad_output, Tensor input, *, str approximate="none") -> Tensor',
    reference=_gelu_backward,
    source=_YAML,
    library="torch_npu",
    arguments=_gelu_backward_arguments,
    refuses={
        "approximate has to be none or tanh": _gelu_backward_of_another_mode,
        "do not broadcast": _gelu_backward_of_other_sizes,
    },
)
def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    """The gradient of GELU: contiguous, of the broadcast sizes and the promoted dtype of both arguments."""
    _check_mode(approximate)
    try:
        shape = torch.broadcast_shapes(grad_output.shape, input.shape)
    except RuntimeError as error:
        sizes = f"{list(grad_output.shape)} and {list(input.shape)}"
        raise RuntimeError(f"grad_output and input do not broadcast: {sizes}") from error
    return input.new_empty(shape, dtype=torch.result_type(grad_output, input))


def _check_mode(approximate: str) -> None:
    torch._check(approximate in _MODES, lambda: f"approximate has to be none or tanh, not {approximate!r}")


def _fast_gelu(input: Tensor) -> Tensor:
    wide = input.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(input.dtype).contiguous()


@fake_kernel(
    "npu::fast_gelu(Tensor input) -> Tensor",
    reference=_fast_gelu,
    source=_ACLOPS + "FastGeluKernelNpu.cpp",
    library="torch_npu",
    arguments=_one,
)
def fast_gelu(input: Tensor) -> Tensor:
    """`input * sigmoid(1.702 * input)`: like `input`, contiguous."""
    return input.new_empty(input.shape)


@fake_kernel(
    "npu::npu_fast_gelu(Tensor input) -> Tensor",
    reference=_fast_gelu,
    source=_ACLOPS + "FastGeluKernelNpu.cpp",
    library="torch_npu",
    arguments=_one,
)
def npu_fast_gelu(input: Tensor) -> Tensor:
    """`input * sigmoid(1.702 * input)`: like `input`, contiguous."""
    return input.new_empty(input.shape)


def _fast_gelu_backward(grad: Tensor, input: Tensor) -> Tensor:
    wide = input.float()
    sigmoid = torch.sigmoid(1.702 * wide)
    return (grad.float() * sigmoid * (1 + 1.702 * wide * (1 - sigmoid))).to(input.dtype).contiguous()


@fake_kernel(
    "npu::npu_fast_gelu_backward(Tensor grad, Tensor input) -> Tensor",
    reference=_fast_gelu_backward,
    source=_ACLOPS + "FastGeluKernelNpu.cpp",
    library="torch_npu",
    arguments=_two,
)
def npu_fast_gelu_backward(grad: Tensor, input: Tensor) -> Tensor:
    """The gradient of `npu_fast_gelu`: like `input`, contiguous."""
    return input.new_empty(input.shape)


KERNELS = (npu_gelu, npu_gelu_backward, fast_gelu, npu_fast_gelu, npu_fast_gelu_backward)
