"""Fused attention. The problem: scaled_dot_product_attention chooses among kernels in C++, by a table that Python
cannot enter; for other devices it composes operators, which costs twice as much and gives other bits than the CPU's
kernel. The rule: attention without dropout is fused where the CPU fuses it, through the operator that torch has for
devices out of its tree; everything else is composed, as torch does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxpatch.simulator.dispatch import fallback
from fxpatch.simulator.untraced import untraced

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # in float64 the meta kernel and the CPU's disagree


def register() -> torch.library.Library:
    """Registers the operator above autograd and below it (tensors of inference mode go there), and the two kernels."""
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", untraced(attention), key)
    library.impl("_scaled_dot_product_fused_attention_overrideable", untraced(fused), "PrivateUse1")
    library.impl("_scaled_dot_product_fused_attention_overrideable_backward", untraced(fused_backward), "PrivateUse1")
    return library


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, for the device's tensors, fake ones too."""
    if dropout_p == 0.0 and _fuses(query, key, value, enable_gqa) and _takes(attn_mask, query, key):
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        results = aten._scaled_dot_product_fused_attention_overrideable.default(
            query, key, value, bias, dropout_p, is_causal, False, scale=scale
        )
        output: Tensor = results[0]
        return output
    composed: Tensor = aten.scaled_dot_product_attention.default._op_dk(
        _COMPOSITE, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return composed


def _fuses(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """What the CPU asks (aten/src/ATen/native/transformers/sdp_utils_cpp.cpp, use_flash_attention_cpp), and that the
    user has not turned it off."""
    tensors = (query, key, value)
    return (
        torch._C._get_overrideable_sdp_enabled()
        and all(x.dim() == 4 and x.dtype in _DTYPES and x.dtype is query.dtype for x in tensors)
        and all(x.device == query.device and x.stride(-1) == 1 for x in tensors)
        and all(x.numel() > 0 for x in tensors)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (query.shape[1] % key.shape[1] == 0 if enable_gqa else query.shape[1] == key.shape[1])
        and query.shape[3] == key.shape[3] == value.shape[3]
        and key.shape[2] == value.shape[2]
    )


def _takes(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    if mask is None:
        return True
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return (
        mask.device == query.device
        and mask.dtype in (torch.bool, query.dtype)
        and not mask.requires_grad
        and mask.dim() in (2, 4)
        and all(n in (1, wanted) for n, wanted in zip(mask.shape, full[-mask.dim() :], strict=True))
    )


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The kernel: output, log-sum-exp, and seven results that this device has no use for, in the layouts of torch's
    meta kernel."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    output, logsumexp = fallback(kernel, query, key, value, dropout_p, is_causal, attn_mask=attn_bias, scale=scale)
    seed, offset = (torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))
    return output, logsumexp.contiguous(), None, None, query.shape[2], key.shape[2], seed, offset, None


def fused_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    grad_input_mask: list[bool],
    output: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value; one that wants a gradient for its bias is composed."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    gradients = fallback(
        kernel, grad, query, key, value, output, logsumexp, dropout_p, is_causal, attn_mask=attn_bias, scale=scale
    )
    inputs = (query, key, value)
    laid_out = [torch.empty_like(x).copy_(gradient) for x, gradient in zip(inputs, gradients, strict=True)]
    return *laid_out, None if attn_bias is None else torch.zeros_like(attn_bias)
