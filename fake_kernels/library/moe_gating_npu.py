"""Ascend's expert selection: scores of a router to the k experts of every token and their weights.

`k` is an `int` of the schema, so it is a constant of a graph; the number of tokens and of experts stay symbolic. An
expert is chosen by score, the lower number first among equals. Every result is fresh and contiguous.

Sources: Ascend/op-plugin op_plugin/ops/opapi, the files that define npu_moe_gating_top_k_softmax, ..._v2 and
npu_moe_gating_top_k; values from the tests and documents of the same repository.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "Ascend/op-plugin op_plugin/ops/opapi ({}), test/test_custom_ops"


def _check_scores(x: Tensor, finished: Tensor | None, k: int) -> None:
    torch._check(x.dim() in (2, 3), lambda: f"x has to have 2 or 3 dimensions, not {x.dim()}")
    torch._check(x.dtype in FLOATS, lambda: f"x has to be float16, bfloat16 or float32, not {x.dtype}")
    torch._check(k >= 0, lambda: f"k has to be at least 0, not {k}")
    torch._check(k <= x.shape[-1], lambda: f"k has to be at most the {x.shape[-1]} experts of x, not {k}")
    if finished is not None:
        torch._check(finished.dtype == torch.bool, lambda: f"finished has to be bool, not {finished.dtype}")
        torch._check(
            finished.dim() == x.dim() - 1 and all(f == s for f, s in zip(finished.shape, x.shape, strict=False)),
            lambda: f"finished has to have a value per row of x {list(x.shape)}, not {list(finished.shape)}",
        )


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, experts = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), experts[..., :k].to(torch.int32).contiguous()


def _without_finished(experts: Tensor, finished: Tensor | None, count: int) -> Tensor:
    return experts if finished is None else experts.masked_fill(finished.unsqueeze(-1), count).contiguous()


def _refuse_bad_scores(x: Tensor, finished: Tensor | None, k: int) -> None:
    if x.dim() not in (2, 3) or not x.is_floating_point() or not 0 <= k <= x.shape[-1]:
        raise ValueError("x is [(batch,) tokens, experts], of floats, and k no more than its experts")
    if finished is not None and (finished.dtype != torch.bool or finished.shape != x.shape[:-1]):
        raise ValueError("finished has a truth value for every token")


def _gating_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_bad_scores(x, finished, k)
    weights, experts = _largest(x.float().softmax(-1), k)
    tokens = x[..., 0].numel()
    rows = torch.arange(tokens * k, dtype=torch.int32, device=x.device).view(k, tokens).T.reshape(experts.shape)
    return weights.to(x.dtype), _without_finished(experts, finished, x.shape[-1]), rows.contiguous()


def _scores_arguments(draw: Draw) -> tuple[Tensor, Tensor | None, int]:
    dtype, k, dims, with_finished = draw.choice(*FLOATS), draw.choice(2, 1, 0, 3), draw.choice(2, 3), draw.flag()
    rows = draw.sizes(dims - 1)
    x = draw.floats(*rows, draw.size(least=3), dtype=dtype)
    finished = draw.integers(*rows, low=0, high=2, dtype=torch.bool) if with_finished else None
    return x, finished, k


def _x(draw: Draw) -> Tensor:
    return draw.floats(3, 4, dtype=torch.float32)


@fake_kernel(
    "npu::npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1) -> (Tensor, Tensor, Tensor)",
    reference=_gating_softmax,
    source=_SOURCE.format("npu_moe_gating_top_k_softmax"),
    library="torch_npu",
    arguments=lambda draw: (_scores_arguments(draw), {}),
    refuses={
        "x has to have 2 or 3 dimensions": lambda draw: ((draw.floats(4, dtype=torch.float32),), {}),
        "x has to be float16": lambda draw: ((draw.integers(3, 4, low=0, high=5),), {}),
        "k has to be at most": lambda draw: ((_x(draw), None, 5), {}),
        "k has to be at least": lambda draw: ((_x(draw), None, -1), {}),
        "finished has to be bool": lambda draw: ((_x(draw), draw.integers(3, low=0, high=2)), {}),
        "a value per row": lambda draw: ((_x(draw), draw.integers(4, low=0, high=2, dtype=torch.bool)), {}),
    },
)
def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the experts, then the `k` largest.

    Args:
        x: scores, `[tokens, experts]` or `[batch, tokens, experts]`, float16, bfloat16 or float32.
        finished: bool, the shape of `x` without its last dimension: such tokens get the number `experts`, no expert's.
        k: from 0 to `experts`.

    Returns three tensors of the shape of `x` with `k` as its last size: weights of the dtype of `x`, experts as int32,
    and int32 `row + place * tokens`, the source row that `npu_moe_init_routing` wants.
    """
    _check_scores(x, finished, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)


def _gating_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_bad_scores(x, finished, k)
    if renorm not in (None, 0, 1):
        raise ValueError("renorm is a flag")
    softmax = x.float().softmax(-1)
    weights, experts = _largest(x.float() if renorm else softmax, k)
    probabilities = softmax.contiguous() if output_softmax and not renorm else softmax.new_empty(0)
    return (
        (weights.softmax(-1) if renorm else weights).to(x.dtype),
        _without_finished(experts, finished, x.shape[-1]),
        probabilities,
    )


def _v2_arguments(draw: Draw) -> Call:
    options = {"renorm": draw.choice(0, 1, None), "output_softmax": draw.choice(False, True, None)}
    x, finished, k = _scores_arguments(draw)
    return (x,), {"k": k, "finished": finished, **options}


@fake_kernel(
    "npu::npu_moe_gating_top_k_softmax_v2(Tensor x, *, int k=1, Tensor? finished=None, int? renorm=0, "
    "bool? output_softmax=False) -> (Tensor, Tensor, Tensor)",
    reference=_gating_softmax_v2,
    source=_SOURCE.format("npu_moe_gating_top_k_softmax_v2"),
    library="torch_npu",
    arguments=_v2_arguments,
    refuses={
        "x has to have 2 or 3 dimensions": lambda draw: ((draw.floats(4, dtype=torch.float32),), {}),
        "k has to be at most": lambda draw: ((_x(draw),), {"k": 5}),
        "renorm has to be 0 or 1": lambda draw: ((_x(draw),), {"renorm": 2}),
    },
)
def gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `npu_moe_gating_top_k_softmax`; with `renorm=1` the `k` largest first, and the softmax over them alone.

    Returns weights and experts as there, and the whole softmax, float32 of the shape of `x` (of all its dimensions),
    which is `[0]` unless `output_softmax` is set and `renorm` is not.
    """
    _check_scores(x, finished, k)
    torch._check(renorm is None or renorm in (0, 1), lambda: f"renorm has to be 0 or 1, not {renorm}")
    shape = (*x.shape[:-1], k)
    whole = x.shape if output_softmax and not renorm else (0,)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(whole, dtype=torch.float32)


KERNELS = (gating_top_k_softmax, gating_top_k_softmax_v2)
