"""torch_musa's fused attention, backward: of the flash and of the math kernel.

The fourth result, the gradient of the mask, is no tensor, unless the math kernel was given a floating mask that
requires a gradient. The flash kernel's gradients keep the layout of query, key and value where they are dense; the math
kernel's are contiguous.

The kernels are given the dropout mask, but not how likely dropping was: the reference reads that off the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.attention_musa import SOURCE, batched, draw_attention, flash, per_query_head, scores

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    dropout_mask: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value and the masked scores, four-dimensional, in float32."""
    g, q, k, v, o = (x.float() for x in batched(grad_out, query, key, value, output))
    masked, scale = scores(q, k, attn_mask, is_causal, scale)
    weights, keys, values = masked.softmax(-1), per_query_head(k, q), per_query_head(v, q)
    factor = torch.ones_like(weights)
    if dropout_mask.numel():
        factor = dropout_mask.view(weights.shape).float()
        undivided = (weights * factor) @ values
        factor = factor * ((o * undivided).sum() / undivided.square().sum().clamp_min(1e-30))
    dweights = g @ values.mT * factor
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True))
    dv = (weights * factor).mT @ g
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dscores.mT @ q * scale, dv))
    return dscores @ keys * scale, dk, dv, dscores


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dropout_mask: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> _Gradients:
    found = _gradients(grad_out, query, key, value, output, dropout_mask, is_causal, attn_mask, scale)
    like = [torch.empty_like(x).copy_(grad) for x, grad in zip(batched(query, key, value), found, strict=False)]
    dq, dk, dv = (grad if query.dim() == 4 else grad[0] for grad in like)
    return dq, dk, dv, None


def _math_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    attn_weights: Tensor,
    dropout_mask: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> _Gradients:
    found = _gradients(grad_out, query, key, value, output, dropout_mask, is_causal, attn_mask, scale)
    like = [grad.to(x.dtype).contiguous() for x, grad in zip((query, key, value), found, strict=False)]
    dq, dk, dv = (grad if query.dim() == 4 else grad[0] for grad in like)
    if attn_mask is None or is_causal or not attn_mask.is_floating_point() or not attn_mask.requires_grad:
        return dq, dk, dv, None
    mask = attn_mask.detach()
    if mask.dim() == 2 and mask.shape != found[3].shape[-2:]:
        return dq, dk, dv, found[3].sum((1, 2)).to(mask.dtype)
    dmask = found[3].sum_to_size(mask.shape)
    whole = mask.shape == found[3].shape
    return dq, dk, dv, dmask.to(attn_weights.dtype if whole else mask.dtype).contiguous()


def _draw(draw: Draw, flash_layout: bool) -> Call:
    dropped, scale = draw.flag(), draw.choice(None, 0.3)
    (query, key, value), mask, is_causal = draw_attention(draw)
    given = {} if scale is None else {"scale": scale}
    results = flash.reference(query, key, value, mask, 0.5 if dropped else 0.0, is_causal, **given)
    output, logsumexp, dropout_mask = results
    grad = draw.placed(torch.randn(output.shape).to(query.dtype))
    saved = logsumexp if flash_layout else query.new_zeros((*query.shape[:-1], key.shape[-2]))
    return (grad, query, key, value, output, saved, dropout_mask, is_causal, mask), given


def _flash_arguments(draw: Draw) -> Call:
    return _draw(draw, True)


def _math_arguments(draw: Draw) -> Call:
    return _draw(draw, False)


@fake_kernel(
    "aten::_scaled_dot_product_attention_flash_musa_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor logsumexp, Tensor dropout_mask, bool is_causal, Tensor? attn_mask=None, *, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask)",
    reference=_flash_backward,
    source=f"{SOURCE} (MuDNNFlashSDPABwd)",
    library="torch_musa",
    arguments=_flash_arguments,
)
def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dropout_mask: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> _Gradients:
    """Gradients of query, key and value, of their shapes and dtypes, laid out as `empty_like` does; and None."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x) if query.dim() == 4 else torch.empty_like(x.unsqueeze(0)).squeeze(0)

    return like(query), like(key), like(value), None


@fake_kernel(
    "aten::_scaled_dot_product_attention_math_musa_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor attn_weights, Tensor dropout_mask, bool is_causal, Tensor? attn_mask=None, *, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask)",
    reference=_math_backward,
    source=f"{SOURCE} (MuDNNMathSDPABwd, CalMaskGrad)",
    library="torch_musa",
    arguments=_math_arguments,
)
def math_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    attn_weights: Tensor,
    dropout_mask: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> _Gradients:
    """Gradients of query, key and value, contiguous; and of a floating `attn_mask` that requires one, contiguous, of
    its shape, and of its dtype unless it is as large as the weights: then of theirs. None for any other mask."""
    gradients = [each.new_empty(each.shape) for each in (query, key, value)]
    wanted = attn_mask is not None and not is_causal and attn_mask.is_floating_point() and attn_mask.requires_grad
    dmask = None
    if attn_mask is not None and wanted:
        dtype = attn_mask.dtype
        if attn_mask.dim() == 4 and dtype != attn_weights.dtype:
            whole = all(a == b for a, b in zip(attn_mask.shape, attn_weights.shape, strict=False))
            dtype = attn_weights.dtype if whole else dtype
        dmask = attn_mask.new_empty(attn_mask.shape, dtype=dtype)
    return gradients[0], gradients[1], gradients[2], dmask


KERNELS = (flash_backward, math_backward)
