"""Ascend's attention for inference: `npu_fused_infer_attention_score`.

Its output has query's dtype, float16 for an int8 query (or the dtype of `query_rope`), and int8 with `quant_scale2`.
The value's last dimension decides the output's, also where the layout is not the query's. `logsumexp` is `[0]` unless
asked for (it was `[1]` in op-plugin before).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.infer_attention_reference_npu import LAYOUTS, infer_attention, quantised

_FOREVER = 2147483647
_Ints = Sequence[int] | None
SOURCE = "Ascend/op-plugin op_plugin/ops/opapi/FusedInferAttentionScoreKernelNpuOpApi.cpp (construct_fia_output_tensor)"


def _fused(
    query: Tensor, key: Tensor, value: Tensor, *, pse_shift: Tensor | None = None, atten_mask: Tensor | None = None,
    actual_seq_lengths: _Ints = None, actual_seq_lengths_kv: _Ints = None, quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None, block_table: Tensor | None = None, query_rope: Tensor | None = None,
    num_heads: int = 1, scale: float = 1.0, pre_tokens: int = _FOREVER, next_tokens: int = _FOREVER,
    input_layout: str = "BSH", num_key_value_heads: int = 0, sparse_mode: int = 0, softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if any(isinstance(other, Tensor) for other in (*others.values(), query_rope)):
        raise NotImplementedError(f"the reference does not know what any of {sorted(others)} does")
    output, logsumexp = infer_attention(
        query, key, value, input_layout, num_heads, num_key_value_heads, scale, pse=pse_shift, mask=atten_mask,
        lengths=actual_seq_lengths, lengths_of_keys=actual_seq_lengths_kv, block_table=block_table,
        sparse_mode=sparse_mode, tokens=(pre_tokens, next_tokens),
    )  # fmt: skip
    output = quantised(output, quant_scale2, quant_offset2, query.dtype)
    return output, logsumexp if softmax_lse_flag else logsumexp.new_empty(0)


def draw_infer(draw: Draw, *layouts: str, paged: bool) -> tuple[list[Tensor], dict[str, Any], str]:
    """Draws query, key, value, and by common names what comes with them; and the layout."""
    dtype, layout = draw.choice(*HALVES), draw.choice(*layouts)
    form, heads, shared = LAYOUTS.get(layout, (layout, ""))[0], draw.choice(2, 1), draw.choice(1, 2)
    pages, lengths_given = draw.choice(None, 3, 4) if paged else None, draw.flag()
    pages = None if form in ("TND", "NTD", "NSD") else pages
    kind = draw.choice(None, "[S, S]", "[B, 1, S, S]", "pse")
    mask_dtype = draw.choice(torch.bool, torch.int8)
    listed = draw.choice(1, 2)  # how many lengths there are in a list is a constant
    b, (s, s2, d, d2) = listed if lengths_given or pages else draw.size(), draw.sizes(4, least=1)
    n, block = heads * shared, draw.size(least=1)
    given: dict[str, Any] = {"heads": n, "heads_of_keys": heads if shared > 1 else 0}

    def shape(length: int, count: int, width: int) -> list[int]:
        sizes = {"B": b, "S": length, "T": length, "N": count, "D": width, "H": count * width}
        return [sizes[name] for name in form]

    if form in ("TND", "NTD"):
        given |= {"lengths": [s, s + s2], "lengths_of_keys": [s2, s + s2]}
        s = s2 = s + s2
    elif lengths_given or pages:
        given["lengths_of_keys"] = [max(1, s2 - number % 2) for number in range(b)]
    shapes = [shape(s, n, d), shape(s2, heads, d), shape(s2, heads, d2)]
    if pages:
        many = -(-s2 // block)
        given["block_table"] = draw.permutation(b * many, dtype=torch.int32).reshape(b, many)
        pools = (([b * many, block, heads * w] if pages == 3 else [b * many, heads, block, w]) for w in (d, d2))
        shapes[1:] = list(pools)
    tensors = [draw.floats(*each, dtype=dtype) for each in shapes]
    if kind == "pse" and "T" not in form and "B" in form:
        given["pse"] = draw.floats(1, n, s, s2, dtype=dtype)
    elif kind == "[S, S]" or (kind == "[B, 1, S, S]" and "B" in form):
        values = torch.rand(*((b, 1) if kind != "[S, S]" else ()), s, s2) > 0.7
        given["mask"] = draw.placed(values.to(mask_dtype))
    return tensors, given, layout


_NAMES = {
    "heads": "num_heads", "heads_of_keys": "num_key_value_heads", "lengths": "actual_seq_lengths",
    "lengths_of_keys": "actual_seq_lengths_kv", "block_table": "block_table", "pse": "pse_shift", "mask": "atten_mask",
}  # fmt: skip


def _arguments(draw: Draw) -> Call:
    wants_lse, to_int8, scale = draw.flag(), draw.flag(), draw.choice(1.0, 0.25)
    tensors, given, layout = draw_infer(draw, *LAYOUTS, paged=True)
    kwargs = {_NAMES[name]: value for name, value in given.items()}
    kwargs |= {"scale": scale, "softmax_lse_flag": wants_lse}
    if layout != "BSH":
        kwargs["input_layout"] = layout
    if to_int8:
        kwargs["quant_scale2"] = torch.full((1,), 20.0, device=draw.device)
    return tuple(tensors), kwargs


def bad(dims: int = 4, value_dims: int = 4, **kwargs: Any) -> Callable[[Draw], Call]:
    """Draws a call that is wrong in one place."""

    def call(draw: Draw) -> Call:
        x, value = (draw.floats(*(1, 2, 3, 4)[:each], dtype=torch.float16) for each in (dims, value_dims))
        return (x, x, value), {"num_heads": 2, "input_layout": "BNSD"} | kwargs

    return call


def check_layout(query: Tensor, num_heads: int, input_layout: str) -> None:
    """The fakes' checks of what decides the shape of the output."""
    torch._check(num_heads > 0, lambda: f"num_heads should be greater than 0, and is {num_heads}")
    torch._check(
        input_layout in LAYOUTS, lambda: f"input_layout should be one of {', '.join(LAYOUTS)}, not {input_layout!r}"
    )
    dims = len(LAYOUTS[input_layout][0])
    torch._check(
        query.dim() == dims, lambda: f"query should have {dims} dimensions for {input_layout}: {tuple(query.shape)}"
    )


def _value_width(query: Tensor, value: Tensor, layout: str, heads_of_keys: int, paged: bool) -> int:
    if not paged:
        torch._check(
            value.dim() == query.dim(),
            lambda: f"value should have as many dimensions as query, {query.dim()}: {tuple(value.shape)}",
        )
        return value.shape[2] // heads_of_keys if layout == "BSH" else value.shape[-1]
    torch._check(
        value.dim() in (3, 4, 5), lambda: f"value should have 3, 4 or 5 dimensions with pages: {tuple(value.shape)}"
    )
    return {3: value.shape[2] // heads_of_keys, 4: value.shape[-1]}.get(value.dim(), value.shape[2] * value.shape[-1])


@fake_kernel(
    "npu::npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
    "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
    "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
    "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
    "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
    "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1., int pre_tokens=2147483647, "
    'int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, '
    "int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, "
    "int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)",
    reference=_fused,
    source=SOURCE,
    library="torch_npu",
    arguments=_arguments,
    refuses={
        "num_heads should be greater than 0": bad(num_heads=0),
        "input_layout should be one of": bad(input_layout="BDSN"),
        "query should have 3 dimensions": bad(input_layout="BSH"),
        "as many dimensions as query": bad(value_dims=3),
        "3, 4 or 5 dimensions with pages": bad(value_dims=2, block_table=torch.zeros(1, 1, dtype=torch.int32)),
    },
)
def fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, pse_shift: Tensor | None = None, atten_mask: Tensor | None = None,
    actual_seq_lengths: _Ints = None, actual_seq_lengths_kv: _Ints = None, dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None, dequant_scale2: Tensor | None = None, quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None, antiquant_scale: Tensor | None = None, antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None, key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None, value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None, query_padding_size: Tensor | None = None, kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None, value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: _Ints = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None, num_heads: int = 1, scale: float = 1.0, pre_tokens: int = _FOREVER,
    next_tokens: int = _FOREVER, input_layout: str = "BSH", num_key_value_heads: int = 0, sparse_mode: int = 0,
    inner_precise: int = 0, block_size: int = 0, antiquant_mode: int = 0, key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0, softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in one of 14 layouts: the output and, with `softmax_lse_flag`, logsumexp, float32 `[B, N, S, 1]` or
    `[T, N, 1]`, else `[0]`; both contiguous.

    The output is the query in its second layout, with the value's width in the last place (eight times it for int32,
    which holds eight 4-bit integers). Keys and values may lie in pages (`block_table`); with an int8 query the
    reference does not compute. An output without width keeps the query's.
    """
    check_layout(query, num_heads, input_layout)
    layout, back = LAYOUTS[input_layout]
    width = _value_width(query, value, layout, num_key_value_heads or num_heads, block_table is not None)
    width = width * 8 if value.dtype == torch.int32 else width
    sizes = dict(zip(layout, query.shape, strict=True)) | ({"B": 1} if layout == "NSD" else {})
    if layout == "BSH":
        sizes |= {"N": num_heads, "D": query.shape[2] // num_heads}
    width = sizes["D"] if width == 0 or sizes["D"] == 0 else width
    shape = [num_heads * width if name == "H" else width if name == "D" else sizes[name] for name in back]
    dtype = query.dtype
    if quant_scale2 is not None:
        dtype = torch.int8
    elif dtype == torch.int8:
        dtype = torch.float16 if query_rope is None else query_rope.dtype
    rows = [sizes[name] for name in ("TN" if "T" in layout else "BNS")]
    logsumexp = query.new_empty((*rows, 1) if softmax_lse_flag else (0,), dtype=torch.float32)
    return query.new_empty(shape, dtype=dtype), logsumexp


KERNELS = (fused_infer_attention_score,)
