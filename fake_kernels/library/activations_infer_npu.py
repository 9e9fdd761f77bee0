"""torch_npu's gated activations that have no backward: for inference.

Results are contiguous whatever the strides of the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.activations_gated_npu import draw_shapes, halved, halves

_CLIPPED = (
    "Ascend/op-plugin op_plugin/config/op_plugin_functions.yaml (gen_opapi); "
    "hicann/ops-nn activation/clipped_swiglu/README.md"
)
_GELU_MUL = "hicann/ops-nn activation/gelu_mul/README.md, op_graph/gelu_mul_proto.h"


def odd(draw: Draw) -> Call:
    return (draw.floats(3, 5, dtype=torch.float32),), {}


def _gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    first, second = halves(input, -1)
    if not 2 <= input.dim() <= 8:
        raise RuntimeError(f"{input.dim()} dimensions")
    return (torch.nn.functional.gelu(first, approximate=approximate) * second).to(input.dtype).contiguous()


def _gelu_mul_arguments(draw: Draw) -> Call:
    dtype, approximate, count = draw.choice(*FLOATS), draw.choice("none", "tanh"), draw.choice(1, 2, 3)
    return (draw.floats(*draw.sizes(count), draw.size(times=2), dtype=dtype),), {"approximate": approximate}


def _erf(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32),), {"approximate": "erf"}


def _vector(draw: Draw) -> Call:
    return (draw.floats(4, dtype=torch.float32),), {}


@fake_kernel(
    'npu::npu_gelu_mul(Tensor input, *, str approximate="none") -> Tensor',
    reference=_gelu_mul,
    source=_GELU_MUL,
    library="torch_npu",
    arguments=_gelu_mul_arguments,
    refuses={"of even size at dim": odd, "has to be none or tanh": _erf, "2 to 8 dimensions": _vector},
)
def npu_gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`gelu(first half) * second half` of the last dimension: that size halved, of the dtype of `input`, contiguous.

    op-plugin's part of it could not be read; that the result is fresh and contiguous is what its other kernels do.
    """
    torch._check(approximate in ("none", "tanh"), lambda: f"approximate has to be none or tanh, not {approximate!r}")
    torch._check(2 <= input.dim() <= 8, lambda: f"input has to have 2 to 8 dimensions, not {input.dim()}")
    return input.new_empty(halved(input, -1))


def _clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    if x.size(dim) % 2:
        raise RuntimeError(f"no halves of {x.shape} at {dim}")
    flat = x.float().flatten(dim % x.dim()).reshape(-1, x.shape[dim % x.dim() :].numel()) if x.numel() else x.float()
    if not x.numel():
        shape = list(x.shape)
        shape[dim] //= 2
        return x.new_zeros(shape)
    middle = flat.shape[1] // 2
    gate, up = (flat[:, ::2], flat[:, 1::2]) if interleaved else (flat[:, :middle], flat[:, middle:])
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    found = gate * torch.sigmoid(alpha * gate) * (up + bias)
    if group_index is not None:
        kept = torch.arange(found.shape[0], device=x.device) < group_index.sum()
        found = torch.where(kept[:, None], found, 0.0)  # the kernel leaves these as they were
    shape = list(x.shape)
    shape[dim] //= 2
    return found.reshape(shape).to(x.dtype).contiguous()


def _clipped_arguments(draw: Draw) -> Call:
    dtype, interleaved, grouped = draw.choice(*FLOATS), draw.choice(True, False), draw.flag()
    dim, whole, _ = draw_shapes(draw)
    index = draw.integers(draw.size(least=1), low=0, high=3) if grouped else None
    return (draw.floats(*whole, dtype=dtype, scale=5.0),), {
        "group_index": index,
        "dim": dim,
        "interleaved": interleaved,
    }


def _clipped_beyond(draw: Draw) -> Call:
    return (draw.floats(2, 4, dtype=torch.float32),), {"dim": 2}


@fake_kernel(
    "npu::npu_clipped_swiglu(Tensor x, *, Tensor? group_index=None, int dim=-1, float alpha=1.702, float limit=7., "
    "float bias=1., bool interleaved=True) -> Tensor",
    reference=_clipped_swiglu,
    source=_CLIPPED,
    library="torch_npu",
    arguments=_clipped_arguments,
    refuses={"of even size at dim": odd, "is not one of the": _clipped_beyond},
)
def npu_clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """`a * sigmoid(alpha * a) * (b + bias)`, where `a` and `b` are `x` at even and odd places (halves of it unless
    `interleaved`), clipped at `limit`: that size halved, of the dtype of `x`, contiguous.

    Only the first `sum(group_index)` rows are computed, where rows are what lies before `dim`; the rest is not written.
    """
    return x.new_empty(halved(x, dim))


KERNELS = (npu_gelu_mul, npu_clipped_swiglu)
