"""Attention in plain torch as Ascend's training kernels define it, for the references of their fake kernels.

`softmax(scale * (q @ k.T + pse))` where the mask is not set, times `v`, in float32, and its gradients written out:
a reference is a device's kernel too, and autograd is not at work inside of one. The layouts are `BSH`, `SBH` (H is N *
D), `BNSD`, `BSND`, and `TND`, where sequences of the lengths in between cumulative ends lie one after the other.

Source: CANN attention/flash_attention_score/docs (aclnnFlashAttentionScore and ...Grad: formulas, sparse modes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("BSH", "SBH", "BNSD", "BSND", "TND")
COPIES = 8  # the kernel writes each row's maximum and sum this often


@dataclass(frozen=True)
class Options:
    """What both directions are given beside tensors."""

    head_num: int
    layout: str
    scale: float
    keep_prob: float
    pre_tokens: int
    next_tokens: int
    sparse_mode: int


def as_bnsd(x: Tensor, layout: str, width: int) -> Tensor:
    """`[B, N, S, D]` of any layout but TND; `width` is D."""
    if layout in ("BSH", "SBH"):
        x = x.unflatten(-1, (-1, width) if width else (1, 0))
    return x.permute({"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BNSD": (0, 1, 2, 3)}[layout])


def from_bnsd(x: Tensor, layout: str) -> Tensor:
    """The inverse, contiguous."""
    x = x.permute({"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BNSD": (0, 1, 2, 3)}[layout])
    return (x.flatten(2) if layout in ("BSH", "SBH") else x).contiguous()


def kept(shape: Sequence[int], keep_prob: float, seed: int, offset: int, device: torch.device) -> Tensor | float:
    """What each probability is multiplied with: the same for the same seed and offset."""
    if keep_prob == 1:
        return 1.0
    generator = torch.Generator().manual_seed(seed + offset)
    return ((torch.rand(tuple(shape), generator=generator) < keep_prob) / keep_prob).to(device)


def _masked(sizes: Sequence[int], mask: Tensor | None, options: Options, device: torch.device) -> Tensor:
    rows, columns = torch.arange(sizes[-2], device=device)[:, None], torch.arange(sizes[-1], device=device)
    ahead = columns - rows - (0 if options.sparse_mode == 2 else sizes[-1] - sizes[-2])
    if options.sparse_mode in (2, 3):
        return ahead > 0
    if options.sparse_mode == 4:
        return (ahead > options.next_tokens) | (-ahead > options.pre_tokens)
    if options.sparse_mode > 4:
        raise NotImplementedError(f"the reference does not know sparse mode {options.sparse_mode}")
    return mask.bool() if mask is not None else torch.zeros(tuple(sizes[-2:]), dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Forward:
    """Of one batch of equally long sequences, in BNSD and float32."""

    output: Tensor
    maximum: Tensor
    total: Tensor
    weights: Tensor
    sink_weight: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, mask: Tensor | None, sink: Tensor | None,
    options: Options, factor: Tensor | float,
) -> Forward:  # fmt: skip
    """Heads of `k` and `v` are shared by several of `q`'s."""
    k, v = (_per_query_head(each, q) for each in (k, v))
    scores = q.float() @ k.mT
    scores = (scores if pse is None else scores + pse.float()) * options.scale
    scores = scores.masked_fill(_masked(scores.shape, mask, options, q.device), -math.inf)
    extra = scores.new_tensor(-math.inf) if sink is None else sink.float().view(-1, 1, 1)
    scores = torch.cat((scores, extra.expand(*scores.shape[:-1], 1)), -1)
    maximum = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    exponentials = (scores - maximum).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.clamp_min(torch.finfo(torch.float32).tiny)
    return Forward((weights[..., :-1] * factor) @ v, maximum, total, weights[..., :-1], weights[..., -1:])


def backward(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, pse: Tensor | None, mask: Tensor | None, sink: Tensor | None,
    options: Options, factor: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the scores before the scale (pse's, before it is summed), and of the sink, per head."""
    found = forward(q, k, v, pse, mask, sink, options, factor)
    keys, values = (_per_query_head(each, q) for each in (k, v))
    dweights = dy.float() @ values.mT * factor
    along = (dweights * found.weights).sum(-1, keepdim=True)
    dscores = found.weights * (dweights - along) * options.scale
    dv = (found.weights * factor).mT @ dy.float()
    dsink = -(found.sink_weight * along).sum((0, 2, 3))
    return dscores @ keys, _shared(dscores.mT @ q.float(), k), _shared(dv, v), dscores, dsink


def sequences(ends: Sequence[int] | Tensor | None) -> list[slice]:
    """Where each sequence of a TND tensor lies, from the cumulative ends."""
    if ends is None:
        raise ValueError("TND without the ends of its sequences")
    return [slice(start, end) for start, end in pairwise([0, *(int(end) for end in ends)])]


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1)


def _shared(gradient: Tensor, of: Tensor) -> Tensor:
    by_head: Tensor = gradient.unflatten(1, (of.shape[1], -1))
    return by_head.sum(2)


def refuse_as_kernel(layout: str, options: Options, *tensors: Tensor) -> None:
    """Reference: `ValueError` for what the kernel refuses."""
    if options.layout not in LAYOUTS or any(tensor.dim() != len(options.layout) for tensor in tensors):
        raise ValueError(f"{[tuple(tensor.shape) for tensor in tensors]} as {layout}")
    modes = (*range(5), 6, 7, 8) if layout == "TND" else range(7)
    if options.head_num <= 0 or not 0 < options.keep_prob <= 1 or options.sparse_mode not in modes:
        raise ValueError(f"{options}")


def attend(
    query: Tensor, key: Tensor, value: Tensor, pse: Tensor | None, mask: Tensor | None, sink: Tensor | None,
    options: Options, ends: Any, ends_of_keys: Any, seed: int, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Reference: output, and each row's maximum and sum."""
    if options.layout == "TND":
        spans = list(zip(sequences(ends), sequences(ends_of_keys), strict=True))
        parts = []
        for number, (rows, columns) in enumerate(spans):
            q, k, v = (x[s].transpose(0, 1)[None] for x, s in ((query, rows), (key, columns), (value, columns)))
            shape = (1, q.shape[1], q.shape[2], k.shape[2])
            factor = kept(shape, options.keep_prob, seed + number, offset, query.device)
            parts.append(forward(q, k, v, pse, mask, sink, options, factor))
        joined = [
            torch.cat([getattr(part, name)[0].transpose(0, 1) for part in parts])
            for name in ("output", "maximum", "total")
        ]
    else:
        n = options.head_num if options.layout in ("BSH", "SBH") else query.shape[options.layout.index("N")]
        width = query.shape[-1] // n if len(options.layout) == 3 else query.shape[-1]
        shared = key.shape[-1] // width if len(options.layout) == 3 and width else 1
        value_width = value.shape[-1] // shared if len(options.layout) == 3 and shared else value.shape[-1]
        q, k, v = (as_bnsd(x, options.layout, w) for x, w in ((query, width), (key, width), (value, value_width)))
        factor = kept((*q.shape[:3], k.shape[2]), options.keep_prob, seed, offset, query.device)
        found = forward(q, k, v, pse, mask, sink, options, factor)
        joined = [from_bnsd(found.output, options.layout), found.maximum, found.total]
    output, maximum, total = joined
    copies = [each.expand(*each.shape[:-1], COPIES).contiguous() for each in (maximum, total)]
    return output.to(query.dtype).contiguous(), copies[0], copies[1]
