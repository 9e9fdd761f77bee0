"""Ascend's expert selection in two steps: groups of experts first, experts of the chosen groups then.

`atb::_npu_group_topk` is why this project has shadow operators: its schema returns nothing and declares no mutation,
and it zeroes the scores of the groups that lose, in the argument itself. With any fake, compiled code drops the call.

Sources: Ascend/op-plugin op_plugin/ops/opapi (npu_moe_gating_top_k), docs/context/torch_npu-npu_moe_gating_top_k.md,
test/test_custom_ops (test_group_topk); ATB's infer_op_params.h (GroupTopkParam).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel


def _losing(scores: Tensor, groups: int, winners: int, best: int) -> Tensor:
    """True where the group is not among the `winners`, which have the largest sum of their `best` largest scores."""
    grouped = scores.unflatten(-1, (groups, scores.shape[-1] // groups))
    strength = grouped.sort(dim=-1, descending=True).values[..., :best].sum(-1)
    chosen = strength.argsort(dim=-1, descending=True, stable=True)[:, :winners]
    losing = torch.ones_like(strength, dtype=torch.bool).scatter_(1, chosen, False)
    return losing[..., None].expand(grouped.shape).reshape(scores.shape)


def _gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or x.dtype not in FLOATS or (input_ids is None) is not (tid2eid is None):
        raise ValueError("x [tokens, experts] of floats, and a table of experts together with what is looked up in it")
    if bias is not None and (bias.shape != x.shape[1:] or bias.dtype != x.dtype):
        raise ValueError("one bias per expert, of the dtype of x")
    if tid2eid is not None and input_ids is not None and (tid2eid.shape[1:] != (k,) or len(input_ids) != len(x)):
        raise ValueError("a token per row of x, and k experts per token")
    norm = torch.nn.functional.softplus(x.float()).sqrt() if norm_type == 2 else x.float()
    norm = norm.softmax(-1) if norm_type == 0 else norm.sigmoid() if norm_type == 1 else norm
    scores = norm if bias is None else norm + bias.float()
    if tid2eid is not None and input_ids is not None:
        experts = tid2eid[input_ids.long()].long()
    else:
        if group_count > 1:
            losing = _losing(scores, group_count, k_group, 2 if group_select_mode else 1)
            scores = scores.masked_fill(losing, float("-inf"))
        experts = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = norm.gather(1, experts)
    if norm_type:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    out = norm if out_flag else torch.zeros_like(norm)  # not filled by the kernel otherwise
    return (weights * routed_scaling_factor).to(x.dtype), experts.to(torch.int32).contiguous(), out.contiguous()


def _gating_arguments(draw: Draw) -> Call:
    dtype, k, groups, norm = draw.choice(*FLOATS), draw.choice(2, 1, 3), draw.choice(1, 2, 4), draw.choice(0, 1, 2)
    with_bias, with_table, kind = draw.flag(), draw.choice(False, False, True), draw.choice(torch.int64, torch.int32)
    options = {
        "k_group": draw.choice(1, 2) if groups > 1 else 1,
        "group_count": groups,
        "group_select_mode": draw.choice(0, 1),
        "norm_type": norm,
        "out_flag": draw.flag(),
        "routed_scaling_factor": draw.choice(1.0, 2.5),
    }
    tokens, experts = draw.size(), draw.size(least=3, times=groups)
    x = draw.floats(tokens, experts, dtype=dtype)
    bias = draw.floats(experts, dtype=dtype) if with_bias else None
    if with_table:
        vocabulary = draw.size(least=1)
        table = draw.integers(vocabulary, k, low=0, high=experts, dtype=torch.int32)
        ids = draw.integers(tokens, low=0, high=vocabulary, dtype=kind)
        return (x, k), {"bias": bias, "input_ids": ids, "tid2eid": table, **options}
    return (x, k), {"bias": bias, **options}


def _x(draw: Draw) -> Tensor:
    return draw.floats(3, 4, dtype=torch.float32)


@fake_kernel(
    "npu::npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, "
    "int k_group=1, int group_count=1, int group_select_mode=0, int renorm=0, int norm_type=0, bool out_flag=False, "
    "float routed_scaling_factor=1., float eps=9.9999999999999995e-21) -> (Tensor, Tensor, Tensor)",
    reference=_gating_top_k,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_moe_gating_top_k) and its document",
    library="torch_npu",
    arguments=_gating_arguments,
    refuses={
        "x has to have 2 dimensions": lambda draw: ((draw.floats(2, 3, 4, dtype=torch.float32), 1), {}),
        "x has to be float16": lambda draw: ((draw.integers(3, 4, low=0, high=2), 1), {}),
        "one bias per expert": lambda draw: ((_x(draw), 1), {"bias": draw.floats(3, dtype=torch.float32)}),
        "bias has to be of the dtype": lambda draw: ((_x(draw), 1), {"bias": draw.floats(4, dtype=torch.float16)}),
        "both or neither": lambda draw: ((_x(draw), 1), {"input_ids": draw.integers(3, low=0, high=2)}),
        "k experts per token": lambda draw: (
            (_x(draw), 2),
            {"input_ids": draw.integers(3, low=0, high=2), "tid2eid": draw.integers(2, 3, low=0, high=4)},
        ),
    },
)
def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` best experts of the `k_group` best groups, by normalised score plus `bias`; or looked up by token.

    Args:
        x: scores `[tokens, experts]`, float16, bfloat16 or float32.
        bias: `[experts]`, dtype of `x`; counts for the choice only.
        input_ids: `[tokens]`, and tid2eid: `[vocabulary, k]`, int32 or int64: a token's experts, instead of a choice.
        group_select_mode: 0: a group is as good as its best expert; 1: as its best two together.
        norm_type: 0 softmax, 1 sigmoid, 2 square root of softplus.

    Returns weights `[tokens, k]` of the dtype of `x`, experts int32 `[tokens, k]`, and the normalised scores, float32
    `[tokens, experts]`, which are allocated always and filled only with `out_flag`. All contiguous.
    """
    torch._check(x.dim() == 2, lambda: f"x has to have 2 dimensions, not {x.dim()}")
    torch._check(x.dtype in FLOATS, lambda: f"x has to be float16, bfloat16 or float32, not {x.dtype}")
    if bias is not None:
        torch._check(bias.dtype == x.dtype, lambda: f"bias has to be of the dtype of x, {x.dtype}, not {bias.dtype}")
        torch._check(
            bias.dim() == 1 and bias.shape[0] == x.shape[1],
            lambda: f"one bias per expert, {x.shape[1]}, is expected, not {list(bias.shape)}",
        )
    torch._check((input_ids is None) is (tid2eid is None), lambda: "input_ids and tid2eid are given both or neither")
    if input_ids is not None and tid2eid is not None:
        torch._check(
            input_ids.dim() == 1 and input_ids.shape[0] == x.shape[0],
            lambda: f"one token per row of x, {x.shape[0]}, is expected, not {list(input_ids.shape)}",
        )
        torch._check(
            tid2eid.dim() == 2 and tid2eid.shape[1] == k,
            lambda: f"tid2eid has to have k experts per token, {k}, not {list(tid2eid.shape)}",
        )
    chosen = (x.shape[0], k)
    return x.new_empty(chosen), x.new_empty(chosen, dtype=torch.int32), x.new_empty(x.shape, dtype=torch.float32)


def _group_topk(self: Tensor, k: int = 0, group_num: int = 1, n: int = 1) -> None:
    if self.dim() != 2 or self.dtype not in HALVES or self.shape[1] % group_num or not 1 <= k <= group_num:
        raise ValueError("half-precision scores [tokens, experts], in groups of equal size, of which k are kept")
    self.masked_fill_(_losing(self.float(), group_num, k, n), 0)


def _group_topk_arguments(draw: Draw) -> Call:
    dtype, groups, k, n = draw.choice(*HALVES), draw.choice(2, 1, 4), draw.choice(1, 2), draw.choice(1, 2)
    scores = draw.floats(draw.size(), draw.size(least=2, times=groups), dtype=dtype, layout="contiguous")
    return (scores,), {"k": min(k, groups), "group_num": groups, "n": n}


@fake_kernel(
    "atb::_npu_group_topk(Tensor self, int k=0, int group_num=1, int n=1) -> ()",
    reference=_group_topk,
    source="ATB infer_op_params.h (GroupTopkParam); Ascend/op-plugin test/test_custom_ops (test_group_topk)",
    library="torch_npu",
    arguments=_group_topk_arguments,
    refuses={
        "self has to have 2 dimensions": lambda draw: ((draw.floats(4, dtype=torch.float16),), {"k": 1}),
        "self has to be float16 or bfloat16": lambda draw: ((_x(draw),), {"k": 1}),
        "groups of equal size": lambda draw: ((draw.floats(3, 5, dtype=torch.float16),), {"k": 1, "group_num": 2}),
        "k has to be from 1 to": lambda draw: ((draw.floats(3, 4, dtype=torch.float16),), {"k": 3, "group_num": 2}),
    },
    writes=("self",),
)
def group_topk(self: Tensor, k: int = 0, group_num: int = 1, n: int = 1) -> None:
    """Zeroes, in `self`, the scores of all but the best `k` of `group_num` groups of experts.

    Args:
        self: scores `[tokens, experts]`, float16 or bfloat16, `experts` a multiple of `group_num`. WRITTEN.
        k: how many groups stay, from 1 to `group_num`; the default of the schema, 0, is refused.
        n: a group is as good as the sum of its `n` largest scores.
    """
    torch._check(self.dim() == 2, lambda: f"self has to have 2 dimensions, not {self.dim()}")
    torch._check(self.dtype in HALVES, lambda: f"self has to be float16 or bfloat16, not {self.dtype}")
    torch._check(
        self.shape[1] % group_num == 0,
        lambda: f"{self.shape[1]} experts cannot be divided into {group_num} groups of equal size",
    )
    torch._check(1 <= k <= group_num, lambda: f"k has to be from 1 to the {group_num} groups, not {k}")


KERNELS = (gating_top_k, group_topk)
