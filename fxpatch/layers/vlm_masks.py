"""From ragged batches of tokens to what an engine gives a (vision-)language model, and back.

The problem: a trainer holds sequences of different lengths as a nested tensor. A model takes them padded (BSHD:
`[batch, length]`) or packed (THD: `[1, tokens]` and cumulative lengths), as long as its parallelism needs; what it
returns has to become ragged again. In verl the mask that says which tokens are real was also the mask that the model
got, and when the model on Ascend had to get another one, or none, post-processing lost it (the review of verl #5904).

The rule: `preprocess` returns a record of both. `attention_mask` is for the model and depends on the device;
`real_tokens` is `[batch, length]`, is always there, and only `postprocess` reads it. What is real comes from lengths,
never from `tokens != pad_token`: a pad token is an ordinary token inside a sequence. Padding is on the right, so that a
causal model without any mask computes real tokens right; a model that is not causal never gets None where there is
padding.

Source: verl #5904 (verl/models/mcore/util.py: build_vlm_attn_mask_bshd, build_vlm_attn_mask_thd, preprocess and
postprocess of both layouts). It takes lengths from `offsets().diff()`, which are too long for a nested tensor that has
holes (`torch.nested.narrow`), and its THD mask is a BSHD mask that is not aligned: here `lengths_mask(lengths)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from fxpatch.errors import LayerError
from fxpatch.layers.npu_masks import ModelMask, choose_mask, model_mask


@dataclass(frozen=True, eq=False)
class EngineBatch:
    """What `preprocess` makes of a ragged batch of B sequences.

    Attributes:
        layout: "bshd" or "thd".
        input_ids: `[B, S]`, or packed `[1, T]`; trailing dimensions (embeddings) stay.
        position_ids: int64, of the same first two sizes: of each token in its sequence; padding goes on counting.
        attention_mask: for the model, or None. "2d": bool `[B, S]`, True for real tokens. "4d": bool, True for visible,
            `[B, 1, S, S]` or `[1, 1, T, T]`. Else for `npu_fusion_attention`: bool, True for masked out.
        sparse_mode: what that operator needs with the mask.
        real_tokens: bool `[B, S]` or `[1, T]`, for `postprocess` alone.
        lengths: of the sequences, without padding.
        cu_seqlens: int32 `[B + 1]`, where each sequence begins in the packed tensor and the last ends, padding
            included; None if padded.
        ends: the same without the 0, on the host: Ascend's `actual_seq_qlen`.
        max_length: of a sequence, padding included.
    """

    layout: str
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    sparse_mode: int
    real_tokens: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor | None
    ends: tuple[int, ...] | None
    max_length: int


def alignment(tp: int = 1, cp: int = 1, *, sequence_parallel: bool = False) -> int:
    """What a length has to be a multiple of: lcm(tp, 2 * cp) with context parallelism, else tp.

    Args:
        tp: tensor-parallel ranks.
        cp: context-parallel ranks; each takes two pieces of a sequence, one from either end.
        sequence_parallel: the pieces of one context-parallel rank are split among the tensor-parallel ranks. Then
            2 * cp * tp is needed (Megatron's get_padding): with tp=4 and cp=2, lcm gives 4, and a rank's 2 tokens
            cannot be split among 4.

    Raises:
        LayerError: no ranks.
    """
    if tp < 1 or cp < 1:
        raise LayerError(
            "There is at least one rank of each kind.", seen=f"tp={tp}, cp={cp}", expected="1 or more", hint="use 1"
        )
    if cp == 1:
        return tp
    return 2 * cp * tp if sequence_parallel else math.lcm(tp, 2 * cp)


def lengths_mask(lengths: Sequence[int] | Tensor, align: int = 1, device: torch.device | str | None = None) -> Tensor:
    """bool `[batch, S]`, True for real tokens, padding on the right; S is the longest, up to a multiple of `align`.

    Args:
        lengths: of the sequences, in tokens.
        device: of the result; the default one if None.

    Raises:
        LayerError: no sequence, a negative length, no tokens at all.
    """
    sizes = _checked(lengths)
    ends = torch.tensor(sizes, device=device)
    return torch.arange(_up(max(sizes), align), device=device) < ends[:, None]


def preprocess(
    tokens: Tensor,
    *,
    layout: Literal["bshd", "thd"] = "bshd",
    lengths: Sequence[int] | Tensor | None = None,
    pad_token: int = 0,
    align: int = 1,
    causal: bool = True,
    mask: ModelMask = "auto",
    heads: int | None = None,
) -> EngineBatch:
    """Pads or packs a ragged batch for a model; see `EngineBatch`.

    Args:
        tokens: nested, `layout=torch.jagged`, `[batch, ragged]` or with more dimensions; or `[sum of lengths]` with
            `lengths`.
        layout: "bshd" pads all sequences to one length; "thd" puts one after the other.
        lengths: of the sequences in `tokens`, which is not nested then.
        pad_token: what padding is filled with.
        align: see `alignment`. In THD each sequence is padded to it.
        causal: whether the model is: no token sees one behind it.
        mask: what the model gets: see `fxpatch.layers.npu_masks.choose_mask`. A packed model that gets None has to keep
            sequences apart by `cu_seqlens` or `position_ids`; the fused attention's four layouts keep them apart in a
            call as one sequence (batch 1, not TND).
        heads: number of query heads, for BNSS.

    Raises:
        LayerError: no tokens, lengths that do not add up, tokens that are not a jagged nested tensor; an unknown layout
            or mask, and a mask that cannot say what it has to: None or a causal triangle where that is not enough.
    """
    if layout not in ("bshd", "thd"):
        raise LayerError(
            "A batch is padded or packed.", seen=repr(layout), expected="'bshd' or 'thd'", hint="name one of them"
        )
    sequences = _sequences(tokens, None if lengths is None else _checked(lengths))
    sizes = _checked([len(each) for each in sequences])
    values = torch.cat(sequences)
    rows = [_up(max(sizes), align)] * len(sizes) if layout == "bshd" else [_up(size, align) for size in sizes]
    device = values.device
    positions = torch.cat([torch.arange(row, device="cpu") for row in rows])  # on the host: one copy to the device
    real = positions < torch.tensor(sizes, device="cpu").repeat_interleave(torch.tensor(rows, device="cpu"))
    place, positions, real = real.nonzero()[:, 0].to(device), positions.to(device), real.to(device)
    filled = values.new_full((sum(rows), *values.shape[1:]), pad_token).index_copy(0, place, values)
    grid = (len(rows), rows[0]) if layout == "bshd" else (1, sum(rows))
    ends = tuple(accumulate(rows)) if layout == "thd" else None
    cu_seqlens = None if ends is None else torch.tensor([0, *ends], dtype=torch.int32, device=device)
    real_tokens = real.unflatten(0, grid)
    chosen = choose_mask(mask, layout, device.type, causal=causal, padded=rows != sizes)
    return EngineBatch(
        layout=layout,
        input_ids=filled.unflatten(0, grid),
        position_ids=positions.unflatten(0, grid),
        attention_mask=model_mask(chosen, real_tokens, cu_seqlens, causal=causal, heads=heads),
        sparse_mode=2 if chosen == "compressed" else 0,
        real_tokens=real_tokens,
        lengths=tuple(sizes),
        cu_seqlens=cu_seqlens,
        ends=ends,
        max_length=max(rows),
    )


def postprocess(output: Tensor, batch: EngineBatch) -> Tensor:
    """A model's output `[B, S, ...]` or `[1, T, ...]` as a nested tensor `[B, ragged, ...]`, without padding.

    Differentiable. Reads `real_tokens`, so it waits for the device: it belongs behind compiled code, not into it.

    Args:
        output: of the model.
        batch: what `preprocess` made.

    Raises:
        LayerError: an output of other first two sizes, or on another device.
    """
    if output.shape[:2] != batch.real_tokens.shape or output.device != batch.real_tokens.device:
        raise LayerError(
            "The output is not of this batch.",
            seen=f"{list(output.shape[:2])} on {output.device}",
            expected=f"{list(batch.real_tokens.shape)} on {batch.real_tokens.device}",
            hint="with context parallelism gather the ranks' pieces first, in the order of the tokens",
        )
    values = output[batch.real_tokens]
    offsets = torch.tensor([0, *batch.lengths], device=output.device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=min(batch.lengths), max_seqlen=max(batch.lengths)
    )


def _sequences(tokens: Tensor, lengths: list[int] | None) -> list[Tensor]:
    """A dense tensor per sequence. `unbind` minds lengths that are shorter than the offsets' differences."""
    if lengths is not None:
        if tokens.is_nested or tokens.dim() < 1 or sum(lengths) != len(tokens):
            raise LayerError(
                "The lengths are not those of the tokens.",
                seen="a nested tensor and lengths" if tokens.is_nested else f"{list(tokens.shape)}, {lengths}",
                expected="one dimension of sum(lengths) tokens, or a nested tensor alone",
                hint="leave lengths out for a nested tensor",
            )
        return list(tokens.split(lengths))
    if tokens.layout is not torch.jagged:
        raise LayerError(
            "A ragged batch is a nested tensor of layout torch.jagged.",
            seen=f"a {'nested' if tokens.is_nested else 'dense'} tensor of layout {tokens.layout}",
            expected="torch.nested.nested_tensor(..., layout=torch.jagged), or lengths=",
            hint="torch.nested.as_nested_tensor(list_of_sequences, layout=torch.jagged)",
        )
    if isinstance(tokens.shape[1], int):
        raise LayerError(
            "The second dimension of a ragged batch is the ragged one.",
            seen=f"shape {list(tokens.shape)}",
            expected="[batch, ragged, ...]",
            hint="transpose it",
        )
    return list(tokens.unbind())


def _checked(lengths: Sequence[int] | Tensor) -> list[int]:
    sizes = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not isinstance(sizes, list) or not all(isinstance(each, int) for each in sizes):
        raise LayerError(
            "Lengths are one integer per sequence.",
            seen=f"{sizes!r}"[:200],
            expected="ints, or an integer tensor of one dimension",
            hint="cumulative lengths: pass their differences, cu_seqlens.diff()",
        )
    if not sizes or min(sizes) < 0 or max(sizes) == 0:
        raise LayerError(
            "There is nothing to be done for an empty batch.",
            seen=f"lengths {sizes}",
            expected="at least one sequence, and one token",
            hint="leave the call out",
        )
    return sizes


def _up(length: int, align: int) -> int:
    if align < 1:
        raise LayerError(
            "Lengths are aligned to a multiple.", seen=f"align={align}", expected="1 or more", hint="see alignment()"
        )
    return -(-length // align) * align
