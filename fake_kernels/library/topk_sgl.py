"""SGLang's choice of the 2048 tokens that sparse attention looks at. All three operators hide what they write.

The best 2048 of `lengths[i]` scores, in no defined order (atomic counters); a row with fewer takes them all, in order,
then -1. With fewer, `row_starts` is not added, because indices are counted from the start of the row's own section.

Source: sgl-project/sglang sgl-kernel/csrc/elementwise/topk.cu; schemas from the wheel of sglang-kernel 0.4.10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "sgl-project/sglang sgl-kernel/csrc/elementwise/topk.cu"
_TOP_K = 2048


def _best(score: Tensor, lengths: Tensor, row_starts: Tensor | None) -> Tensor:
    """Indices `[rows, 2048]` into each row's section, -1 where it has fewer."""
    if score.dim() != 2 or score.stride(1) != 1 or lengths.shape != score.shape[:1]:
        raise ValueError("scores [rows, length], and a length per row")
    place = torch.arange(max(score.shape[1], _TOP_K), device=score.device)
    start = 0 if row_starts is None else row_starts.long()[:, None]
    length = lengths.long()[:, None]
    padded = torch.nn.functional.pad(score.float(), (0, len(place) - score.shape[1]), value=float("-inf"))
    section = padded.gather(1, (place + start).clamp(max=len(place) - 1).expand(len(score), -1))
    section = section.masked_fill(place >= length, float("-inf"))
    first = place[:_TOP_K].expand(len(score), -1)
    chosen = torch.where(length > _TOP_K, section.argsort(dim=-1, descending=True, stable=True)[:, :_TOP_K], first)
    return chosen.masked_fill(first >= length, -1)


def _check_scores(score: Tensor, lengths: Tensor, row_starts: Tensor | None) -> None:
    torch._check(score.dim() == 2, lambda: f"score has to have 2 dimensions, not {score.dim()}")
    torch._check(score.stride(1) == 1, lambda: "score has to be contiguous in its last dimension")
    for name, tensor in (("lengths", lengths), ("row_starts", row_starts)):
        if tensor is not None:
            _check_per_row(name, tensor, score)
    torch._check(lengths.is_contiguous(), lambda: "lengths has to be contiguous")


def _check_per_row(name: str, tensor: Tensor, score: Tensor) -> None:
    torch._check(
        tensor.dim() == 1 and tensor.shape[0] == score.shape[0],
        lambda: f"{name} has to have one number per row of score, {score.shape[0]}, not {list(tensor.shape)}",
    )


def _check_output(name: str, tensor: Tensor, score: Tensor) -> None:
    torch._check(
        tensor.dim() == 2 and tensor.shape[0] == score.shape[0] and tensor.shape[1] == _TOP_K,
        lambda: f"{name} has to be [{score.shape[0]}, {_TOP_K}], not {list(tensor.shape)}",
    )
    torch._check(tensor.is_contiguous(), lambda: f"{name} has to be contiguous")


def _refuse_output(tensor: Tensor, score: Tensor) -> None:
    if tensor.shape != (len(score), _TOP_K) or not tensor.is_contiguous():
        raise ValueError("a place for 2048 numbers per row")


def _int32(draw: Draw, *shape: int, low: int = 0, high: int) -> Tensor:
    return draw.integers(*shape, low=low, high=high, dtype=torch.int32, layout="contiguous")


def _drawn(draw: Draw, starts: bool, more: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scores, output, lengths, starts."""
    rows, length = draw.size(least=1) + more, draw.size(least=1, times=515)
    scores = draw.floats(rows, length, dtype=torch.float32, layout="contiguous")
    begin = _int32(draw, rows, high=length // 2 + 1) if starts else None
    lengths = _int32(draw, rows, low=1, high=length // 2 + 1 if starts else length + 1)
    return scores, _int32(draw, rows, _TOP_K, high=9), lengths, begin


def _scores(draw: Draw, *shape: int) -> Tensor:
    return draw.floats(*shape, dtype=torch.float32, layout="contiguous")


def _fast_topk(score: Tensor, indices: Tensor, lengths: Tensor, row_starts: Tensor | None) -> None:
    _refuse_output(indices, score)
    indices.copy_(_best(score, lengths, row_starts))


def _fast_topk_arguments(draw: Draw) -> Call:
    score, indices, lengths, starts = _drawn(draw, draw.flag())
    return (score, indices, lengths, starts), {}


@fake_kernel(
    "sgl_kernel::fast_topk(Tensor score, Tensor indices, Tensor lengths, Tensor? row_starts) -> ()",
    reference=_fast_topk,
    source=_SOURCE,
    library="sgl_kernel",
    arguments=_fast_topk_arguments,
    refuses={
        "score has to have 2 dimensions": lambda draw: (
            (_scores(draw, 3), _int32(draw, 3, _TOP_K, high=2), _int32(draw, 3, high=2), None),
            {},
        ),
        "lengths has to have one number per row": lambda draw: (
            (_scores(draw, 3, 8), _int32(draw, 3, _TOP_K, high=2), _int32(draw, 2, high=2), None),
            {},
        ),
        "indices has to be": lambda draw: (
            (_scores(draw, 3, 8), _int32(draw, 3, 8, high=2), _int32(draw, 3, high=2), None),
            {},
        ),
    },
    writes=("indices",),
)
def fast_topk(score: Tensor, indices: Tensor, lengths: Tensor, row_starts: Tensor | None) -> None:
    """Indices of the 2048 best scores of each row's section.

    Args:
        score: float32 `[rows, length]`, contiguous in the last dimension.
        indices: int32 `[rows, 2048]`, contiguous. WRITTEN.
        lengths: int32 `[rows]`: how long a section is. row_starts: int32 `[rows]`: where it begins.
    """
    _check_scores(score, lengths, row_starts)
    _check_output("indices", indices, score)


def _transform(
    score: Tensor,
    lengths: Tensor,
    dst_page_table: Tensor,
    src_page_table: Tensor,
    cu_seqlens_q: Tensor,
    row_starts: Tensor | None,
) -> None:
    _refuse_output(dst_page_table, score)
    if len(src_page_table) != len(cu_seqlens_q) - 1:
        raise ValueError("a sequence per row of the page table")
    rows = torch.arange(len(score), device=score.device)
    sequence = torch.searchsorted(cu_seqlens_q.long(), rows, right=True) - 1
    best = _best(score, lengths, row_starts)
    pages = src_page_table[sequence].gather(1, best.clamp(min=0))
    dst_page_table.copy_(pages.masked_fill(best < 0, -1))


def _transform_arguments(draw: Draw) -> Call:
    starts, more = draw.flag(), draw.choice(0, 1, 2)
    score, output, lengths, begin = _drawn(draw, starts, more)
    ends = torch.arange(len(score) - more + 1, dtype=torch.int32)
    ends[-1] += more  # so many rows more belong to the last sequence
    pages = _int32(draw, len(ends) - 1, max(score.shape[1], _TOP_K), high=100)
    return (score, lengths, output, pages, ends.to(draw.device), begin), {}


def _too_narrow(draw: Draw) -> Call:
    score, lengths, output, *rest = _transform_arguments(draw)[0]
    return (score, lengths, output[:, :8].contiguous(), *rest), {}


@fake_kernel(
    "sgl_kernel::fast_topk_transform_fused(Tensor score, Tensor lengths, Tensor dst_page_table, "
    "Tensor src_page_table, Tensor cu_seqlens_q, Tensor? row_starts) -> ()",
    reference=_transform,
    source=_SOURCE,
    library="sgl_kernel",
    arguments=_transform_arguments,
    refuses={
        "dst_page_table has to be": _too_narrow,
        "a sequence per row": lambda draw: ((*_transform_arguments(draw)[0][:4], _int32(draw, 99, high=2), None), {}),
    },
    writes=("dst_page_table",),
)
def fast_topk_transform_fused(
    score: Tensor,
    lengths: Tensor,
    dst_page_table: Tensor,
    src_page_table: Tensor,
    cu_seqlens_q: Tensor,
    row_starts: Tensor | None,
) -> None:
    """The pages of the 2048 best, looked up in the page table of each row's sequence.

    Args:
        dst_page_table: int32 `[rows, 2048]`, contiguous. WRITTEN.
        src_page_table: int32 `[sequences, pages]`, contiguous in the last dimension; a page for every score.
        cu_seqlens_q: int32 `[sequences + 1]`, contiguous: where each sequence's rows begin.

    The others are those of `fast_topk`.
    """
    _check_scores(score, lengths, row_starts)
    _check_output("dst_page_table", dst_page_table, score)
    torch._check(
        src_page_table.dim() == 2 and src_page_table.stride(1) == 1,
        lambda: "src_page_table has to be [sequences, pages], contiguous in its last dimension",
    )
    torch._check(cu_seqlens_q.dim() == 1 and cu_seqlens_q.is_contiguous(), lambda: "cu_seqlens_q has to be contiguous")
    torch._check(
        src_page_table.shape[0] == cu_seqlens_q.shape[0] - 1,
        lambda: f"cu_seqlens_q has to have a sequence per row of src_page_table, {src_page_table.shape[0]}",
    )
    torch._check(src_page_table.shape[0] <= score.shape[0], lambda: "no more sequences than rows of score are possible")


def _ragged(
    score: Tensor, lengths: Tensor, topk_indices_ragged: Tensor, topk_indices_offset: Tensor, row_starts: Tensor | None
) -> None:
    _refuse_output(topk_indices_ragged, score)
    best = _best(score, lengths, row_starts)
    if topk_indices_offset.shape != lengths.shape:
        raise ValueError("an offset per row")
    topk_indices_ragged.copy_(torch.where(best < 0, best, best + topk_indices_offset.long()[:, None]))


def _ragged_arguments(draw: Draw) -> Call:
    score, output, lengths, starts = _drawn(draw, draw.flag())
    return (score, lengths, output, _int32(draw, len(score), high=50), starts), {}


@fake_kernel(
    "sgl_kernel::fast_topk_transform_ragged_fused(Tensor score, Tensor lengths, Tensor topk_indices_ragged, "
    "Tensor topk_indices_offset, Tensor ? row_starts) -> ()",
    reference=_ragged,
    source=_SOURCE,
    library="sgl_kernel",
    arguments=_ragged_arguments,
    refuses={
        "topk_indices_offset has to have one number per row": lambda draw: (
            (*_ragged_arguments(draw)[0][:3], _int32(draw, 99, high=2), None),
            {},
        )
    },
    writes=("topk_indices_ragged",),
)
def fast_topk_transform_ragged_fused(
    score: Tensor, lengths: Tensor, topk_indices_ragged: Tensor, topk_indices_offset: Tensor, row_starts: Tensor | None
) -> None:
    """The indices of the 2048 best plus an offset per row, for keys that lie one sequence after the other.

    Args:
        topk_indices_ragged: int32 `[rows, 2048]`, contiguous. WRITTEN. topk_indices_offset: int32 `[rows]`.
    """
    _check_scores(score, lengths, row_starts)
    _check_output("topk_indices_ragged", topk_indices_ragged, score)
    _check_per_row("topk_indices_offset", topk_indices_offset, score)


KERNELS = (fast_topk, fast_topk_transform_fused, fast_topk_transform_ragged_fused)
