"""torch_npu's gated activations: one half of a dimension is activated and multiplied with the other.

Results are contiguous whatever the strides of the arguments. op-plugin halves an odd size downwards without a word;
CANN demands an even one. torch_npu's own fake of SwiGLU halves with floats, which no symbolic size survives; that of
the backward of GEGLU gives two tensors for one, and does not repeat the schema's defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_GEGLU = "Ascend/op-plugin op_plugin/ops/opapi/GeGluKernelNpuOpApi.cpp"
_YAML = (
    "Ascend/op-plugin op_plugin/config/op_plugin_functions.yaml (gen_opapi), op_plugin/utils/KernelNpuOutputSize.cpp"
)


def halves(input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both in float32; the reference's own arithmetic."""
    if input.size(dim) % 2:
        raise RuntimeError(f"no halves of {input.shape} at {dim}")
    first, second = input.float().chunk(2, dim)
    return first, second


def draw_shapes(draw: Draw) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The dimension to be halved, the sizes of the argument, and those of the result."""
    rank = draw.choice(2, 1, 3)
    dim = draw.choice(-1, *range(-rank, rank))
    result = list(draw.sizes(rank))
    whole = list(result)
    whole[dim] *= 2
    return dim, tuple(whole), tuple(result)


def halved(input: Tensor, dim: int) -> list[int]:
    """The sizes of `input` with that at `dim` halved."""
    rank = input.dim()
    torch._check(-rank <= dim < rank, lambda: f"dim {dim} is not one of the {rank} dimensions of input")
    torch._check(
        input.shape[dim] % 2 == 0, lambda: f"input has to be of even size at dim {dim}, not {input.shape[dim]}"
    )
    sizes = list(input.shape)
    sizes[dim] = sizes[dim] // 2
    return sizes


def _odd(draw: Draw) -> Call:
    return (draw.floats(3, 5, dtype=torch.float32),), {}


def _beyond(draw: Draw) -> Call:
    return (draw.floats(2, 4, dtype=torch.float32), 2), {}


_REFUSES = {"of even size at dim": _odd, "is not one of the": _beyond}


def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = halves(input, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype).contiguous()


def _swiglu_arguments(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    dim, whole, _ = draw_shapes(draw)
    return (draw.floats(*whole, dtype=dtype),), {"dim": dim}


@fake_kernel(
    "npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    reference=_swiglu,
    source=_YAML,
    library="torch_npu",
    arguments=_swiglu_arguments,
    refuses=_REFUSES,
)
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`silu(first half) * second half` along `dim`: that size halved, of the dtype of `input`, contiguous."""
    return input.new_empty(halved(input, dim))


def _swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    gate, up = halves(input, dim)
    sigmoid, grad = torch.sigmoid(gate), grad_output.float()
    silu = gate * sigmoid
    return torch.cat([grad * up * (sigmoid + silu - silu * sigmoid), grad * silu], dim).to(input.dtype).contiguous()


def _swiglu_backward_arguments(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    dim, whole, result = draw_shapes(draw)
    return (draw.floats(*result, dtype=dtype), draw.floats(*whole, dtype=dtype), dim), {}


@fake_kernel(
    "npu::npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor",
    reference=_swiglu_backward,
    source=_YAML,
    library="torch_npu",
    arguments=_swiglu_backward_arguments,
)
def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """The gradient of `npu_swiglu`: like `input`, contiguous."""
    return input.new_empty(input.shape)


def _mode(approximate: int) -> str:
    return "tanh" if approximate == 1 else "none"


def _geglu(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    left, right = halves(input, dim)
    activated, other = (left, right) if activate_left else (right, left)
    gelu = torch.nn.functional.gelu(activated, approximate=_mode(approximate))
    return (gelu * other).to(input.dtype).contiguous(), gelu.to(input.dtype).contiguous()


def _geglu_arguments(draw: Draw) -> Call:
    dtype, approximate, activate_left = draw.choice(*FLOATS), draw.choice(1, 0), draw.flag()
    dim, whole, _ = draw_shapes(draw)
    return (draw.floats(*whole, dtype=dtype), dim, approximate, activate_left), {}


@fake_kernel(
    "npu::npu_geglu(Tensor input, int dim=-1, int approximate=1, bool activate_left=False) -> (Tensor, Tensor)",
    reference=_geglu,
    source=_GEGLU,
    library="torch_npu",
    arguments=_geglu_arguments,
    refuses=_REFUSES,
)
def npu_geglu(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    """GELU of the second half along `dim` (`activate_left`: of the first) times the other half; and that GELU alone.

    Both have that size halved, the dtype of `input`, and are contiguous. `approximate`: 0 with the error function, 1
    with tanh.
    """
    sizes = halved(input, dim)
    return input.new_empty(sizes), input.new_empty(sizes)


def _geglu_grad(
    grad_output: Tensor,
    input: Tensor,
    gelu: Tensor,
    dim: int = -1,
    approximate: int = 1,
    activate_left: bool = False,
) -> Tensor:
    left, right = halves(input, dim)
    activated, other = (left, right) if activate_left else (right, left)
    grad = grad_output.float()
    inner = torch.ops.aten.gelu_backward(grad * other, activated.contiguous(), approximate=_mode(approximate))
    both = (inner, grad * gelu.float()) if activate_left else (grad * gelu.float(), inner)
    return torch.cat(both, dim).to(input.dtype).contiguous()


def _geglu_grad_arguments(draw: Draw) -> Call:
    dtype, approximate, activate_left = draw.choice(*FLOATS), draw.choice(1, 0), draw.flag()
    dim, whole, result = draw_shapes(draw)
    grad, gelu = (draw.floats(*result, dtype=dtype) for _ in range(2))
    return (grad, draw.floats(*whole, dtype=dtype), gelu, dim, approximate, activate_left), {}


@fake_kernel(
    "npu::npu_geglu_grad(Tensor grad_output, Tensor input, Tensor gelu, int dim=-1, int approximate=1, "
    "bool activate_left=False) -> Tensor",
    reference=_geglu_grad,
    source=_GEGLU,
    library="torch_npu",
    arguments=_geglu_grad_arguments,
)
def npu_geglu_grad(
    grad_output: Tensor,
    input: Tensor,
    gelu: Tensor,
    dim: int = -1,
    approximate: int = 1,
    activate_left: bool = False,
) -> Tensor:
    """The gradient of `npu_geglu`, of which `gelu` is the second result: like `input`, contiguous."""
    return input.new_empty(input.shape)


KERNELS = (npu_swiglu, npu_swiglu_backward, npu_geglu, npu_geglu_grad)
