"""torch_npu's transposes, slices and pads, which copy: every result is fresh and contiguous, never a view.

The integers in these schemas are `int`, not `SymInt`: a size that is passed for one becomes a constant of the graph.
torch_npu has no fake for them but for the transpose, whose fake keeps the strides of the permuted argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_ACLOPS = "Ascend/op-plugin op_plugin/ops/aclops/"
_PERMUTATIONS = tuple(itertools.permutations(range(3)))


def _check_permutation(perm: Sequence[int], count: int) -> None:
    torch._check(
        sorted(perm) == list(range(count)),
        lambda: f"perm has to name each of {count} dimensions once, from 0, not {list(perm)}",
    )


def _transpose(input: Tensor, perm: Sequence[int], require_contiguous: bool = True) -> Tensor:
    if min(perm, default=0) < 0:
        raise RuntimeError(f"negative dimension in {perm}")
    return input.permute(*perm).clone(memory_format=torch.contiguous_format)


def _transpose_arguments(draw: Draw) -> Call:
    dtype, perm, contiguous = draw.choice(*FLOATS), draw.choice(*_PERMUTATIONS), draw.choice(True, False)
    return (draw.floats(*draw.sizes(3), dtype=dtype), list(perm), contiguous), {}


def _negative_perm(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [-1, 0]), {}


def _repeated_perm(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [0, 0]), {}


@fake_kernel(
    "npu::npu_transpose(Tensor input, int[] perm, bool require_contiguous=True) -> Tensor",
    reference=_transpose,
    source=_ACLOPS + "TransposeKernelNpu.cpp",
    library="torch_npu",
    arguments=_transpose_arguments,
    refuses={"perm has to name each of 2": _negative_perm, "dimensions once": _repeated_perm},
)
def npu_transpose(input: Tensor, perm: Sequence[int], require_contiguous: bool = True) -> Tensor:
    """`input.permute(perm)` as a contiguous copy, whatever `require_contiguous`, which is about the argument."""
    _check_permutation(perm, input.dim())
    return input.new_empty([input.shape[dim] for dim in perm])


def _confusion(input: Tensor, perm: Sequence[int], shape: Sequence[int], transpose_first: bool) -> Tensor:
    found = input.permute(*perm).reshape(shape) if transpose_first else input.reshape(shape).permute(*perm)
    return found.clone(memory_format=torch.contiguous_format)


def _confusion_arguments(draw: Draw) -> Call:
    dtype, perm, first = draw.choice(*FLOATS), draw.choice(*_PERMUTATIONS), draw.flag()
    sizes = [draw.choice(2, 3, 4) for _ in range(3)]
    if first:
        moved = [sizes[dim] for dim in perm]
        return (draw.floats(*sizes, dtype=dtype), list(perm), [moved[0], moved[1] * moved[2]], True), {}
    return (draw.floats(sizes[0], sizes[1] * sizes[2], dtype=dtype), list(perm), sizes, False), {}


def _other_number(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [1, 0], [3, 5], True), {}


def _beyond(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [2, 0], [3, 4], False), {}


@fake_kernel(
    "npu::npu_confusion_transpose(Tensor input, int[] perm, int[] shape, bool transpose_first) -> Tensor",
    reference=_confusion,
    source=_ACLOPS + "ConfusionTransposeKernelNpu.cpp",
    library="torch_npu",
    arguments=_confusion_arguments,
    refuses={"another number of elements": _other_number, "perm has to name each of": _beyond},
)
def npu_confusion_transpose(input: Tensor, perm: Sequence[int], shape: Sequence[int], transpose_first: bool) -> Tensor:
    """`input` permuted and then reshaped to `shape` (`transpose_first`), or reshaped and then permuted; contiguous."""
    _check_permutation(perm, input.dim() if transpose_first else len(shape))
    torch._check(
        input.numel() == math.prod(shape),
        lambda: f"shape {list(shape)} has another number of elements than input, {list(input.shape)}",
    )
    return input.new_empty(list(shape) if transpose_first else [shape[dim] for dim in perm])


def _confusion_backward(grad: Tensor, perm: Sequence[int], shape: Sequence[int], transpose_first: bool) -> Tensor:
    inverse = [list(perm).index(dim) for dim in range(len(perm))]
    if transpose_first:
        return grad.permute(*inverse).reshape(shape).clone(memory_format=torch.contiguous_format)
    moved = grad.reshape([shape[dim] for dim in perm])
    return moved.permute(*inverse).clone(memory_format=torch.contiguous_format)


def _confusion_backward_arguments(draw: Draw) -> Call:
    dtype, perm, first = draw.choice(*FLOATS), draw.choice(*_PERMUTATIONS), draw.flag()
    sizes = draw.sizes(3)
    moved = [sizes[dim] for dim in perm]
    if first:  # of a forward that reshaped [a, b * c] to [a, b, c] and permuted that
        return (draw.floats(*moved, dtype=dtype), list(perm), [sizes[0], sizes[1] * sizes[2]], True), {}
    return (draw.floats(moved[0], moved[1] * moved[2], dtype=dtype), list(perm), list(sizes), False), {}


def _no_inverse(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [0, 2], [3, 4], True), {}


@fake_kernel(
    "npu::npu_confusion_transpose_backward(Tensor grad, int[] perm, SymInt[] shape, bool transpose_first) -> Tensor",
    reference=_confusion_backward,
    source=_ACLOPS + "ConfusionTransposeKernelNpu.cpp",
    library="torch_npu",
    arguments=_confusion_backward_arguments,
    refuses={"perm has to name each of": _no_inverse},
)
def npu_confusion_transpose_backward(
    grad: Tensor, perm: Sequence[int], shape: Sequence[int], transpose_first: bool
) -> Tensor:
    """The gradient of an `npu_confusion_transpose` with the same `perm` of an argument of sizes `shape`, contiguous.

    `transpose_first` is the opposite of the forward's.
    """
    _check_permutation(perm, len(perm) if transpose_first else len(shape))
    return grad.new_empty(list(shape))


def _slice(input: Tensor, offsets: Sequence[int], size: Sequence[int]) -> Tensor:
    found = input
    for dim, (offset, length) in enumerate(zip(offsets, size, strict=True)):
        found = found.narrow(dim, offset, length)
    return found.clone(memory_format=torch.contiguous_format)


def _slice_arguments(draw: Draw) -> Call:
    dtype, rank = draw.choice(*FLOATS), draw.choice(2, 1, 3)
    offsets = [draw.choice(0, 1) for _ in range(rank)]
    size = [draw.choice(2, 1, 0) for _ in range(rank)]
    return (draw.floats(*draw.sizes(rank, least=3), dtype=dtype), offsets, size), {}


def _past_the_end(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), [1, 1], [2, 4]), {}


@fake_kernel(
    "npu::npu_slice(Tensor input, int[] offsets, int[] size) -> Tensor",
    reference=_slice,
    source=_ACLOPS + "SliceKernelNpu.cpp",
    library="torch_npu",
    arguments=_slice_arguments,
    refuses={"ends after input": _past_the_end},
)
def npu_slice(input: Tensor, offsets: Sequence[int], size: Sequence[int]) -> Tensor:
    """The elements of `input` from `offsets`, `size` many in each dimension: a contiguous copy of sizes `size`."""
    for dim, (offset, length) in enumerate(zip(offsets, size, strict=True)):
        torch._check(
            offset + length <= input.shape[dim],
            lambda dim=dim: (
                f"the slice {list(offsets)} of sizes {list(size)} ends after input, {list(input.shape)}, "
                f"in dimension {dim}"
            ),
        )
    return input.new_empty(list(size))


def _pad(input: Tensor, paddings: Sequence[int]) -> Tensor:
    both = [*paddings, *[0] * (2 * input.dim() - len(paddings))]
    pairs = [both[2 * dim : 2 * dim + 2] for dim in reversed(range(input.dim()))]
    found = torch.nn.functional.pad(input, [each for pair in pairs for each in pair])
    return found.clone(memory_format=torch.contiguous_format)


def _pad_arguments(draw: Draw) -> Call:
    dtype, rank = draw.choice(*FLOATS), draw.choice(2, 1, 3)
    paddings = [draw.choice(1, 0, 2) for _ in range(draw.choice(2 * rank, 2 * rank - 1, 1))]
    return (draw.floats(*draw.sizes(rank), dtype=dtype), paddings), {}


@fake_kernel(
    "npu::npu_pad(Tensor input, int[] paddings) -> Tensor",
    reference=_pad,
    source=_ACLOPS + "PadKernelNpu.cpp, op_plugin/utils/KernelNpuOutputSize.cpp",
    library="torch_npu",
    arguments=_pad_arguments,
)
def npu_pad(input: Tensor, paddings: Sequence[int]) -> Tensor:
    """`input` with zeros around: `paddings` is how many before and after, from the first dimension on; contiguous."""
    both = [*paddings, *[0] * (2 * input.dim() - len(paddings))]
    return input.new_empty([size + both[2 * dim] + both[2 * dim + 1] for dim, size in enumerate(input.shape)])


KERNELS = (
    npu_transpose,
    npu_confusion_transpose,
    npu_confusion_transpose_backward,
    npu_slice,
    npu_pad,
)
