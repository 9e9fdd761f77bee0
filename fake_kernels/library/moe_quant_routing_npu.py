"""Ascend's routing with int8 quantisation: rows by expert, quantised on the way.

Five results, of which each but the first two exists in some modes only; an absent one is an undefined tensor, which is
None in Python. A fake that gave a tensor instead would promise memory that is not there.

Sources: Ascend/op-plugin op_plugin/ops/opapi (npu_moe_init_routing_quant), its test, and CANN's document of
aclnnMoeInitRoutingQuantV2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _routing_quant(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = 1024,
    expert_capacity: int = 0,
    expert_num: int = 256,
    drop_pad_mode: int = 0,
    expert_tokens_num_mode: int = 0,
    expert_tokens_before_capacity_flag: bool = False,
    quant_mode: int = 1,
) -> Results:
    if x.dim() != 2 or expert_idx.dim() != 2 or len(x) != len(expert_idx):
        raise ValueError("x [tokens, hidden] and its experts [tokens, k]")
    if drop_pad_mode not in (0, 1) or quant_mode not in (0, 1) or expert_tokens_num_mode not in (0, 1, 2):
        raise ValueError("no such mode")
    k, hidden, device = expert_idx.shape[1], x.shape[1], x.device
    experts, order = expert_idx.reshape(-1).long().sort(stable=True)
    counts = torch.bincount(experts, minlength=expert_num)
    sources = x.float()[order // k if k else order]
    if quant_mode == 0 and scale is not None:
        values, factors = sources * scale.float() + (0 if offset is None else offset.float()), None
    else:
        if scale is not None:
            sources = sources * (scale if len(scale) == 1 else scale[experts]).float()
        largest = sources.abs().amax(-1, keepdim=True) / 127 if hidden else sources.new_zeros(len(sources), 1)
        values, factors = sources / torch.where(largest == 0, 1, largest), largest[:, 0]
    quantised = values.round().clamp(-128, 127).to(torch.int8)
    place = torch.arange(len(order), device=device)
    if drop_pad_mode:
        slot = place - (counts.cumsum(0) - counts)[experts]  # the how many-th of its expert
        kept = slot < expert_capacity
        place = torch.where(kept, experts * expert_capacity + slot, -1)
        rows = quantised.new_zeros(expert_num * expert_capacity, hidden)
        rows[place[kept]] = quantised[kept]
        scales = torch.zeros(len(rows), device=device)
        if factors is not None:
            scales[place[kept]] = factors[kept]
        rows = rows.view(expert_num, expert_capacity, hidden)
    else:
        active = min(active_num, len(order)) if active_num > 0 else len(order)
        rows, scales = quantised[:active], quantised.new_zeros(0) if factors is None else factors[:active].contiguous()
    back = torch.empty(len(order), dtype=expert_idx.dtype, device=device)
    back[order] = place.to(back.dtype)
    shown = counts.cumsum(0) if expert_tokens_num_mode == 1 else counts
    return (
        rows.contiguous(),
        back,
        shown.to(torch.int32) if not drop_pad_mode and expert_tokens_num_mode else None,
        counts.to(torch.int32) if drop_pad_mode and expert_tokens_before_capacity_flag else None,
        scales if quant_mode else None,
    )


def _arguments(draw: Draw) -> Call:
    dtype, quant, pad, experts = draw.choice(*FLOATS), draw.choice(1, 0), draw.choice(0, 1), draw.choice(4, 1, 7)
    smooth, with_offset = draw.choice("none", "one", "each"), draw.flag()
    options = {
        "active_num": draw.choice(0, 3, 1024),
        "expert_capacity": draw.choice(3, 1),
        "expert_num": experts,
        "drop_pad_mode": pad,
        "expert_tokens_num_mode": draw.choice(0, 1, 2),
        "expert_tokens_before_capacity_flag": draw.flag(),
        "quant_mode": quant,
    }
    tokens, hidden, k = draw.size(), draw.size(), draw.size(least=1, most=4)
    x = draw.floats(tokens, hidden, dtype=dtype)
    chosen = draw.integers(tokens, k, low=0, high=experts, dtype=torch.int32)
    scale = offset = None
    if quant == 0:
        scale = draw.floats(1, dtype=torch.float32)
        offset = draw.floats(1, dtype=torch.float32) if with_offset else None
    elif smooth != "none":
        scale = draw.floats(1 if smooth == "one" else experts, hidden, dtype=torch.float32)
    return (x, chosen), {"scale": scale, "offset": offset, **options}


def _call(draw: Draw, rows: int = 3, **options: int) -> Call:
    x = draw.floats(3, 4, dtype=torch.float32)
    return (x, draw.integers(rows, 2, low=0, high=3, dtype=torch.int32)), dict(options)


@fake_kernel(
    "npu::npu_moe_init_routing_quant(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
    "int active_num=1024, int expert_capacity=0, int expert_num=256, int drop_pad_mode=0, "
    "int expert_tokens_num_mode=0, bool expert_tokens_before_capacity_flag=False, int quant_mode=1) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_routing_quant,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_moe_init_routing_quant), CANN docs/MoeInitRoutingQuantV2.md",
    library="torch_npu",
    arguments=_arguments,
    refuses={
        "x has to have 2 dimensions": lambda draw: (
            (draw.floats(4, dtype=torch.float32), draw.integers(4, 2, low=0, high=2, dtype=torch.int32)),
            {},
        ),
        "expert_idx has to have 2 dimensions": lambda draw: (
            (draw.floats(4, 3, dtype=torch.float32), draw.integers(4, low=0, high=2, dtype=torch.int32)),
            {},
        ),
        "a row per row of x": lambda draw: _call(draw, rows=2),
        "drop_pad_mode has to be 0 or 1": lambda draw: _call(draw, drop_pad_mode=2),
        "quant_mode has to be 0 or 1": lambda draw: _call(draw, quant_mode=-1),
        "expert_tokens_num_mode has to be 0, 1 or 2": lambda draw: _call(draw, expert_tokens_num_mode=3),
    },
)
def init_routing_quant(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = 1024,
    expert_capacity: int = 0,
    expert_num: int = 256,
    drop_pad_mode: int = 0,
    expert_tokens_num_mode: int = 0,
    expert_tokens_before_capacity_flag: bool = False,
    quant_mode: int = 1,
) -> Results:
    """Rows of `x` as int8, one per (token, expert) pair, sorted by expert.

    Args:
        x: `[tokens, hidden]`, float16, bfloat16 or float32. expert_idx: int32 `[tokens, k]`.
        scale: float32: `[1]` in the static mode; `[1, hidden]` or `[expert_num, hidden]` in the dynamic one.
        offset: float32 `[1]`, static mode.
        active_num: how many rows stay, where no capacity is set; all, if not positive.
        expert_capacity: rows per expert, with `drop_pad_mode=1`: the others are dropped, and missing ones are 0.
        expert_tokens_num_mode: 1 running sum, 2 count of the rows per expert.
        quant_mode: 0 static, 1 dynamic, a scale per row.

    Returns, all contiguous:
        rows: int8 `[min(tokens * k, active_num), hidden]`, or `[expert_num, expert_capacity, hidden]`;
        places: `[tokens * k]` of the dtype of `expert_idx`: the row of each pair; -1 where it was dropped;
        tokens per expert: int32 `[expert_num]`, without capacity and with a mode that is not 0; otherwise None;
        tokens per expert before dropping: int32 `[expert_num]`, with capacity and the flag; otherwise None;
        scales: float32, one per row, in the dynamic mode; otherwise None.
    """
    for name, tensor in (("x", x), ("expert_idx", expert_idx)):
        dims = tensor.dim()
        torch._check(dims == 2, lambda name=name, dims=dims: f"{name} has to have 2 dimensions, not {dims}")
    torch._check(
        x.shape[0] == expert_idx.shape[0],
        lambda: f"expert_idx has to have a row per row of x, {x.shape[0]}, not {expert_idx.shape[0]}",
    )
    torch._check(drop_pad_mode in (0, 1), lambda: f"drop_pad_mode has to be 0 or 1, not {drop_pad_mode}")
    torch._check(quant_mode in (0, 1), lambda: f"quant_mode has to be 0 or 1, not {quant_mode}")
    torch._check(
        expert_tokens_num_mode in (0, 1, 2),
        lambda: f"expert_tokens_num_mode has to be 0, 1 or 2, not {expert_tokens_num_mode}",
    )
    pairs, hidden = expert_idx.shape[0] * expert_idx.shape[1], x.shape[1]
    if drop_pad_mode:
        rows = expert_num * expert_capacity
        shape: tuple[int, ...] = (expert_num, expert_capacity, hidden)
        per_expert, before = False, expert_tokens_before_capacity_flag
    else:
        rows = torch.sym_min(pairs, active_num) if active_num > 0 else pairs
        shape, per_expert, before = (rows, hidden), expert_tokens_num_mode > 0, False
    return (
        x.new_empty(shape, dtype=torch.int8),
        expert_idx.new_empty((pairs,)),
        x.new_empty((expert_num,), dtype=torch.int32) if per_expert else None,
        x.new_empty((expert_num,), dtype=torch.int32) if before else None,
        x.new_empty((rows,), dtype=torch.float32) if quant_mode else None,
    )


KERNELS = (init_routing_quant,)
