"""Ascend's routing: a row for every (token, expert) pair, in the order of the experts, and back.

`npu_moe_init_routing` numbers the pairs place by place (`row + place * tokens`), like `npu_moe_gating_top_k_softmax`.
`active_num` is an `int` of the schema and the number of tokens a symbol, so their minimum is `torch.sym_min`: a plain
`min` would compile one graph for few tokens and one for many.

Sources: Ascend/op-plugin op_plugin/ops/opapi (the files that define these operators) and test/test_custom_ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel


def _init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or row_idx.shape != expert_idx.shape or len(row_idx) != len(x) or active_num < 0:
        raise ValueError("x [tokens, hidden], with row_idx and expert_idx [tokens, k]")
    if x.dtype not in FLOATS or row_idx.dtype != torch.int32 or expert_idx.dtype != torch.int32:
        raise ValueError("x of floats, the others int32")
    tokens, k = expert_idx.shape
    experts, order = expert_idx.reshape(-1).sort(stable=True)
    rows = row_idx.reshape(-1)[order]
    back = torch.zeros_like(rows)
    back[rows.long()] = torch.arange(tokens * k, dtype=torch.int32, device=x.device)
    active = rows[: min(active_num, tokens) * k].long()
    return x[active % tokens if tokens else active].contiguous(), back, experts


def _routing_arguments(draw: Draw) -> Call:
    dtype, active, layout = draw.choice(*FLOATS), draw.choice(100, 3, 0), draw.choice("contiguous", "transposed")
    tokens, k = draw.size(), draw.size(most=4)
    x = draw.floats(tokens, draw.size(), dtype=dtype)
    rows = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).T
    experts = draw.integers(tokens, k, low=0, high=5, dtype=torch.int32)
    return (x, draw.placed(rows, layout), experts, active), {}


def _pairs(draw: Draw, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return draw.integers(*shape, low=0, high=3, dtype=dtype)


def _x(draw: Draw) -> Tensor:
    return draw.floats(3, 4, dtype=torch.float32)


@fake_kernel(
    "npu::npu_moe_init_routing(Tensor x, Tensor row_idx, Tensor expert_idx, int active_num) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_init_routing,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_moe_init_routing)",
    library="torch_npu",
    arguments=_routing_arguments,
    refuses={
        "x has to have 2 dimensions": lambda draw: (
            (draw.floats(3, dtype=torch.float32), _pairs(draw, 3, 2), _pairs(draw, 3, 2), 3),
            {},
        ),
        "x has to be float16": lambda draw: ((_pairs(draw, 3, 4), _pairs(draw, 3, 2), _pairs(draw, 3, 2), 3), {}),
        "a row per row of x": lambda draw: ((_x(draw), _pairs(draw, 2, 2), _pairs(draw, 2, 2), 3), {}),
        "of one shape": lambda draw: ((_x(draw), _pairs(draw, 3, 1), _pairs(draw, 3, 2), 3), {}),
        "have to be int32": lambda draw: (
            (_x(draw), _pairs(draw, 3, 2), _pairs(draw, 3, 2, dtype=torch.int64), 3),
            {},
        ),
        "active_num has to be at least 0": lambda draw: ((_x(draw), _pairs(draw, 3, 2), _pairs(draw, 3, 2), -1), {}),
    },
)
def init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `x`, one per pair, sorted by expert; of the first `active_num` tokens' worth of pairs.

    Args:
        x: `[tokens, hidden]`, float16, bfloat16 or float32.
        row_idx: int32 `[tokens, k]`: the number of the pair, `row + place * tokens`.
        expert_idx: int32 `[tokens, k]`.

    Returns the rows `[min(tokens, active_num) * k, hidden]`, where every pair went, int32 `[tokens * k]`, and its
    expert, sorted, int32 `[tokens * k]`. All contiguous.
    """
    torch._check(x.dim() == 2, lambda: f"x has to have 2 dimensions, not {x.dim()}")
    torch._check(x.dtype in FLOATS, lambda: f"x has to be float16, bfloat16 or float32, not {x.dtype}")
    torch._check(
        row_idx.dtype == expert_idx.dtype == torch.int32,
        lambda: f"row_idx and expert_idx have to be int32, not {row_idx.dtype} and {expert_idx.dtype}",
    )
    torch._check(
        expert_idx.dim() == 2 and expert_idx.shape[0] == x.shape[0],
        lambda: f"expert_idx has to have a row per row of x, {x.shape[0]}, not {list(expert_idx.shape)}",
    )
    torch._check(
        row_idx.dim() == 2 and row_idx.shape[0] == expert_idx.shape[0] and row_idx.shape[1] == expert_idx.shape[1],
        lambda: f"row_idx and expert_idx have to be of one shape, not {list(row_idx.shape)}, {list(expert_idx.shape)}",
    )
    torch._check(active_num >= 0, lambda: f"active_num has to be at least 0, not {active_num}")
    tokens, k = expert_idx.shape
    return (
        x.new_empty((torch.sym_min(tokens, active_num) * k, x.shape[1])),
        row_idx.new_empty((tokens * k,)),
        expert_idx.new_empty((tokens * k,)),
    )


def _compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    wanted = torch.arange(num_expert, dtype=torch.int32, device=sorted_expert_for_source_row.device)
    found = torch.searchsorted(sorted_expert_for_source_row.contiguous(), wanted, right=True)
    return found.to(sorted_expert_for_source_row.dtype)


def _sorted_experts(draw: Draw) -> Call:
    experts, layout = draw.choice(4, 1, 7), draw.choice("contiguous", "strided", "offset")
    numbers = draw.integers(draw.size(), low=0, high=experts, dtype=torch.int32, layout="contiguous")
    return (draw.placed(numbers.sort().values, layout), experts), {}


@fake_kernel(
    "npu::npu_moe_compute_expert_tokens(Tensor sorted_expert_for_source_row, int num_expert) -> Tensor",
    reference=_compute_expert_tokens,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_moe_compute_expert_tokens)",
    library="torch_npu",
    arguments=_sorted_experts,
)
def compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """Where each expert's rows end: how many of the sorted numbers are not above it.

    Args:
        sorted_expert_for_source_row: `[rows]`, ascending, int32.

    Returns `[num_expert]`, contiguous, of the argument's dtype (op-plugin allocates it like the argument).
    """
    return sorted_expert_for_source_row.new_empty((num_expert,))


KERNELS = (init_routing, compute_expert_tokens)
