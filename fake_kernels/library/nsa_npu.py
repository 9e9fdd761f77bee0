"""Ascend's native sparse attention for training: compress keys, attend to them and choose blocks, attend to the blocks.

Sequences lie one after the other (TND), their cumulative ends are ints. torch_npu has no fake for any of these.

Not in the open source are: what CANN refuses; and, of the mask that `npu_nsa_select_attention` takes, more than that it
is read with sparse mode 2, so the reference masks what lies ahead of a query where a mask is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.attention_reference_npu import COPIES, sequences

_SHAPES = (
    "Ascend/op-plugin docs/context/torch_npu-npu_nsa_compress_attention.md and -npu_nsa_compress.md; MindSpore's "
    "ms_custom_ops npu_nsa_compress_attention and mindspore.ops.nsa_select_attention (shapes of the results)"
)
_FORMULA = "CANN attention/nsa_compress_attention/docs/aclnnNsaCompressAttention.md"


def _compress(
    input: Tensor, weight: Tensor, compress_block_size: int, compress_stride: int, *, actual_seq_len: Any = None
) -> Tensor:
    found = []
    for span in sequences(actual_seq_len):
        rows = input[span].float()
        if rows.shape[0] >= compress_block_size:
            windows = rows.unfold(0, compress_block_size, compress_stride)  # [count, N, D, block]
            found.append(torch.einsum("cndb,bn->cnd", windows, weight.float()))
    return (torch.cat(found) if found else input[:0].float()).to(input.dtype).contiguous()


def _compress_arguments(draw: Draw) -> Call:
    dtype, ends = draw.choice(*HALVES), draw.choice((6,), (3, 12), (1, 2), (4, 4, 9))
    block, stride = draw.choice((4, 2), (4, 4), (2, 1))
    n, d = draw.sizes(2, least=1)
    args = draw.floats(ends[-1], n, d, dtype=dtype), draw.floats(block, n, dtype=dtype), block, stride
    return args, {"actual_seq_len": list(ends)}


def _without_ends(draw: Draw) -> Call:
    return (draw.floats(4, 2, 2, dtype=torch.float16), draw.floats(2, 2, dtype=torch.float16), 2, 1), {}


@fake_kernel(
    "npu::npu_nsa_compress(Tensor input, Tensor weight, int compress_block_size, int compress_stride, *, "
    "int[]? actual_seq_len=None) -> Tensor",
    reference=_compress,
    source=_SHAPES,
    library="torch_npu",
    arguments=_compress_arguments,
    refuses={"actual_seq_len has to be given": _without_ends},
)
def compress(
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Sequence[int] | None = None,
) -> Tensor:
    """Weighted sums of `input` `[T, N, D]` over windows of `compress_block_size` tokens, `compress_stride` apart,
    within each sequence; `weight` `[compress_block_size, N]`. Returns `[windows, N, D]` of input's dtype, contiguous;
    the number of windows follows from the ends, which are ints, so it is a constant of the graph."""
    torch._check(actual_seq_len is not None, lambda: "actual_seq_len has to be given: the cumulative ends of sequences")
    lengths = [end - start for start, end in pairwise([0, *(actual_seq_len or ())])]
    windows = sum(
        (each - compress_block_size) // compress_stride + 1 for each in lengths if each >= compress_block_size
    )
    return input.new_empty((windows, *input.shape[1:]))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence of `[T, N, D]`: output `[T, N, D2]`, maximum and sum `[T, N, 8]`, weights `[N, T, S]`."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    scores = q.float().transpose(0, 1) @ keys.mT * scale
    scores = scores if masked is None else scores.masked_fill(masked, -math.inf)
    maximum = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    exponentials = (scores - maximum.clamp_min(torch.finfo(torch.float32).min)).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.clamp_min(torch.finfo(torch.float32).tiny)
    rows = [x.transpose(0, 1).expand(-1, -1, COPIES).contiguous() for x in (maximum, total)]
    return (weights @ values).transpose(0, 1), rows[0], rows[1], weights


def _compress_attention(
    query: Tensor, key: Tensor, value: Tensor, scale_value: float, head_num: int, compress_block_size: int,
    compress_stride: int, select_block_size: int, select_block_count: int, *, topk_mask: Tensor | None = None,
    atten_mask: Tensor | None = None, actual_seq_qlen: Any = None, actual_cmp_seq_kvlen: Any = None,
    actual_sel_seq_kvlen: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = []
    ends = (actual_seq_qlen, actual_cmp_seq_kvlen, actual_sel_seq_kvlen)
    for rows, columns, blocks in zip(*map(sequences, ends), strict=True):
        q, k, v = query[rows], key[columns], value[columns]
        mask = None if atten_mask is None else atten_mask[: q.shape[0], : k.shape[0]].bool()
        output, maximum, total, weights = _attend(q, k, v, mask, scale_value)
        importance = weights.new_zeros((*weights.shape[:2], blocks.stop - blocks.start))
        for block in range(importance.shape[-1]):
            for m in range(select_block_size // compress_stride):
                for n in range(compress_block_size // compress_stride):
                    at = select_block_size // compress_stride * block - m - n
                    if 0 <= at < weights.shape[-1]:
                        importance[..., block] += weights[..., at]
        importance = importance.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
        if topk_mask is not None:
            importance = importance.masked_fill(topk_mask[: q.shape[0], None, : importance.shape[-1]].bool(), -1)
        missing = max(0, select_block_count - importance.shape[-1])
        padded = torch.nn.functional.pad(importance, (0, missing), value=-2.0)
        found.append((output, padded.topk(select_block_count, -1).indices, maximum, total))
    output, indices, maximum, total = (torch.cat(each) for each in zip(*found, strict=True))
    return output.to(query.dtype).contiguous(), indices.to(torch.int32).contiguous(), maximum, total


def _draw_tensors(draw: Draw) -> tuple[list[Tensor], int, tuple[int, ...], tuple[int, ...]]:
    dtype, heads, shared = draw.choice(*HALVES), draw.choice(1, 2), draw.choice(1, 2)
    ends, ends_of_keys = draw.choice(((3,), (8,)), ((2, 5), (8, 16)), ((1, 4), (4, 16)))
    d, d2 = draw.sizes(2, least=1)
    shapes = (ends[-1], heads * shared, d), (ends_of_keys[-1], heads, d), (ends_of_keys[-1], heads, d2)
    return [draw.floats(*shape, dtype=dtype) for shape in shapes], heads * shared, ends, ends_of_keys


def _compress_attention_arguments(draw: Draw) -> Call:
    masks, count = draw.flag(), draw.choice(1, 2)
    tensors, heads, ends, ends_of_keys = _draw_tensors(draw)
    blocks = tuple(end // 2 for end in ends_of_keys)
    given: dict[str, Any] = {"actual_seq_qlen": list(ends), "actual_cmp_seq_kvlen": list(ends_of_keys)}
    given["actual_sel_seq_kvlen"] = list(blocks)
    if masks:
        given["atten_mask"] = draw.placed(torch.ones(ends[-1], ends_of_keys[-1]).triu(1).bool())
        given["topk_mask"] = draw.placed(torch.ones(ends[-1], blocks[-1]).triu(1).bool())
    return (*tensors, 0.5, heads, 4, 2, 4, count), given


def _results(query: Tensor, value: Tensor) -> list[Tensor]:
    rows = (*query.shape[:2], 8)
    statistics = [query.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return [query.new_empty((*query.shape[:2], value.shape[2])), *statistics]


@fake_kernel(
    "npu::npu_nsa_compress_attention(Tensor query, Tensor key, Tensor value, float scale_value, int head_num, "
    "int compress_block_size, int compress_stride, int select_block_size, int select_block_count, *, "
    "Tensor? topk_mask=None, Tensor? atten_mask=None, int[]? actual_seq_qlen=None, int[]? actual_cmp_seq_kvlen=None, "
    "int[]? actual_sel_seq_kvlen=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_compress_attention,
    source=f"{_SHAPES}; {_FORMULA}",
    library="torch_npu",
    arguments=_compress_attention_arguments,
)
def compress_attention(
    query: Tensor, key: Tensor, value: Tensor, scale_value: float, head_num: int, compress_block_size: int,
    compress_stride: int, select_block_size: int, select_block_count: int, *, topk_mask: Tensor | None = None,
    atten_mask: Tensor | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_cmp_seq_kvlen: Sequence[int] | None = None, actual_sel_seq_kvlen: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention of `query` `[T, N, D]` to compressed `key` `[S, N2, D]` and `value` `[S, N2, D2]`, and what it looks
    at.

    Returns the output `[T, N, D2]` of query's dtype; the `select_block_count` most important blocks, int32 `[T, N2,
    count]`; each row's maximum and sum, float32 `[T, N, 8]`; all contiguous.
    """
    output, maximum, total = _results(query, value)
    blocks = query.new_empty((query.shape[0], key.shape[1], select_block_count), dtype=torch.int32)
    return output, blocks, maximum, total


def _select_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_indices: Tensor, scale_value: float, head_num: int,
    select_block_size: int, select_block_count: int, *, atten_mask: Tensor | None = None, actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = []
    for rows, columns in zip(sequences(actual_seq_qlen), sequences(actual_seq_kvlen), strict=True):
        q, k, v, chosen = query[rows], key[columns], value[columns], topk_indices[rows].long()
        block_of = torch.arange(k.shape[0], device=k.device) // select_block_size
        masked = ~(chosen[..., None] == block_of).any(2).transpose(0, 1)  # [N2, T, S]
        if atten_mask is not None:
            masked = masked | torch.ones(masked.shape[1:], dtype=torch.bool, device=k.device).triu(1)
        groups = q.shape[1] // k.shape[1]
        found.append(_attend(q, k, v, masked.repeat_interleave(groups, 0), scale_value)[:3])
    output, maximum, total = (torch.cat(each) for each in zip(*found, strict=True))
    return output.to(query.dtype).contiguous(), maximum, total


def _select_arguments(draw: Draw) -> Call:
    masked, count = draw.flag(), draw.choice(1, 2)
    tensors, heads, ends, ends_of_keys = _draw_tensors(draw)
    indices = draw.integers(ends[-1], tensors[1].shape[1], count, low=0, high=2, dtype=torch.int32)
    given: dict[str, Any] = {"actual_seq_qlen": list(ends), "actual_seq_kvlen": list(ends_of_keys)}
    if masked:
        given["atten_mask"] = draw.placed(torch.ones(ends[-1], ends_of_keys[-1]).triu(1).bool())
    return (*tensors, indices, 0.5, heads, 4, count), given


@fake_kernel(
    "npu::npu_nsa_select_attention(Tensor query, Tensor key, Tensor value, Tensor topk_indices, float scale_value, "
    "int head_num, int select_block_size, int select_block_count, *, Tensor? atten_mask=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None) -> (Tensor, Tensor, Tensor)",
    reference=_select_attention,
    source=_SHAPES,
    library="torch_npu",
    arguments=_select_arguments,
)
def select_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_indices: Tensor, scale_value: float, head_num: int,
    select_block_size: int, select_block_count: int, *, atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None, actual_seq_kvlen: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention of `query` `[T, N, D]` to the blocks of `key` `[S, N2, D]` that `topk_indices` `[T, N2, count]` names.

    Returns the output `[T, N, D2]` of query's dtype, and each row's maximum and sum, float32 `[T, N, 8]`; contiguous.
    """
    output, maximum, total = _results(query, value)
    return output, maximum, total


KERNELS = (compress, compress_attention, select_attention)
