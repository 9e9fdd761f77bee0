"""Ascend's older attention for inference: `npu_prompt_flash_attention`, and `npu_incre_flash_attention` for one token.

Their outputs are made like the query: contiguous, of its shape but for two layouts, and int8 or float16 where integers
are given or wanted. op-plugin checks nothing; layouts that it does not know are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.infer_attention_reference_npu import infer_attention, quantised

_FOREVER = 2147483647
_Ints = Sequence[int] | None
_SOURCE = "Ascend/op-plugin op_plugin/ops/opapi/FlashAttentionKernelNpuOpApi.cpp"
_PROMPT = ("BSH", "SH", "BNSD", "NSD", "BNSD_BSND", "TND")


def _reference(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int = 1, scale_value: float = 1.0,
    input_layout: str = "BSH", num_key_value_heads: int = 0, atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None, quant_scale2: Tensor | None = None, quant_offset2: Tensor | None = None,
    lengths: _Ints, lengths_of_keys: _Ints, sparse_mode: int, tokens: tuple[int, int], others: dict[str, Any],
) -> Tensor:  # fmt: skip
    if any(isinstance(other, Tensor) for other in others.values()):
        raise NotImplementedError(f"the reference does not know what any of {sorted(others)} does")
    flat = input_layout == "SH"
    q, k, v = (x[None] if flat else x for x in (query, key, value))
    output, _ = infer_attention(
        q, k, v, "BSH" if flat else input_layout, num_heads, num_key_value_heads, scale_value, pse=pse_shift,
        mask=atten_mask, lengths=lengths, lengths_of_keys=lengths_of_keys, sparse_mode=sparse_mode, tokens=tokens,
    )  # fmt: skip
    return quantised(output[0] if flat else output, quant_scale2, quant_offset2, query.dtype).contiguous()


def _prompt(
    query: Tensor, key: Tensor, value: Tensor, *, actual_seq_lengths: _Ints = None,
    actual_seq_lengths_kv: _Ints = None, pre_tokens: int = _FOREVER, next_tokens: int = 0, sparse_mode: int = 0,
    padding_mask: Tensor | None = None, deq_scale1: Tensor | None = None, quant_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None, **common: Any,
) -> Tensor:  # fmt: skip
    others = {
        "padding_mask": padding_mask,
        "deq_scale1": deq_scale1,
        "quant_scale1": quant_scale1,
        "deq_scale2": deq_scale2,
    }
    sparse_mode = sparse_mode - 10 if 10 <= sparse_mode <= 14 else sparse_mode  # of high precision
    return _reference(
        query, key, value, **common, lengths=actual_seq_lengths, lengths_of_keys=actual_seq_lengths_kv,
        sparse_mode=sparse_mode, tokens=(pre_tokens, next_tokens), others=others,
    )  # fmt: skip


def _incre(
    query: Tensor, key: Tensor, value: Tensor, *, actual_seq_lengths: _Ints = None, block_size: int = 0,
    inner_precise: int = 1, **common: Any,
) -> Tensor:  # fmt: skip
    taken = ("num_heads", "scale_value", "input_layout", "num_key_value_heads", "atten_mask", "pse_shift")
    known = {name: common.pop(name) for name in (*taken, "quant_scale2", "quant_offset2") if name in common}
    return _reference(
        query, key, value, **known, lengths=None, lengths_of_keys=actual_seq_lengths, sparse_mode=0,
        tokens=(_FOREVER, _FOREVER), others=common,
    )  # fmt: skip


def _draw(draw: Draw, layout: str, length: int | None) -> tuple[list[Tensor], dict[str, Any]]:
    dtype, heads, shared = draw.choice(*HALVES), draw.choice(2, 1), draw.choice(1, 2)
    masked, to_int8 = draw.flag(), draw.flag()
    b, (s, s2, d) = draw.size(), draw.sizes(3, least=1)
    n, s = heads * shared, s if length is None else length
    form = layout.partition("_")[0]
    given: dict[str, Any] = {"num_heads": n, "scale_value": 0.5, "input_layout": layout}
    if shared > 1:
        given["num_key_value_heads"] = heads
    if layout == "TND":
        ends = draw.choice((3,), (2, 6))
        s = s2 = ends[-1]
        given |= {"actual_seq_lengths": list(ends), "actual_seq_lengths_kv": list(ends)}

    def shape(rows: int, count: int) -> list[int]:
        sizes = {"B": b, "S": rows, "T": rows, "N": count, "D": d, "H": count * d}
        return [sizes[name] for name in form]

    tensors = [draw.floats(*each, dtype=dtype) for each in (shape(s, n), shape(s2, heads), shape(s2, heads))]
    if masked and "B" in form:
        given["atten_mask"] = draw.placed(torch.rand(b, 1, s, s2) > 0.7)
    if to_int8:
        given["quant_scale2"] = torch.full((1,), 20.0, device=draw.device)
    return tensors, given


def _prompt_arguments(draw: Draw) -> Call:
    tensors, given = _draw(draw, draw.choice(*_PROMPT), None)
    return tuple(tensors), given


def _incre_arguments(draw: Draw) -> Call:
    tensors, given = _draw(draw, draw.choice("BSH", "BNSD", "BSND"), 1)
    return tuple(tensors), given


def _dtype(query: Tensor, quant_scale2: Tensor | None) -> torch.dtype:
    if quant_scale2 is not None:
        return torch.int8
    return torch.float16 if query.dtype == torch.int8 else query.dtype


@fake_kernel(
    "npu::npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, int[]? actual_seq_lengths=None, Tensor? deq_scale1=None, "
    "Tensor? quant_scale1=None, Tensor? deq_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
    "int num_heads=1, float scale_value=1., int pre_tokens=2147483647, int next_tokens=0, "
    'str input_layout="BSH", int num_key_value_heads=0, int[]? actual_seq_lengths_kv=None, int sparse_mode=0) '
    "-> Tensor",
    reference=_prompt,
    source=f"{_SOURCE} (npu_prompt_flash_attention)",
    library="torch_npu",
    arguments=_prompt_arguments,
)
def prompt_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None, actual_seq_lengths: _Ints = None, deq_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None, deq_scale2: Tensor | None = None, quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None, num_heads: int = 1, scale_value: float = 1.0, pre_tokens: int = _FOREVER,
    next_tokens: int = 0, input_layout: str = "BSH", num_key_value_heads: int = 0, actual_seq_lengths_kv: _Ints = None,
    sparse_mode: int = 0,
) -> Tensor:  # fmt: skip
    """The output in query's shape; `[B, S, N, D]` for `BNSD_BSND`, and with the value's width for `TND`. Of query's
    dtype; int8 with `quant_scale2`; float16 for an int8 query. Contiguous."""
    shape = query.shape
    if input_layout == "BNSD_BSND":
        shape = torch.Size((shape[0], shape[2], shape[1], shape[3]))
    elif input_layout == "TND":
        shape = torch.Size((shape[0], shape[1], value.shape[2]))
    return query.new_empty(shape, dtype=_dtype(query, quant_scale2))


@fake_kernel(
    "npu::npu_incre_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, SymInt[]? actual_seq_lengths=None, Tensor? antiquant_scale=None, "
    "Tensor? antiquant_offset=None, Tensor? block_table=None, Tensor? dequant_scale1=None, Tensor? quant_scale1=None, "
    "Tensor? dequant_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? kv_padding_size=None, "
    'int num_heads=1, float scale_value=1., str input_layout="BSH", int num_key_value_heads=0, int block_size=0, '
    "int inner_precise=1) -> Tensor",
    reference=_incre,
    source=f"{_SOURCE} (npu_incre_flash_attention_symint)",
    library="torch_npu",
    arguments=_incre_arguments,
)
def incre_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None, actual_seq_lengths: _Ints = None, antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None, block_table: Tensor | None = None, dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None, dequant_scale2: Tensor | None = None, quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None, kv_padding_size: Tensor | None = None, num_heads: int = 1,
    scale_value: float = 1.0, input_layout: str = "BSH", num_key_value_heads: int = 0, block_size: int = 0,
    inner_precise: int = 1,
) -> Tensor:  # fmt: skip
    """The output in query's shape, contiguous; dtypes as above."""
    return query.new_empty(query.shape, dtype=_dtype(query, quant_scale2))


KERNELS = (prompt_flash_attention, incre_flash_attention)
