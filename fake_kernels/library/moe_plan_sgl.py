"""SGLang's plans for grouped matrix products: which row goes where, counted on the device.

What they compute are numbers that later kernels take as sizes and offsets, so a call that compiled code dropped would
be read as whatever the buffers held. `prepare_moe_input` hides its six outputs; the other two declare theirs.

Sources: sgl-project/sglang sgl-kernel/csrc/moe/{prepare_moe_input,moe_align_kernel,moe_sum}.cu; schemas from the wheel
of sglang-kernel 0.4.10. Where the kernels place rows by atomic counters, the order within an expert is not defined;
the references keep the order of the pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "sgl-project/sglang sgl-kernel/csrc/moe/{}"


def _numbers(draw: Draw, *shape: int, below: int, least: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    return draw.integers(*shape, low=least, high=below, dtype=dtype, layout="contiguous")


def _prepare(
    topk_ids: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor | None,
    problem_sizes1: Tensor,
    problem_sizes2: Tensor,
    input_permutation: Tensor,
    output_permutation: Tensor,
    num_experts: int,
    n: int,
    k: int,
) -> None:
    if topk_ids.dtype != torch.int32:
        raise ValueError("int32 experts")
    experts = topk_ids.reshape(-1).long()
    counts = torch.bincount(experts, minlength=num_experts)
    for sizes, columns in ((problem_sizes1, (2 * n, k)), (problem_sizes2, (k, n))):
        sizes[:, 0] = counts
        sizes[:, 1], sizes[:, 2] = columns
    for offsets, steps in ((expert_offsets, counts), (blockscale_offsets, (counts + 127) // 128 * 128)):
        if offsets is not None:
            offsets[0] = 0
            offsets[1:] = steps.cumsum(0)
    order = experts.argsort(stable=True)
    input_permutation.copy_(order // topk_ids.shape[1])
    output_permutation.copy_(order.argsort())


def _prepare_arguments(draw: Draw) -> Call:
    experts, n, k, blocks = draw.choice(4, 1, 8), draw.choice(16, 32), draw.choice(32, 16), draw.flag()
    tokens, places = draw.size(least=1), draw.size(least=1, most=4)
    ids = _numbers(draw, tokens, places, below=experts)
    offsets = [_numbers(draw, experts + 1, below=9) for _ in range(2)]
    sizes = [_numbers(draw, experts, 3, below=9) for _ in range(2)]
    orders = [_numbers(draw, tokens * places, below=9) for _ in range(2)]
    return (ids, offsets[0], offsets[1] if blocks else None, *sizes, *orders, experts, n, k), {}


def _int64_experts(draw: Draw) -> Call:
    args, kwargs = _prepare_arguments(draw)
    return (args[0].long(), *args[1:]), kwargs


@fake_kernel(
    "sgl_kernel::prepare_moe_input(Tensor topk_ids, Tensor expert_offsets, Tensor? blockscale_offsets, "
    "Tensor problem_sizes1, Tensor problem_sizes2, Tensor input_permutation, Tensor output_permutation, "
    "int num_experts, int n, int k) -> ()",
    reference=_prepare,
    source=_SOURCE.format("prepare_moe_input.cu"),
    library="sgl_kernel",
    arguments=_prepare_arguments,
    refuses={"topk_ids has to be int32": _int64_experts},
    writes=(
        "expert_offsets",
        "blockscale_offsets",
        "problem_sizes1",
        "problem_sizes2",
        "input_permutation",
        "output_permutation",
    ),
)
def prepare_moe_input(
    topk_ids: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor | None,
    problem_sizes1: Tensor,
    problem_sizes2: Tensor,
    input_permutation: Tensor,
    output_permutation: Tensor,
    num_experts: int,
    n: int,
    k: int,
) -> None:
    """Sizes and places for two grouped products, `[rows, k] @ [k, 2 * n]` and `[rows, n] @ [n, k]`.

    Args:
        topk_ids: int32 `[tokens, places]`, contiguous, not empty.
        expert_offsets: int32 `[num_experts + 1]`: where each expert's rows begin. WRITTEN, as are all that follow.
        blockscale_offsets: the same with each expert's rows rounded up to 128.
        problem_sizes1, problem_sizes2: int32 `[num_experts, 3]`: rows, columns, depth.
        input_permutation: int32 `[tokens * places]`: the token of each row. output_permutation: the row of each pair.
    """
    torch._check(topk_ids.dtype == torch.int32, lambda: f"topk_ids has to be int32, not {topk_ids.dtype}")


def _align(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    cumsum_buffer: Tensor,
    pad_sorted_token_ids: bool,
    ignore_invalid_expert: bool,
) -> None:
    if topk_ids.is_floating_point():
        raise ValueError("whole numbers for experts")
    pairs = torch.arange(topk_ids.numel(), device=topk_ids.device)
    buckets = topk_ids.reshape(-1).long() + 1  # -1 is the bucket of experts that live elsewhere
    if ignore_invalid_expert:
        pairs, buckets = pairs[buckets > 0], buckets[buckets > 0]
    counts = torch.bincount(buckets, minlength=num_experts)
    padded = -(-counts // block_size) * block_size
    ends = padded.cumsum(0)
    buckets, order = buckets.sort(stable=True)
    place = (
        torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[buckets] + (ends - padded)[buckets]
    )
    if pad_sorted_token_ids:
        sorted_token_ids.fill_(topk_ids.numel())
    sorted_token_ids[place] = pairs[order].to(torch.int32)
    owners = torch.arange(num_experts, device=order.device).repeat_interleave(padded // block_size) - 1
    experts_ids[: len(owners)] = owners.to(torch.int32)
    num_tokens_post_pad.fill_(int(ends[-1]))


def _align_arguments(draw: Draw) -> Call:
    dtype, experts, block = draw.choice(torch.int32, torch.int64), draw.choice(4, 1, 8), draw.choice(4, 16, 1)
    pad, ignore = draw.flag(), draw.flag()
    tokens, places = draw.size(least=1), draw.size(least=1, most=4)
    room = tokens * places + (experts + 1) * (block - 1)
    return (
        _numbers(draw, tokens, places, below=experts, least=-1, dtype=dtype),
        experts + 1,
        block,
        _numbers(draw, room, below=9),
        _numbers(draw, -(-room // block), below=9),
        _numbers(draw, 1, below=9),
        _numbers(draw, experts + 2, below=1),
        pad,
        ignore,
    ), {}


def _float_experts(draw: Draw) -> Call:
    args, kwargs = _align_arguments(draw)
    return (args[0].float(), *args[1:]), kwargs


@fake_kernel(
    "sgl_kernel::moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, "
    "Tensor! experts_ids, Tensor! num_tokens_post_pad, Tensor! cumsum_buffer, bool pad_sorted_token_ids, "
    "bool ignore_invalid_expert) -> ()",
    reference=_align,
    source=_SOURCE.format("moe_align_kernel.cu"),
    library="sgl_kernel",
    arguments=_align_arguments,
    refuses={"topk_ids has to be of integers": _float_experts},
)
def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    cumsum_buffer: Tensor,
    pad_sorted_token_ids: bool,
    ignore_invalid_expert: bool,
) -> None:
    """Pairs sorted by expert, each expert's padded to whole blocks, and the expert of every block.

    Args:
        topk_ids: integers `[tokens, places]`; -1 for an expert that lives elsewhere.
        num_experts: one more than there are experts: bucket 0 is for -1.
        sorted_token_ids: int32, room for all pairs and the padding; the padding is `topk_ids.numel()` only with
            `pad_sorted_token_ids`, otherwise as it was. WRITTEN.
        experts_ids: int32, one per block. num_tokens_post_pad: int32 `[1]`. Both WRITTEN.
        cumsum_buffer: int32, scratch. WRITTEN, with contents that nobody should read; the reference leaves it alone.
        ignore_invalid_expert: the pairs with -1 are left out, instead of filling blocks of expert -1.
    """
    torch._check(not topk_ids.dtype.is_floating_point, lambda: f"topk_ids has to be of integers, not {topk_ids.dtype}")


def _sum(input: Tensor, output: Tensor) -> None:
    if not input.is_floating_point():
        raise ValueError("floats")
    output.copy_(input.float().sum(1))


def _sum_arguments(draw: Draw) -> Call:
    dtype, places = draw.choice(*FLOATS), draw.choice(2, 3, 4, 8, 1)
    tokens, hidden = draw.size(least=1), draw.size(least=1)
    rows = draw.floats(tokens, places, hidden, dtype=dtype, layout="contiguous")
    return (rows, draw.floats(tokens, hidden, dtype=dtype, layout="contiguous")), {}


@fake_kernel(
    "sgl_kernel::moe_sum(Tensor input, Tensor! output) -> ()",
    reference=_sum,
    source=_SOURCE.format("moe_sum.cu"),
    library="sgl_kernel",
    arguments=_sum_arguments,
    refuses={
        "input has to be of floats": lambda draw: (
            (_numbers(draw, 3, 2, 4, below=3), _numbers(draw, 3, 4, below=3)),
            {},
        )
    },
)
def moe_sum(input: Tensor, output: Tensor) -> None:
    """`output = input.sum(1)`: `[tokens, k, hidden]` to `[tokens, hidden]`, contiguous, of one dtype. WRITES `output`.

    For `k` of 2, 3 and 4 the kernel adds in the dtype of `input`, which may differ from the reference by rounding.
    """
    torch._check(input.dtype.is_floating_point, lambda: f"input has to be of floats, not {input.dtype}")


KERNELS = (prepare_moe_input, moe_align_block_size, moe_sum)
