"""Ascend's attention for training, backward: `npu_fusion_attention_grad`, and `npu_fusion_attention_grad_v3`.

The gradient of `pse` is no tensor where no `pse` was given, and the one of `sink` is an empty tensor: not the other way
round. With `keep_prob` below 1 the first version's fake refuses, for the reason its forward has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.attention_reference_npu import (
    Options,
    as_bnsd,
    backward,
    from_bnsd,
    kept,
    refuse_as_kernel,
    sequences,
)
from fake_kernels.library.fusion_attention_npu import (
    REFUSES,
    SOURCE,
    checked_layout,
    draw_attention,
    misspelt,
    refuse_dropout,
)

_FOREVER = 2147483647
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


def _grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None, softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0, pre_tockens: int = _FOREVER,
    next_tockens: int = _FOREVER, inner_precise: int = 0, seed: Any = 0, offset: Any = 0, numels: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: Tensor | None = None,
) -> _Gradients:  # fmt: skip
    layout = input_layout.upper()
    options = Options(head_num, layout, scale_value, keep_prob, pre_tockens, next_tockens, sparse_mode)
    refuse_as_kernel(input_layout, options, query, key, value, dy)
    seed, offset = (0 if each is None else int(each) for each in (seed, offset))
    inputs = (query, key, value, dy)
    if layout == "TND":
        parts = []
        spans = zip(sequences(actual_seq_qlen), sequences(actual_seq_kvlen), strict=True)
        for number, (rows, columns) in enumerate(spans):
            q, k, v, g = (
                x[span].transpose(0, 1)[None] for x, span in zip(inputs, (rows, columns, columns, rows), strict=True)
            )
            factor = kept((1, q.shape[1], q.shape[2], k.shape[2]), keep_prob, seed + number, offset, query.device)
            parts.append(backward(q, k, v, g, pse, atten_mask, sink, options, factor))
        dq, dk, dv = (torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3))
        dscores, dsink = parts[0][3], torch.stack([part[4] for part in parts]).sum(0)
    else:
        width = query.shape[-1] // head_num if len(layout) == 3 else query.shape[-1]
        value_width = dy.shape[-1] // head_num if len(layout) == 3 else dy.shape[-1]
        widths = (width, width, value_width, value_width)
        q, k, v, g = (as_bnsd(x, layout, each) for x, each in zip(inputs, widths, strict=True))
        factor = kept((*q.shape[:3], k.shape[2]), keep_prob, seed, offset, query.device)
        *found, dscores, dsink = backward(q, k, v, g, pse, atten_mask, sink, options, factor)
        dq, dk, dv = (from_bnsd(x, layout) for x in found)
    gradients = [x.to(of.dtype).contiguous() for x, of in zip((dq, dk, dv), inputs, strict=False)]
    dpse = None if pse is None else dscores.sum_to_size(pse.shape).to(pse.dtype).contiguous()
    dsink = dsink.to(sink.dtype) if sink is not None else query.new_empty(0, dtype=torch.float32)
    return gradients[0], gradients[1], gradients[2], dpse, dsink


def _draw(draw: Draw, tensors_for_ints: bool) -> Call:
    keep_prob = draw.choice(1.0, 0.5) if tensors_for_ints else 1.0
    (query, key, value), (heads, layout), given = draw_attention(draw, tensors_for_ints)
    given = misspelt(given)
    given["scale_value"] = given.pop("scale")
    if layout in ("BSH", "SBH"):
        heads_of_keys = key.shape[-1] // (query.shape[-1] // heads)
        shape = (*query.shape[:2], heads * (value.shape[-1] // heads_of_keys))
    else:
        shape = (*query.shape[:-1], value.shape[-1])
    if keep_prob < 1:
        given |= {"keep_prob": keep_prob, "seed": torch.tensor([3]), "offset": torch.tensor([4])}
    return (query, key, value, draw.floats(*shape, dtype=query.dtype), heads, layout), given


def _arguments(draw: Draw) -> Call:
    return _draw(draw, False)


def _arguments_v3(draw: Draw) -> Call:
    return _draw(draw, True)


def _with_dy(draw_bad: Any) -> Any:
    def call(draw: Draw) -> Call:
        (x, *rest), kwargs = draw_bad(draw)
        return (x, *rest[:2], x, *rest[2:]), kwargs

    return call


_REFUSED = {words: _with_dy(call) for words, call in REFUSES.items() if "softmax" not in words and "head" not in words}


def _results(query: Tensor, key: Tensor, value: Tensor, pse: Tensor | None, sink: Tensor | None) -> _Gradients:
    dq, dk, dv = (each.new_empty(each.shape) for each in (query, key, value))
    dpse = None if pse is None else pse.new_empty(pse.shape)
    dsink = query.new_empty((0,), dtype=torch.float32) if sink is None else sink.new_empty(sink.shape)
    return dq, dk, dv, dpse, dsink


@fake_kernel(
    "npu::npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, "
    "*, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, "
    "Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, "
    "int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    'int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_grad,
    source=f"{SOURCE} (npu_fusion_attention_grad, npu_fusion_attention_backward)",
    library="torch_npu",
    arguments=_arguments,
    refuses=_REFUSED,
)
def fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None, softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0, pre_tockens: int = _FOREVER,
    next_tockens: int = _FOREVER, inner_precise: int = 0, seed: int = 0, offset: int = 0, numels: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None,
) -> _Gradients:  # fmt: skip
    """Gradients of query, key and value (of their shapes and dtypes), of `pse` (None without one), and of `sink`
    (float32 `[0]` without one), all contiguous. `keep_prob` below 1 is refused, as by the forward's fake."""
    checked_layout(input_layout, 1, keep_prob, sparse_mode, "", query=query, key=key, value=value, dy=dy)
    refuse_dropout("npu_fusion_attention_grad", keep_prob)
    return _results(query, key, value, pse, sink)


@fake_kernel(
    "npu::npu_fusion_attention_grad_v3(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, "
    "str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, "
    "float scale_value=1., float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
    "int inner_precise=0, Tensor? seed=None, Tensor? offset=None, SymInt[]? prefix=None, "
    "Tensor? actual_seq_qlen=None, Tensor? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    reference=_grad,
    source=f"{SOURCE} (npu_fusion_attention_grad_v3_symint, npu_fusion_attention_backward_v3)",
    library="torch_npu",
    arguments=_arguments_v3,
    refuses=_REFUSED,
)
def fusion_attention_grad_v3(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None, softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0, pre_tockens: int = _FOREVER,
    next_tockens: int = _FOREVER, inner_precise: int = 0, seed: Tensor | None = None, offset: Tensor | None = None,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Tensor | None = None, actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: Tensor | None = None,
) -> _Gradients:  # fmt: skip
    """As the first version, with seed and offset as tensors; so any `keep_prob` in (0, 1] can be traced."""
    checked_layout(input_layout, 1, keep_prob, sparse_mode, "", query=query, key=key, value=value, dy=dy)
    return _results(query, key, value, pse, sink)


KERNELS = (fusion_attention_grad, fusion_attention_grad_v3)
