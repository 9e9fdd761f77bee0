"""Masks as Ascend's fused attention (`npu_fusion_attention`) takes them, and which mask a model gets where.

The problem: that operator says True for what is masked out, and torch's attention says True for what is visible; it
takes four shapes only, and a `[batch, keys]` mask, which models pass around, is none of them (where batch happens to
equal keys, it is taken for `[queries, keys]` without a word). With `sparse_mode` 2, 3 or 4 it makes the causal or
banded mask itself from one triangle of `[2048, 2048]`, whatever the lengths are, and knows of no padding.

| layout | shape | for |
|---|---|---|
| BNSS | `[batch, heads, queries, keys]` | a mask per head |
| B1SS | `[batch, 1, queries, keys]` | a mask per sequence: padding |
| 11SS | `[1, 1, queries, keys]` | one for all |
| SS | `[queries, keys]` | one for all |

Source: op-plugin's documentation of `torch_npu.npu_fusion_attention` (atten_mask, sparse_mode), CANN's
aclnnFlashAttentionScore, and the review of verl #5904.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from fxpatch.errors import LayerError
from fxpatch.layers.masks import decoder_mask

Layout = Literal["BNSS", "B1SS", "11SS", "SS"]
ModelMask = Literal["auto", "none", "2d", "4d", "compressed", "BNSS", "B1SS", "11SS", "SS"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
COMPRESSED = 2048  # rows and columns of the triangle that the kernel unrolls to any lengths
COMPRESSED_MODES = (2, 3, 4)  # causal from the upper left corner, causal to the lower right corner, a band


def npu_attention_mask(visible: Tensor, layout: Layout, heads: int | None = None) -> Tensor:
    """A mask for `atten_mask` with `sparse_mode` 0 or 1: bool, True where nothing is looked at.

    Args:
        visible: bool, True where a query may look: `[queries, keys]`, `[batch, 1, queries, keys]` or one per head, as
            `fxpatch.layers.masks` makes it. Never `[batch, keys]`.
        layout: what to return. BNSS is a copy per head.
        heads: number of query heads, for BNSS.

    Raises:
        LayerError: an unknown layout, another rank or dtype, BNSS without heads, one mask for all that are not equal.
    """
    if layout not in LAYOUTS:
        raise LayerError(
            "The fused attention does not know this layout of a mask.",
            seen=repr(layout),
            expected=", ".join(LAYOUTS),
            hint="[batch, keys] is none of them: B1SS says the same",
        )
    if visible.dtype is not torch.bool or visible.dim() not in (2, 4):
        raise LayerError(
            "A mask for the fused attention is made from what each query sees.",
            seen=f"{visible.dtype} of shape {list(visible.shape)}",
            expected="bool [queries, keys] or [batch, 1 or heads, queries, keys]",
            hint="[batch, keys] tells which tokens are real: fxpatch.layers.masks.decoder_mask(padding=...) makes a "
            "mask of it",
        )
    masked = ~visible if visible.dim() == 4 else ~visible[None, None]
    if layout == "BNSS":
        if heads is None or heads < 1 or masked.shape[1] not in (1, heads):
            raise LayerError(
                "A mask per head needs the number of heads.",
                seen=f"heads={heads}, a mask of shape {list(visible.shape)}",
                expected="the number of query heads",
                hint="B1SS is one mask for all heads",
            )
        return masked.expand(-1, heads, -1, -1).contiguous()
    if masked.shape[1] != 1 or (layout != "B1SS" and masked.shape[0] != 1):
        raise LayerError(
            f"{layout} is one mask for {'all heads' if masked.shape[1] != 1 else 'the whole batch'}.",
            seen=f"shape {list(visible.shape)}",
            expected=f"[{'batch' if layout == 'B1SS' else '1'}, 1, queries, keys]",
            hint="use BNSS" if masked.shape[1] != 1 else "use B1SS: sequences are padded differently",
        )
    return masked[0, 0] if layout == "SS" else masked


def compressed_mask(device: torch.device | str | None = None) -> Tensor:
    """The `[2048, 2048]` triangle for `sparse_mode` 2, 3 and 4: bool, True above the diagonal, which is masked out.

    It fits all lengths: make it once, and keep it (4 MiB); a captured graph reads it at its address.

    Args:
        device: where it is made; the current default if None.
    """
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1)


def check_npu_mask(mask: Tensor | None, sparse_mode: int, *, batch: int, heads: int, queries: int, keys: int) -> None:
    """Refuses what the kernel would misread or refuse, before a call.

    Args:
        mask: what the kernel would get as `atten_mask`.
        sparse_mode: the kernel's argument of this name.
        batch, heads, queries, keys: sizes of the call: B, N, Sq, Skv.

    Raises:
        LayerError: a dtype other than bool or uint8; for modes 0 and 1 a shape that is no layout of these sizes; for
            modes 2, 3 and 4 no mask, or another than `[2048, 2048]`; a mode beyond (5 to 8 are not made here).
    """
    if sparse_mode not in (0, 1, *COMPRESSED_MODES):
        raise LayerError(
            "No mask is made here for this sparse mode.",
            seen=f"sparse_mode={sparse_mode}",
            expected="0 to 4",
            hint="5 and 6 take prefixes, 7 and 8 pieces of packed sequences: see the operator's documentation",
        )
    if mask is None and sparse_mode == 0:
        return
    shape = None if mask is None else list(mask.shape)
    shapes = {"BNSS": [batch, heads, queries, keys], "B1SS": [batch, 1, queries, keys], "11SS": [1, 1, queries, keys]}
    allowed = [*shapes.values(), [queries, keys]] if sparse_mode < 2 else [[COMPRESSED, COMPRESSED]]
    if mask is None or shape not in allowed or mask.dtype not in (torch.bool, torch.uint8):
        raise LayerError(
            f"The fused attention takes another mask with sparse_mode={sparse_mode}.",
            seen="none" if mask is None else f"{mask.dtype} of shape {shape}",
            expected=f"bool or uint8 of shape {' or '.join(str(each) for each in allowed)}",
            hint="npu_attention_mask() makes the first" if sparse_mode < 2 else "compressed_mask() makes it",
        )


def choose_mask(mask: ModelMask, layout: str, device: str, *, causal: bool, padded: bool) -> ModelMask:
    """Which mask a model gets for right-padded or packed sequences: a decision without tensors.

    None is enough for a causal model (what is real does not see padding behind it), and for any without padding. So
    "auto" is "none" for packed sequences and on `npu`, else "2d"; where None is not enough, it is B1SS on `npu`, and
    "4d" elsewhere for packed ones. "compressed" is the triangle of `compressed_mask`, with sparse_mode 2; of packed
    sequences it says nothing, so that call has to be a TND one with their ends.

    Args:
        mask: what is asked for.
        layout: "bshd" (padded) or "thd" (packed).
        device: a device type.
        causal: whether the model is.
        padded: whether there is any padding.

    Raises:
        LayerError: an unknown mask, or one that cannot say what it has to.
    """
    if mask not in get_args(ModelMask):
        raise LayerError(
            "There is no such mask for a model.", seen=repr(mask), expected=", ".join(get_args(ModelMask)),
            hint="'auto' fits the device",
        )  # fmt: skip
    none_is_enough = causal or not padded
    if mask == "auto":
        if device == "npu":
            return "none" if none_is_enough else "B1SS"
        if layout == "thd":
            return "none" if none_is_enough else "4d"
        return "2d"
    if mask == "none" and not none_is_enough:
        raise LayerError(
            "Without a mask, tokens of this model would see the padding.",
            seen="mask='none', causal=False, and padding",
            expected="a mask that excludes padding, or a causal model",
            hint="use mask='B1SS' on npu, '4d' elsewhere",
        )
    if mask == "2d" and device == "npu":
        raise LayerError(
            "The fused attention of npu takes no [batch, length] mask.",
            seen="mask='2d' on npu",
            expected="'none' or one of " + ", ".join(LAYOUTS),
            hint="for a model that makes a mask of it by itself, pass it the batch's real_tokens",
        )
    if mask == "2d" and layout == "thd":
        raise LayerError(
            "A 2-D mask of packed sequences cannot keep them apart.",
            seen="mask='2d', layout='thd'",
            expected="'none' with cu_seqlens, '4d', or one of the fused attention's layouts",
            hint="a model that packs by itself takes layout='bshd' with align=1",
        )
    if mask == "compressed" and not causal:
        raise LayerError(
            "The compressed mask is a causal one.", seen="causal=False", expected="a causal model", hint="use 'B1SS'"
        )
    return mask


def model_mask(
    kind: ModelMask, real: Tensor, cu_seqlens: Tensor | None, *, causal: bool, heads: int | None = None
) -> Tensor | None:
    """The mask that `choose_mask` has chosen.

    Args:
        kind: anything but "auto".
        real: bool `[batch, length]`, or `[1, tokens]` of packed sequences, True for real tokens.
        cu_seqlens: int32, where each packed sequence begins and the last ends; None for padded ones.
        causal: whether the model is.
        heads: number of query heads, for BNSS.

    Raises:
        LayerError: one mask for the whole batch (SS, 11SS), where sequences need different ones.
    """
    if kind == "none":
        return None
    if kind == "2d":
        return real
    if kind == "compressed":
        return compressed_mask(real.device)
    shared = kind in ("SS", "11SS") and causal and cu_seqlens is None  # padding on the right is behind all that is real
    visible = _visible(real, cu_seqlens, causal, padding=not shared)
    if kind == "4d":
        return visible
    if kind in ("SS", "11SS") and visible.dim() == 4 and bool((visible == visible[:1]).all()):
        visible = visible[:1]
    if kind in ("B1SS", "BNSS"):
        visible = visible.expand(len(real), 1, -1, -1)
    return npu_attention_mask(visible, cast(Layout, kind), heads)


def _visible(real: Tensor, cu_seqlens: Tensor | None, causal: bool, padding: bool) -> Tensor:
    """bool, True for visible. Padding sees itself, so that no row is empty."""
    length, device = real.shape[1], real.device
    if causal:
        visible = decoder_mask(length, padding=real if padding else None, sees_itself=True, device=device)
    else:
        visible = real[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=device)
    if cu_seqlens is None:
        return visible
    number = torch.bucketize(torch.arange(length, device=device), cu_seqlens[1:], right=True)
    return visible & (number[:, None] == number)
