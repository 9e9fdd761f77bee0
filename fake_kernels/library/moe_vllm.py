"""vLLM's helpers around the experts' matrix products. Both declare what they write; ours check what the kernels check.

Sources: vllm-project/vllm csrc/libtorch_stable/moe/moe_align_sum_kernels.cu (moe_sum) and
csrc/moe/moe_permute_unpermute_op.cu (shuffle_rows); schemas of 0.33.0 from the wheel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_COLUMNS = 16


def _sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    if not output.is_contiguous():
        raise ValueError("a contiguous output")
    rows = input.float()
    if topk_ids is not None:
        absent = topk_ids < 0
        if expert_map is not None:
            absent = absent | (expert_map[topk_ids.long().clamp(min=0)] < 0)
        rows = rows.masked_fill(absent[..., None], 0)
    output.copy_(rows.sum(1))


def _sum_arguments(draw: Draw) -> Call:
    dtype, number, experts = draw.choice(*FLOATS), draw.choice(torch.int32, torch.int64), draw.choice(4, 9)
    with_ids, with_map = draw.flag(), draw.flag()
    tokens, places, hidden = draw.size(least=1), draw.size(least=1), draw.size(least=1)
    output = draw.floats(tokens, hidden, dtype=dtype, layout="contiguous")
    ids = draw.integers(tokens, places, low=-1, high=experts, dtype=number) if with_ids else None
    owners = draw.integers(experts, low=-1, high=4, dtype=torch.int32, layout="contiguous")
    return (
        draw.floats(tokens, places, hidden, dtype=dtype),
        output,
        ids,
        owners if with_ids and with_map else None,
    ), {}


@fake_kernel(
    "_moe_C::moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None, Tensor? expert_map=None) -> ()",
    reference=_sum,
    source="vllm-project/vllm csrc/libtorch_stable/moe/moe_align_sum_kernels.cu",
    library="vllm._moe_C_stable_libtorch",
    arguments=_sum_arguments,
    refuses={
        "output has to be contiguous": lambda draw: (
            (
                draw.floats(3, 2, 4, dtype=torch.float32),
                draw.floats(3, 4, dtype=torch.float32, layout="transposed"),
            ),
            {},
        )
    },
)
def moe_sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """`output = input.sum(1)`, added in float32, without the rows of experts that live elsewhere.

    Args:
        input: `[tokens, k, hidden]`, float32, float16 or bfloat16, of any strides.
        output: `[tokens, hidden]`, contiguous, of the same dtype. WRITTEN.
        topk_ids: int32 or int64 `[tokens, k]`: rows of negative experts are left out.
        expert_map: int32 `[experts]`: so are those of experts that it maps to a negative number.
    """
    torch._check(output.is_contiguous(), lambda: "output has to be contiguous")


def _shuffle(input_tensor: Tensor, dst2src_map: Tensor, output_tensor: Tensor) -> None:
    if input_tensor.dtype != output_tensor.dtype or input_tensor.shape[1] % _COLUMNS:
        raise ValueError("one dtype, and whole vectors")
    output_tensor.view(torch.uint8).copy_(input_tensor.view(torch.uint8)[dst2src_map.long()])


def _rows(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw.floats(*shape, dtype=torch.float32, layout="contiguous").to(dtype)


def _shuffle_arguments(draw: Draw) -> Call:
    dtype = draw.choice(torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
    sources, rows, hidden = draw.size(least=1), draw.size(least=1), draw.size(least=1, times=_COLUMNS)
    order = draw.integers(rows, low=0, high=sources, dtype=torch.int32, layout="contiguous")
    return (_rows(draw, sources, hidden, dtype=dtype), order, _rows(draw, rows, hidden, dtype=dtype)), {}


@fake_kernel(
    "_moe_C::shuffle_rows(Tensor input_tensor, Tensor dst2src_map, Tensor! output_tensor) -> ()",
    reference=_shuffle,
    source="vllm-project/vllm csrc/moe/moe_permute_unpermute_op.cu",
    library="vllm._moe_C_stable_libtorch",
    arguments=_shuffle_arguments,
    refuses={
        "of one dtype": lambda draw: (
            (_rows(draw, 3, 16), draw.permutation(3), _rows(draw, 3, 16, dtype=torch.float16)),
            {},
        ),
        "multiple of 16": lambda draw: ((_rows(draw, 3, 8), draw.permutation(3), _rows(draw, 3, 8)), {}),
    },
)
def shuffle_rows(input_tensor: Tensor, dst2src_map: Tensor, output_tensor: Tensor) -> None:
    """`output_tensor[i] = input_tensor[dst2src_map[i]]`.

    Args:
        input_tensor: `[sources, hidden]`, contiguous. dst2src_map: int32 `[rows]`.
        output_tensor: `[rows, hidden]`, contiguous, of the same dtype. WRITTEN.

    `hidden` is a multiple of 16 whatever the dtype: the kernel takes the size of the dtype's number for its own.
    """
    torch._check(
        input_tensor.dtype == output_tensor.dtype,
        lambda: f"both tensors have to be of one dtype, not {input_tensor.dtype} and {output_tensor.dtype}",
    )
    columns = input_tensor.shape[1]
    torch._check(columns % _COLUMNS == 0, lambda: f"the columns have to be a multiple of {_COLUMNS}, not {columns}")


KERNELS = (moe_sum, shuffle_rows)
