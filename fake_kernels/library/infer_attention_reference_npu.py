"""Attention in plain torch as Ascend's inference kernels define it: layouts, lengths, pages; for the references.

The query's layout and the output's may differ: `BNSD_BSND` is given in the first and returned in the second. `TND` and
`NTD` have sequences one after the other, told apart by cumulative ends; `NSD` is one sequence. Keys may lie in pages:
`[blocks, block size, N * D]` or `[blocks, N, block size, D]`, found through `block_table`.

Source: Ascend/op-plugin op_plugin/ops/opapi/FusedInferAttentionScoreKernelNpuOpApi.cpp (layouts);
docs/context/torch_npu-npu_fused_infer_attention_score.md (what is computed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fake_kernels.library.attention_reference_npu import Options, forward, sequences

LAYOUTS = {  # of input -> of query, of output
    **{name: (name, name) for name in ("BSH", "BSND", "BNSD", "TND", "NTD", "NSD")},
    "BNSD_BSND": ("BNSD", "BSND"),
    "BSH_BNSD": ("BSH", "BNSD"),
    "BSND_BNSD": ("BSND", "BNSD"),
    "NTD_TND": ("NTD", "TND"),
    "BSH_NBSD": ("BSH", "NBSD"),
    "BSND_NBSD": ("BSND", "NBSD"),
    "BNSD_NBSD": ("BNSD", "NBSD"),
    "TND_NTD": ("TND", "NTD"),
}
_TO_BNSD = {"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3), "NSD": (0, 1, 2, 3)}
_FROM_BNSD = {**_TO_BNSD, "NBSD": (1, 0, 2, 3)}


def _bnsd(x: Tensor, layout: str, heads: int) -> Tensor:
    x = x.unflatten(-1, (heads, -1)) if layout == "BSH" else x[None] if layout == "NSD" else x
    return x.permute(_TO_BNSD[layout])


def _laid_out(x: Tensor, layout: str) -> Tensor:
    x = x.permute(_FROM_BNSD[layout])
    return (x.flatten(2) if layout == "BSH" else x[0] if layout == "NSD" else x).contiguous()


def _gathered(pages: Tensor, table: Tensor, length: int, heads: int) -> Tensor:
    """`[N, length, D]` from the pages of one sequence."""
    found = pages[table.long()]
    found = found.unflatten(-1, (heads, -1)).transpose(1, 2) if pages.dim() == 3 else found
    return found.transpose(0, 1).flatten(1, 2)[:, :length]


def _one(
    q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Output `[N, S, D2]` and logsumexp `[N, S, 1]` of one sequence."""
    pse = None if pse is None else pse.float()[None, :, : q.shape[1], : k.shape[1]] / options.scale
    mask = None if mask is None else mask[..., : q.shape[1], : k.shape[1]]
    found = forward(q[None], k[None], v[None], pse, mask, None, options, 1.0)
    return found.output[0], (found.maximum + found.total.log())[0]


def infer_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: str, heads: int, heads_of_keys: int, scale: float, *,
    pse: Tensor | None = None, mask: Tensor | None = None, lengths: Sequence[int] | None = None,
    lengths_of_keys: Sequence[int] | None = None, block_table: Tensor | None = None, sparse_mode: int = 0,
    tokens: tuple[int, int] = (2147483647, 2147483647),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output in float32 and in the layout it is to have, and logsumexp `[B, N, S, 1]` or `[T, N, 1]`."""
    if layout not in LAYOUTS or heads <= 0 or query.dim() != len(LAYOUTS[layout][0]):
        raise ValueError(f"{tuple(query.shape)} in the layout {layout} with {heads} heads")
    if value.dim() not in ((query.dim(),) if block_table is None else (3, 4)):
        raise ValueError(f"a value {tuple(value.shape)}")
    if torch.int8 in (query.dtype, key.dtype) or value.dtype == torch.int32:
        raise NotImplementedError("the reference does not compute with integers")
    given, back = LAYOUTS[layout]
    heads_of_keys = heads_of_keys or heads
    options = Options(heads, layout, scale, 1.0, *tokens, sparse_mode)
    if given in ("TND", "NTD"):
        q, k, v = (x.transpose(0, 1) if given == "TND" else x for x in (query, key, value))
        spans = list(zip(sequences(lengths), sequences(lengths_of_keys), strict=True))
        found = [_one(q[:, rows], k[:, columns], v[:, columns], None, mask, options) for rows, columns in spans]
        output, logsumexp = (torch.cat([each[i] for each in found], 1) for i in range(2))
        output = output.transpose(0, 1) if back == "TND" else output
        return output.contiguous(), logsumexp.transpose(0, 1).contiguous()
    q = _bnsd(query, given, heads)
    rows = []
    for b in range(q.shape[0]):
        if block_table is not None:
            length = list(lengths_of_keys or ())[b]
            k, v = (_gathered(x, block_table[b], length, heads_of_keys) for x in (key, value))
        else:
            k, v = (_bnsd(x, given, heads_of_keys)[b] for x in (key, value))
            length = list(lengths_of_keys)[b] if lengths_of_keys is not None else k.shape[1]
            k, v = k[:, :length], v[:, :length]
        its_mask = mask if mask is None or mask.dim() < 3 else mask[b if mask.shape[0] > 1 else 0].unsqueeze(0)
        rows.append(_one(q[b], k, v, None if pse is None else pse[b if pse.shape[0] > 1 else 0], its_mask, options))
    if not rows:
        width = value.shape[-1] // (heads_of_keys if given == "BSH" else 1)
        empty = [q.new_zeros((0, heads, q.shape[2], each), dtype=torch.float32) for each in (width, 1)]
        return _laid_out(empty[0], back), empty[1]
    output, logsumexp = (torch.stack([row[i] for row in rows]) for i in range(2))
    return _laid_out(output, back), logsumexp.contiguous()


def quantised(output: Tensor, scale: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As the kernels store it: of query's dtype, or int8 where there is a scale."""
    if scale is None:
        return output.to(dtype)
    shifted = output * scale.float() + (0.0 if offset is None else offset.float())
    return shifted.round().clamp(-128, 127).to(torch.int8)
