"""SGLang's samplers (FlashInfer's kernels): all of them hide what they write.

`output` is written although the schemas say nothing. It comes from `torch.empty`, so a call that compiled code dropped
would give the tokens that the memory happened to hold. They are for shadow operators only.

The samplers take a token `i` of `output` from row `maybe_indices[i]` of `probs`, or row `i`. Their kernels reject and
draw again, which gives the distribution that is left when the filtered probabilities are scaled to a sum of one; the
references compute that one and draw from it.

Sources: flashinfer-ai/flashinfer csrc/sampling.cu; sgl-project/sglang sgl-kernel/python/sgl_kernel/sampling.py; the
musa operator from the fork of sgl-kernel that has it (csrc/musa).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "flashinfer-ai/flashinfer csrc/sampling.cu; sgl-project/sglang sgl-kernel python/sgl_kernel/sampling.py"


def _per_row(array: Tensor | None, value: float) -> Tensor | float:
    return value if array is None else array.float()[:, None]


def _in_top_p(probs: Tensor, p: Tensor | float) -> Tensor:
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    kept = values.cumsum(-1) - values < p
    kept[:, 0] = True
    return torch.empty_like(kept).scatter_(1, order, kept)


def _in_top_k(probs: Tensor, k: Tensor | float) -> Tensor:
    place = probs.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < k


def _check_sampler(probs: Tensor, output: Tensor) -> None:
    torch._check(probs.dim() == 2, lambda: f"probs has to be [rows, vocabulary], not {list(probs.shape)}")
    torch._check(output.dim() == 1, lambda: f"output has to have 1 dimension, not {output.dim()}")
    torch._check(probs.is_contiguous() and output.is_contiguous(), lambda: "probs and output have to be contiguous")


def _rows(probs: Tensor, output: Tensor, maybe_indices: Tensor | None) -> Tensor:
    if probs.dim() != 2 or output.dim() != 1 or not probs.is_contiguous():
        raise ValueError("probs [rows, vocabulary], contiguous, and a place for one token per sample")
    return (probs[: len(output)] if maybe_indices is None else probs[maybe_indices.long()]).float()


def _draw_into(output: Tensor, probs: Tensor, gen: torch.Generator | None) -> None:
    output.copy_(torch.multinomial(probs, 1, generator=gen)[:, 0])


def _probs(draw: Draw, *shape: int) -> Tensor:
    values = draw.floats(*shape, dtype=torch.float32, layout="contiguous")
    return values.softmax(-1) if shape[-1] else values


def _sampler_call(draw: Draw) -> tuple[Tensor, Tensor, Tensor | None, int]:
    indexed = draw.flag()
    samples, vocabulary = draw.size(least=1), draw.size(least=1, times=3)
    probs = _probs(draw, draw.size(least=1) if indexed else samples, vocabulary)
    indices = (
        draw.integers(samples, low=0, high=len(probs), dtype=torch.int32, layout="contiguous") if indexed else None
    )
    return probs, draw.integers(samples, low=0, high=9, dtype=torch.int32, layout="contiguous"), indices, samples


def _threshold(draw: Draw, samples: int, given: bool) -> Tensor | None:
    return draw.floats(samples, dtype=torch.float32, layout="contiguous").sigmoid() if given else None


def _one_threshold(draw: Draw) -> Call:
    given, value, deterministic = draw.flag(), draw.choice(0.5, 1.0), draw.flag()
    probs, output, indices, samples = _sampler_call(draw)
    return (probs, output, indices, _threshold(draw, samples, given), value, deterministic, None), {}


def _bad(draw: Draw, rest: tuple[object, ...], **layouts: int) -> Call:
    shape, layout = ((2, 3, 4), "contiguous") if layouts.get("dims") else ((3, 4), "transposed")
    probs = draw.floats(*shape, dtype=torch.float32, layout=layout).abs()
    return (probs, torch.zeros(3, dtype=torch.int32, device=draw.device), None, *rest, True, None), {}


_ONE: tuple[object, ...] = (None, 0.5)
_TWO: tuple[object, ...] = (None, 2.0, None, 0.5)


def _top_p(
    probs: Tensor,
    output: Tensor,
    maybe_indices: Tensor | None,
    maybe_top_p_arr: Tensor | None,
    top_p_val: float,
    deterministic: bool,
    gen: torch.Generator | None,
) -> None:
    rows = _rows(probs, output, maybe_indices)
    _draw_into(output, rows * _in_top_p(rows, _per_row(maybe_top_p_arr, top_p_val)), gen)


@fake_kernel(
    "sgl_kernel::top_p_sampling_from_probs(Tensor probs, Tensor output, Tensor? maybe_indices, "
    "Tensor? maybe_top_p_arr, float top_p_val, bool deterministic, Generator? gen) -> ()",
    reference=_top_p,
    source=_SOURCE,
    library="sgl_kernel",
    arguments=_one_threshold,
    refuses={
        "probs has to be": lambda draw: _bad(draw, _ONE, dims=3),
        "have to be contiguous": lambda draw: _bad(draw, _ONE),
    },
    writes=("output",),
)
def top_p_sampling_from_probs(
    probs: Tensor,
    output: Tensor,
    maybe_indices: Tensor | None,
    maybe_top_p_arr: Tensor | None,
    top_p_val: float,
    deterministic: bool,
    gen: torch.Generator | None,
) -> None:
    """A token per sample, among the most probable that reach `top_p` together.

    Args:
        probs: float32 `[rows, vocabulary]`, contiguous. output: int32 `[samples]`. WRITTEN.
        maybe_indices: `[samples]`, dtype of `output`. maybe_top_p_arr: float32 `[samples]`, instead of `top_p_val`.
    """
    _check_sampler(probs, output)


def _min_p(
    probs: Tensor,
    output: Tensor,
    maybe_indices: Tensor | None,
    maybe_min_p_arr: Tensor | None,
    min_p_val: float,
    deterministic: bool,
    gen: torch.Generator | None,
) -> None:
    rows = _rows(probs, output, maybe_indices)
    least = rows.amax(-1, keepdim=True) * _per_row(maybe_min_p_arr, min_p_val)
    _draw_into(output, rows * (rows >= least), gen)


@fake_kernel(
    "sgl_kernel::min_p_sampling_from_probs(Tensor probs, Tensor output, Tensor? maybe_indices, "
    "Tensor? maybe_min_p_arr, float min_p_val, bool deterministic, Generator? gen) -> ()",
    reference=_min_p,
    source=_SOURCE,
    library="sgl_kernel",
    arguments=_one_threshold,
    refuses={
        "probs has to be": lambda draw: _bad(draw, _ONE, dims=3),
        "have to be contiguous": lambda draw: _bad(draw, _ONE),
    },
    writes=("output",),
)
def min_p_sampling_from_probs(
    probs: Tensor,
    output: Tensor,
    maybe_indices: Tensor | None,
    maybe_min_p_arr: Tensor | None,
    min_p_val: float,
    deterministic: bool,
    gen: torch.Generator | None,
) -> None:
    """A token per sample, among those at least `min_p` times as probable as the best. Arguments as for top-p."""
    _check_sampler(probs, output)


def _top_k_top_p(
    probs: Tensor,
    output: Tensor,
    maybe_indices: Tensor | None,
    maybe_top_k_arr: Tensor | None,
    top_k_val: float,
    maybe_top_p_arr: Tensor | None,
    top_p_val: float,
    deterministic: bool,
    gen: torch.Generator | None,
) -> None:
    rows = _rows(probs, output, maybe_indices)
    kept = _in_top_k(rows, _per_row(maybe_top_k_arr, top_k_val)) & _in_top_p(rows, _per_row(maybe_top_p_arr, top_p_val))
    _draw_into(output, rows * kept, gen)


def _two_thresholds(draw: Draw) -> Call:
    with_k, with_p, k, p = draw.flag(), draw.flag(), draw.choice(2.0, 100.0), draw.choice(0.5, 1.0)
    deterministic = draw.flag()
    probs, output, indices, samples = _sampler_call(draw)
    ks = draw.integers(samples, low=1, high=9, dtype=torch.int32, layout="contiguous") if with_k else None
    return (probs, output, indices, ks, k, _threshold(draw, samples, with_p), p, deterministic, None), {}


@fake_kernel(
    "sgl_kernel::musa_top_k_top_p_sampling_from_probs(Tensor probs, Tensor output, Tensor? maybe_indices, "
    "Tensor? maybe_top_k_arr, float top_k_val, Tensor? maybe_top_p_arr, float top_p_val, bool deterministic, "
    "Generator? gen) -> ()",
    reference=_top_k_top_p,
    source="sgl-kernel csrc/musa (musa_top_k_top_p_sampling_from_probs), schemas/sgl_kernel_musa_fa9f2448.toml",
    library="sgl_kernel",
    arguments=_two_thresholds,
    refuses={
        "probs has to be": lambda draw: _bad(draw, _TWO, dims=3),
        "have to be contiguous": lambda draw: _bad(draw, _TWO),
    },
    writes=("output",),
)
def musa_top_k_top_p_sampling_from_probs(
    probs: Tensor,
    output: Tensor,
    maybe_indices: Tensor | None,
    maybe_top_k_arr: Tensor | None,
    top_k_val: float,
    maybe_top_p_arr: Tensor | None,
    top_p_val: float,
    deterministic: bool,
    gen: torch.Generator | None,
) -> None:
    """A token per sample, among the `top_k` most probable and those that reach `top_p`, both of the given `probs`.

    Args:
        maybe_top_k_arr: int32 `[samples]`, instead of `top_k_val`. The others as for top-p.
    """
    _check_sampler(probs, output)


KERNELS = (top_p_sampling_from_probs, min_p_sampling_from_probs, musa_top_k_top_p_sampling_from_probs)
