"""SGLang's expert selection: the best experts of every token and their weights, into buffers of the caller.

Both operators declare what they write, so that torch makes the fake itself; ours check what the kernels check. They
differ in the correction bias: under the softmax it is part of the weight, with the sigmoid of the choice only.

Sources: sgl-project/sglang sgl-kernel/csrc/moe/moe_topk_softmax_kernels.cu (its kernels; its checks are taken from the
other) and moe_topk_sigmoid_kernels.cu; schemas from the wheel of sglang-kernel 0.4.10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "sgl-project/sglang sgl-kernel/csrc/moe/moe_topk_{}_kernels.cu"


def _check(topk_weights: Tensor, topk_indices: Tensor, gating_output: Tensor, correction_bias: Tensor | None) -> None:
    torch._check(
        gating_output.dtype in FLOATS,
        lambda: f"gating_output has to be float32, float16 or bfloat16, not {gating_output.dtype}",
    )
    for name, tensor in (
        ("gating_output", gating_output),
        ("topk_weights", topk_weights),
        ("topk_indices", topk_indices),
    ):
        dims = tensor.dim()
        torch._check(dims == 2, lambda name=name, dims=dims: f"{name} has to have 2 dimensions, not {dims}")
    tokens, experts = gating_output.shape
    torch._check(
        topk_weights.shape[0] == tokens and topk_indices.shape[0] == tokens,
        lambda: f"topk_weights and topk_indices have to have a row per token, {tokens}",
    )
    k = topk_weights.shape[1]
    torch._check(topk_indices.shape[1] == k, lambda: "topk_weights and topk_indices have to have as many columns")
    torch._check(k <= experts, lambda: f"k has to be at most the {experts} experts, not {k}")
    if correction_bias is not None:
        torch._check(
            correction_bias.dim() == 1 and correction_bias.shape[0] == experts,
            lambda: f"correction_bias has to be one number per expert, {experts}, not {list(correction_bias.shape)}",
        )
        torch._check(
            correction_bias.dtype == torch.float32,
            lambda: f"correction_bias has to be float32, not {correction_bias.dtype}",
        )


def _choose(
    topk_weights: Tensor, topk_indices: Tensor, scores: Tensor, bias: Tensor | None, ranked: Tensor, renormalize: bool
) -> None:
    if topk_weights.shape != topk_indices.shape or len(topk_weights) != len(scores):
        raise ValueError("weights and experts [tokens, k]")
    if topk_weights.shape[1] > scores.shape[1]:
        raise ValueError("no more than there are experts")
    if bias is not None and (bias.shape != scores.shape[1:] or bias.dtype != torch.float32):
        raise ValueError("a float32 bias per expert")
    experts = ranked.argsort(dim=-1, descending=True, stable=True)[:, : topk_weights.shape[1]]
    weights = scores.gather(1, experts)
    topk_weights.copy_(weights / weights.sum(-1, keepdim=True) if renormalize else weights)
    topk_indices.copy_(experts)


def _floats(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw.floats(*shape, dtype=dtype, layout="contiguous")


def _buffers(draw: Draw, tokens: int, k: int) -> tuple[Tensor, Tensor]:
    return _floats(draw, tokens, k), draw.integers(tokens, k, low=0, high=9, dtype=torch.int32, layout="contiguous")


def _drawn(draw: Draw) -> tuple[Tensor, Tensor, Tensor, bool, Tensor | None]:
    dtype, k, renormalize, with_bias = draw.choice(*FLOATS), draw.choice(2, 1, 3), draw.flag(), draw.flag()
    tokens, experts = draw.size(least=1), draw.size(least=3)
    bias = _floats(draw, experts) if with_bias else None
    return (*_buffers(draw, tokens, k), _floats(draw, tokens, experts, dtype=dtype), renormalize, bias)


def _softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    moe_softcapping: float,
    correction_bias: Tensor | None,
) -> None:
    if gating_output.dim() != 2 or not gating_output.is_floating_point():
        raise ValueError("scores [tokens, experts]")
    values = gating_output.float()
    if moe_softcapping:
        values = (values / moe_softcapping).tanh() * moe_softcapping
    scores = (values if correction_bias is None else values + correction_bias).softmax(-1)
    _choose(topk_weights, topk_indices, scores, correction_bias, scores, renormalize)


def _softmax_arguments(draw: Draw) -> Call:
    cap = draw.choice(0.0, 30.0)
    weights, experts, scores, renormalize, bias = _drawn(draw)
    return (weights, experts, scores, renormalize, cap, bias), {}


def _bad(draw: Draw, tokens: int = 3, k: int = 2, experts: int = 4, dtype: torch.dtype = torch.float32) -> Call:
    return (*_buffers(draw, tokens, k), _floats(draw, 3, experts).to(dtype), False, 0.0, None), {}


@fake_kernel(
    "sgl_kernel::topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor gating_output, bool renormalize, "
    "float moe_softcapping, Tensor? correction_bias) -> ()",
    reference=_softmax,
    source=_SOURCE.format("softmax"),
    library="sgl_kernel",
    arguments=_softmax_arguments,
    refuses={
        "gating_output has to be float32": lambda draw: _bad(draw, dtype=torch.int64),
        "a row per token": lambda draw: _bad(draw, tokens=2),
        "k has to be at most": lambda draw: _bad(draw, k=5),
        "one number per expert": lambda draw: ((*_bad(draw)[0][:5], _floats(draw, 3)), {}),
        "correction_bias has to be float32": lambda draw: ((*_bad(draw)[0][:5], _floats(draw, 4).half()), {}),
    },
)
def topk_softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    moe_softcapping: float,
    correction_bias: Tensor | None,
) -> None:
    """The `k` largest of `softmax(cap * tanh(x / cap) + bias)`; a cap of 0 is none.

    Args:
        topk_weights: float32 `[tokens, k]`; sums to one if `renormalize`. topk_indices: int32 `[tokens, k]`. WRITTEN.
        gating_output: `[tokens, experts]`, contiguous, float32, float16 or bfloat16.
        correction_bias: float32 `[experts]`.
    """
    _check(topk_weights, topk_indices, gating_output, correction_bias)


def _sigmoid(
    topk_weights: Tensor,
    topk_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    correction_bias: Tensor | None,
) -> None:
    if gating_output.dim() != 2 or not gating_output.is_floating_point():
        raise ValueError("scores [tokens, experts]")
    scores = gating_output.float().sigmoid()
    ranked = scores if correction_bias is None else scores + correction_bias
    _choose(topk_weights, topk_indices, scores, correction_bias, ranked, renormalize)


@fake_kernel(
    "sgl_kernel::topk_sigmoid(Tensor! topk_weights, Tensor! topk_indices, Tensor gating_output, bool renormalize, "
    "Tensor? correction_bias) -> ()",
    reference=_sigmoid,
    source=_SOURCE.format("sigmoid"),
    library="sgl_kernel",
    arguments=lambda draw: (_drawn(draw), {}),
    refuses={
        "gating_output has to be float32": lambda draw: (
            (*_bad(draw, dtype=torch.int64)[0][:4], None),
            {},
        ),
        "as many columns": lambda draw: ((_floats(draw, 3, 1), *_bad(draw)[0][1:4], None), {}),
        "k has to be at most": lambda draw: ((*_bad(draw, k=5)[0][:4], None), {}),
    },
)
def topk_sigmoid(
    topk_weights: Tensor,
    topk_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    correction_bias: Tensor | None,
) -> None:
    """The experts with the `k` largest `sigmoid(x) + bias`, weighted with `sigmoid(x)`. Arguments: `topk_softmax`'s."""
    _check(topk_weights, topk_indices, gating_output, correction_bias)


KERNELS = (topk_softmax, topk_sigmoid)
