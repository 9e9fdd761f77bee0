"""Ascend's way back from the experts: their results weighted and summed per token; rows of other cards regrouped.

`npu_moe_finalize_routing` knows the number of tokens from `scales`; without it, from the number of pairs and `k`.

Sources: Ascend/op-plugin op_plugin/ops/opapi (the files that define npu_moe_finalize_routing and npu_moe_re_routing),
docs/context of the same names, test/test_custom_ops/test_npu_moe_finalize_routing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel


def _finalize(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    if expanded_permuted_rows.dim() not in (2, 3):
        raise ValueError("rows of the experts, [pairs, hidden] or [experts, capacity, hidden]")
    hidden = expanded_permuted_rows.shape[-1]
    where = expanded_src_to_dst_row.long()
    places = scales.shape[1] if scales is not None else k or 1
    tokens = scales.shape[0] if scales is not None else len(where) // places
    by_row = (drop_pad_mode or 0) >= 2
    where = where.view(tokens, places) if by_row else where.view(places, tokens).T
    rows = expanded_permuted_rows.float().flatten(0, -2)
    rows = torch.cat((rows, rows.new_zeros(1, hidden)))[where]  # -1 is a pair that was dropped: the row of zeros
    if bias is not None and export_for_source_row is not None:
        rows = rows + bias.float()[export_for_source_row.long()]
    if scales is not None:
        rows = rows * scales.float()[..., None]
    total = rows.sum(1)
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip.float()
    return total.to(expanded_permuted_rows.dtype)


def _finalize_arguments(draw: Draw) -> Call:
    dtype, mode, places, capacity = draw.choice(*FLOATS), draw.choice(0, 1, 2, 3), draw.choice(2, 1), draw.choice(3, 5)
    with_skips, with_bias, with_scales = draw.choice(0, 1, 2), draw.flag(), draw.flag()
    tokens, hidden, experts = draw.size(least=1), draw.size(), draw.size(least=1)
    pad = mode in (1, 3)
    rows = draw.floats(*((experts, capacity) if pad else (tokens * places,)), hidden, dtype=dtype)
    count = experts * capacity if pad else tokens * places
    where = draw.integers(tokens * places, low=-1 if pad else 0, high=count, dtype=torch.int32)
    skips = [draw.floats(tokens, hidden, dtype=dtype) if number < with_skips else None for number in range(2)]
    bias = draw.floats(experts, hidden, dtype=dtype) if with_bias else None
    owners = draw.integers(tokens, places, low=0, high=experts, dtype=torch.int32) if with_bias else None
    scales = draw.floats(tokens, places, dtype=dtype) if with_scales else None
    return (rows, *skips, bias, scales, where, owners, mode), {"k": places}


@fake_kernel(
    "npu::npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, "
    "Tensor? scales, Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) "
    "-> Tensor",
    reference=_finalize,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_moe_finalize_routing), docs/context",
    library="torch_npu",
    arguments=_finalize_arguments,
    refuses={
        "has to have 2 or 3 dimensions": lambda draw: (
            (draw.floats(6, dtype=torch.float32), None, None, None, None, draw.integers(6, low=0, high=6), None),
            {},
        )
    },
)
def finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Sum over the experts of each token, weighted, plus `skip1` and `skip2`: `[tokens, hidden]`, contiguous.

    Args:
        expanded_permuted_rows: `[tokens * k, hidden]`, or `[experts, capacity, hidden]`; float16, bfloat16 or float32.
        skip1, skip2: `[tokens, hidden]`. bias: `[experts, hidden]`, with export_for_source_row `[tokens, k]`, int32.
        scales: `[tokens, k]`.
        expanded_src_to_dst_row: int32 `[tokens * k]`: the row of a pair; -1 where it was dropped.
        drop_pad_mode: 0 and 1: pairs place by place; 2 and 3: token by token; 1 and 3: rows by expert and capacity.

    The result has the dtype of `expanded_permuted_rows`. Not read: whether a dropped pair still adds its expert's bias.
    """
    dims = expanded_permuted_rows.dim()
    torch._check(dims in (2, 3), lambda: f"expanded_permuted_rows has to have 2 or 3 dimensions, not {dims}")
    pairs, places = expanded_src_to_dst_row.shape[0], 1 if k is None else k
    tokens = scales.shape[0] if scales is not None else pairs // places if places > 0 else pairs
    return expanded_permuted_rows.new_empty((tokens, expanded_permuted_rows.shape[-1]))


def _re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if tokens.dim() < 2 or expert_token_num_per_rank.dim() < 2 or tokens_dtype is not None:
        raise ValueError("tokens [rows, hidden] and counts [ranks, experts], of torch's own dtypes")
    counts = expert_token_num_per_rank.long()
    expert = torch.arange(counts.shape[1], device=tokens.device).repeat(counts.shape[0])
    source = expert.repeat_interleave(counts.reshape(-1)).argsort(stable=True)  # by expert, then by rank
    per_expert = expert_token_num_per_rank.sum(0, dtype=expert_token_num_per_rank.dtype)
    if expert_token_num_type == 0:
        per_expert = per_expert.cumsum(0, dtype=per_expert.dtype)
    scales = (
        tokens.new_zeros(len(tokens), dtype=torch.float32) if per_token_scales is None else per_token_scales[source]
    )
    places = source.argsort() if idx_type else source
    return tokens[source].contiguous(), scales.contiguous(), places.to(torch.int32), per_expert


def _re_routing_arguments(draw: Draw) -> Call:
    dtype, count = draw.choice(torch.bfloat16, torch.float16, torch.int8), draw.choice(torch.int64, torch.int32)
    with_scales, mode, index = draw.choice(0, 1, 2), draw.choice(1, 0), draw.choice(0, 1)
    rows, hidden, ranks, experts = draw.size(), draw.size(), draw.size(least=1), draw.size(least=1)
    origin = draw.integers(rows, low=0, high=ranks * experts, layout="contiguous")
    counts = torch.bincount(origin, minlength=ranks * experts).view(ranks, experts).to(count)
    if dtype == torch.int8:
        tokens = draw.integers(rows, hidden, low=-128, high=128, dtype=dtype)
    else:
        tokens = draw.floats(rows, hidden, dtype=dtype)
    scales = draw.floats(rows, *((2,) if with_scales == 2 else ()), dtype=torch.float32) if with_scales else None
    options = {"per_token_scales": scales, "expert_token_num_type": mode, "idx_type": index}
    return (tokens, draw.placed(counts)), options


@fake_kernel(
    "npu::npu_moe_re_routing(Tensor tokens, Tensor expert_token_num_per_rank, *, Tensor? per_token_scales=None, "
    "int expert_token_num_type=1, int idx_type=0, int? tokens_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_re_routing,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_moe_re_routing), docs/context",
    library="torch_npu",
    arguments=_re_routing_arguments,
    refuses={
        "tokens has to have at least 2": lambda draw: (
            (draw.floats(6, dtype=torch.float16), draw.integers(2, 3, low=1, high=2)),
            {},
        ),
        "expert_token_num_per_rank has to have at least 2": lambda draw: (
            (draw.floats(6, 2, dtype=torch.float16), draw.integers(6, low=1, high=2)),
            {},
        ),
        "is not described": lambda draw: (
            (draw.floats(6, 2, dtype=torch.float16), draw.integers(2, 3, low=1, high=2)),
            {"tokens_dtype": 290},
        ),
    },
)
def re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that came rank by rank, regrouped expert by expert.

    Args:
        tokens: `[rows, hidden]`, any dtype.
        expert_token_num_per_rank: int32 or int64 `[ranks, experts]`; the sum is `rows`.
        per_token_scales: `[rows]` or `[rows, ...]`.
        expert_token_num_type: the last result holds 1 counts, 0 their running sum.
        idx_type: the third result holds 0 where a row came from, 1 where it went.
        tokens_dtype: a packed dtype that torch does not have (hifloat8, float4). Not described here, and refused.

    Returns tokens like `tokens`, scales like `per_token_scales` (without: float32 `[rows]`, not filled), int32
    `[rows]`, and `[experts]` of the dtype of `expert_token_num_per_rank`. All contiguous.
    """
    for name, tensor in (("tokens", tokens), ("expert_token_num_per_rank", expert_token_num_per_rank)):
        dims = tensor.dim()
        torch._check(dims > 1, lambda name=name, dims=dims: f"{name} has to have at least 2 dimensions, not {dims}")
    torch._check(tokens_dtype is None, lambda: f"tokens_dtype={tokens_dtype}, a packed dtype, is not described")
    rows = tokens.shape[0]
    if per_token_scales is None:
        scales = tokens.new_empty((rows,), dtype=torch.float32)
    else:
        scales = per_token_scales.new_empty(per_token_scales.shape)
    return (
        tokens.new_empty(tokens.shape),
        scales,
        tokens.new_empty((rows,), dtype=torch.int32),
        expert_token_num_per_rank.new_empty((expert_token_num_per_rank.shape[1],)),
    )


KERNELS = (finalize_routing, re_routing)
