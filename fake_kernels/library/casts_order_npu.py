"""torch_npu's own sort, maxima and one-hot: they exist in torch too, and here give other dtypes or fewer results.

Every result is fresh and contiguous. torch_npu has no fakes for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, FakeKernel, fake_kernel

_ACLOPS = "Ascend/op-plugin op_plugin/ops/aclops/"
_Pair = tuple[Tensor, Tensor]


def _dim(draw: Draw) -> tuple[int, int]:
    rank = draw.choice(2, 1, 3)
    return rank, draw.choice(-1, *range(-rank, rank))


def _check_dim(input: Tensor, dim: int) -> int:
    rank = input.dim()
    torch._check(-rank <= dim < rank, lambda: f"dim {dim} is not one of the {rank} dimensions of input")
    return dim % rank


def _beyond(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), 2), {}


def _sort(input: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return input.sort(dim, descending).values.contiguous()


def _sort_arguments(draw: Draw) -> Call:
    dtype, descending = draw.choice(*FLOATS), draw.flag()
    rank, dim = _dim(draw)
    return (draw.floats(*draw.sizes(rank), dtype=dtype), dim, descending), {}


@fake_kernel(
    "npu::npu_sort_v2(Tensor input, int dim=-1, bool descending=False) -> Tensor",
    reference=_sort,
    source=_ACLOPS + "SortWithoutIndicesKernelNpu.cpp",
    library="torch_npu",
    arguments=_sort_arguments,
    refuses={"is not one of the": _beyond},
)
def npu_sort_v2(input: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    """`input` sorted along `dim`, without the indices: like `input`, contiguous."""
    _check_dim(input, dim)
    return input.new_empty(input.shape)


def _extreme_arguments(draw: Draw) -> Call:
    dtype, keepdim = draw.choice(*FLOATS), draw.flag()
    rank, dim = _dim(draw)
    return (draw.floats(*draw.sizes(rank, least=1), dtype=dtype), dim, keepdim), {}


def _extreme(name: str, source: str) -> FakeKernel:
    def reference(input: Tensor, dim: int, keepdim: bool = False) -> _Pair:
        values, indices = getattr(input, name)(dim, keepdim)
        return values.contiguous(), indices.to(torch.int32).contiguous()

    @fake_kernel(
        f"npu::npu_{name}.dim(Tensor input, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)",
        reference=reference,
        source=_ACLOPS + source,
        library="torch_npu",
        arguments=_extreme_arguments,
        refuses={"is not one of the": _beyond},
    )
    def record(input: Tensor, dim: int, keepdim: bool = False) -> _Pair:
        """The greatest or least elements along `dim`, of the dtype of `input`, and their int32 indices, not int64."""
        place = _check_dim(input, dim)
        sizes = [*input.shape[:place], *[1] * keepdim, *input.shape[place + 1 :]]
        return input.new_empty(sizes), input.new_empty(sizes, dtype=torch.int32)

    return record


npu_max = _extreme("max", "MaxV1KernelNpu.cpp")
npu_min = _extreme("min", "MinV1KernelNpu.cpp")


def _one_hot(input: Tensor, num_classes: int = -1, depth: int = 1, on_value: float = 1, off_value: float = 0) -> Tensor:
    if num_classes != -1:
        raise RuntimeError(f"no one-hot along {num_classes}")
    hit = input.unsqueeze(-1) == torch.arange(depth, device=input.device)
    return torch.where(hit, float(on_value), float(off_value)).to(torch.float32).contiguous()


def _one_hot_arguments(draw: Draw) -> Call:
    dtype, depth, scalars = draw.choice(torch.int32, torch.int64), draw.choice(4, 1, 7), draw.choice((1, 0), (0.5, -2))
    return (draw.integers(*draw.shape(1, 3), low=0, high=6, dtype=dtype), -1, depth, *scalars), {}


def _along_rows(draw: Draw) -> Call:
    return (draw.integers(3, low=0, high=3, dtype=torch.int32), 0, 4), {}


@fake_kernel(
    "npu::npu_one_hot(Tensor input, int num_classes=-1, int depth=1, Scalar on_value=1, Scalar off_value=0) -> Tensor",
    reference=_one_hot,
    source=_ACLOPS + "OnehotNpu.cpp",
    library="torch_npu",
    arguments=_one_hot_arguments,
    refuses={"num_classes is the new dimension": _along_rows},
)
def npu_one_hot(
    input: Tensor, num_classes: int = -1, depth: int = 1, on_value: float = 1, off_value: float = 0
) -> Tensor:
    """`[..., depth]`, float32: `on_value` where the index is that of `input`, else `off_value`; contiguous.

    `num_classes` is, in spite of its name, the axis. The kernel gives the result these sizes for every axis, so that
    only the last makes sense; others are refused.
    """
    torch._check(num_classes == -1, lambda: f"num_classes is the new dimension, which has to be -1, not {num_classes}")
    return input.new_empty((*input.shape, depth), dtype=torch.float32)


KERNELS = (npu_sort_v2, npu_max, npu_min, npu_one_hot)
