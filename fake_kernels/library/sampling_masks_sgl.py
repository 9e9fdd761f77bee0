"""SGLang's filters before sampling: probabilities renormalised after top-k or top-p, and the grammar's mask.

The two renormalising operators declare what they write. The mask sets logits to `-inf` in place and declares nothing:
a call that compiled code dropped would let the model say what the grammar forbids. It is for a shadow operator.

Sources: flashinfer-ai/flashinfer csrc/renorm.cu; sgl-project/sglang sgl-kernel/csrc/grammar
(apply_token_bitmask_inplace_cuda.cu).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_RENORM = "flashinfer-ai/flashinfer csrc/renorm.cu"


def _check_renorm(probs: Tensor) -> None:
    torch._check(probs.dim() == 2, lambda: f"probs has to be [rows, vocabulary], not {list(probs.shape)}")
    torch._check(probs.is_contiguous(), lambda: "probs has to be contiguous")


def _sorted(probs: Tensor) -> tuple[Tensor, Tensor]:
    if probs.dim() != 2 or not probs.is_contiguous():
        raise ValueError("probs [rows, vocabulary], contiguous")
    return probs.sort(dim=-1, descending=True, stable=True)


def _renormalise(into: Tensor, values: Tensor, order: Tensor, kept: Tensor) -> None:
    values = values * kept
    into.copy_(torch.empty_like(values).scatter_(1, order, values / values.sum(-1, keepdim=True)))


def _probs(draw: Draw) -> tuple[Tensor, Tensor]:
    probs = draw.floats(draw.size(), draw.size(least=1, times=3), dtype=torch.float32, layout="contiguous").softmax(-1)
    return probs, torch.zeros_like(probs)


def _refused(draw: Draw, value: float, **shape: int) -> Call:
    layout = "contiguous" if shape else "transposed"
    probs = draw.floats(*((2, 3, 4) if shape else (3, 4)), dtype=torch.float32, layout=layout).abs()
    return (probs, torch.zeros_like(probs), None, value), {}


def _top_k(probs: Tensor, renorm_probs: Tensor, maybe_top_k_arr: Tensor | None, top_k_val: int) -> None:
    values, order = _sorted(probs)
    k = top_k_val if maybe_top_k_arr is None else maybe_top_k_arr[:, None]
    _renormalise(renorm_probs, values, order, torch.arange(values.shape[1], device=values.device) < k)


def _top_k_arguments(draw: Draw) -> Call:
    given, k = draw.flag(), draw.choice(2, 100)
    probs, into = _probs(draw)
    ks = draw.integers(len(probs), low=1, high=9, dtype=torch.int32, layout="contiguous") if given else None
    return (probs, into, ks, k), {}


@fake_kernel(
    "sgl_kernel::top_k_renorm_probs(Tensor probs, Tensor! renorm_probs, Tensor? maybe_top_k_arr, int top_k_val) -> ()",
    reference=_top_k,
    source=_RENORM,
    library="sgl_kernel",
    arguments=_top_k_arguments,
    refuses={
        "probs has to be [rows": lambda draw: _refused(draw, 2, dims=3),
        "probs has to be contiguous": lambda draw: _refused(draw, 2),
    },
)
def top_k_renorm_probs(probs: Tensor, renorm_probs: Tensor, maybe_top_k_arr: Tensor | None, top_k_val: int) -> None:
    """The `k` largest of each row, scaled to a sum of one; the others 0.

    Args:
        probs: float32 `[rows, vocabulary]`, contiguous. renorm_probs: like `probs`. WRITTEN.
        maybe_top_k_arr: int32 `[rows]`, instead of `top_k_val`. Among equals the kernel keeps more than `k`.
    """
    _check_renorm(probs)


def _top_p(probs: Tensor, renorm_probs: Tensor, maybe_top_p_arr: Tensor | None, top_p_val: float) -> None:
    values, order = _sorted(probs)
    p = top_p_val if maybe_top_p_arr is None else maybe_top_p_arr[:, None]
    kept = values.cumsum(-1) - values < p
    kept[:, 0] = True
    _renormalise(renorm_probs, values, order, kept)


def _top_p_arguments(draw: Draw) -> Call:
    given, p = draw.flag(), draw.choice(0.5, 1.0)
    probs, into = _probs(draw)
    ps = draw.floats(len(probs), dtype=torch.float32, layout="contiguous").sigmoid() if given else None
    return (probs, into, ps, p), {}


@fake_kernel(
    "sgl_kernel::top_p_renorm_probs(Tensor probs, Tensor! renorm_probs, Tensor? maybe_top_p_arr, "
    "float top_p_val) -> ()",
    reference=_top_p,
    source=_RENORM,
    library="sgl_kernel",
    arguments=_top_p_arguments,
    refuses={
        "probs has to be [rows": lambda draw: _refused(draw, 0.5, dims=3),
        "probs has to be contiguous": lambda draw: _refused(draw, 0.5),
    },
)
def top_p_renorm_probs(probs: Tensor, renorm_probs: Tensor, maybe_top_p_arr: Tensor | None, top_p_val: float) -> None:
    """The largest of each row that reach `top_p` together, scaled to a sum of one; the others 0. WRITES `renorm_probs`.

    Args:
        probs: float32 `[rows, vocabulary]`, contiguous. maybe_top_p_arr: float32 `[rows]`, instead of `top_p_val`.
    """
    _check_renorm(probs)


def _bitmask(logits: Tensor, bitmask: Tensor, indices: Tensor | None = None) -> None:
    if not 1 <= logits.dim() <= 2 or not 1 <= bitmask.dim() <= 2 or bitmask.dtype != torch.int32:
        raise ValueError("logits and their mask, 32 tokens per number")
    if not logits.is_contiguous() or not bitmask.is_contiguous():
        raise ValueError("both contiguous")
    rows, masks = (t.view(-1, t.shape[-1]) if t.dim() == 2 else t[None] for t in (logits, bitmask))
    if -(-rows.shape[1] // 32) < masks.shape[1] or (indices is None and len(rows) != len(masks)):
        raise ValueError("a mask that is no longer than the logits, one for every row")
    if indices is not None and (indices.dim() != 1 or indices.dtype != torch.int32):
        raise ValueError("rows as a list of int32")
    bits = (masks[..., None] >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1
    allowed = bits.view(len(masks), 32 * masks.shape[1])[:, : rows.shape[1]].bool()
    reached = rows[:, : allowed.shape[1]]
    which = torch.arange(len(rows), device=rows.device) if indices is None else indices.long()
    reached[which] = reached[which].masked_fill(~allowed[which], float("-inf"))


def _bitmask_arguments(draw: Draw) -> Call:
    dtype, flat, indexed, shorter = (
        draw.choice(*FLOATS),
        draw.choice(False, False, True),
        draw.flag(),
        draw.choice(0, 1),
    )
    rows, words, beyond = draw.size(least=1), draw.size(least=2), draw.choice(0, 5, 31)
    vocabulary = 32 * words - beyond
    logits = draw.floats(*(() if flat else (rows,)), vocabulary, dtype=dtype, layout="contiguous")
    shape = (words - shorter,) if flat else (rows, words - shorter)
    masks = draw.integers(*shape, low=-(2**31), high=2**31, dtype=torch.int32, layout="contiguous")
    chosen = draw.permutation(rows, dtype=torch.int32)[: (rows + 1) // 2] if indexed and not flat else None
    return (logits, masks), {"indices": chosen}


def _masked(draw: Draw, rows: int = 3, masks: int = 3, words: int = 2, dtype: torch.dtype = torch.int32) -> Call:
    logits = draw.floats(rows, 40, dtype=torch.float32, layout="contiguous")
    return (logits, draw.integers(masks, words, low=0, high=9, dtype=dtype, layout="contiguous")), {}


@fake_kernel(
    "sgl_kernel::apply_token_bitmask_inplace_cuda(Tensor logits, Tensor bitmask, Tensor? indices=None) -> ()",
    reference=_bitmask,
    source="sgl-project/sglang sgl-kernel/csrc/grammar/apply_token_bitmask_inplace_cuda.cu",
    library="sgl_kernel",
    arguments=_bitmask_arguments,
    refuses={
        "logits has to have 1 or 2 dimensions": lambda draw: (
            (draw.floats(2, 3, 40, dtype=torch.float32, layout="contiguous"), _masked(draw)[0][1]),
            {},
        ),
        "have to be contiguous": lambda draw: (
            (draw.floats(3, 40, dtype=torch.float32, layout="transposed"), _masked(draw)[0][1]),
            {},
        ),
        "bitmask has to be int32": lambda draw: _masked(draw, dtype=torch.int64),
        "longer than logits": lambda draw: _masked(draw, words=3),
        "as many rows": lambda draw: _masked(draw, masks=2),
        "indices has to be a list of int32": lambda draw: (_masked(draw)[0], {"indices": draw.permutation(3)}),
    },
    writes=("logits",),
)
def apply_token_bitmask_inplace_cuda(logits: Tensor, bitmask: Tensor, indices: Tensor | None = None) -> None:
    """`-inf` in `logits` wherever the bit of the token is 0. Tokens beyond the mask stay as they are.

    Args:
        logits: `[rows, vocabulary]` or `[vocabulary]`, contiguous, float32, float16 or bfloat16. WRITTEN.
        bitmask: int32 `[rows, words]` or `[words]`, contiguous, 32 tokens per word, the lowest bit first; no more words
            than the vocabulary has.
        indices: int32 `[count]`: only these rows, of both.
    """
    for name, tensor in (("logits", logits), ("bitmask", bitmask)):
        dims = tensor.dim()
        torch._check(dims in (1, 2), lambda name=name, dims=dims: f"{name} has to have 1 or 2 dimensions, not {dims}")
    torch._check(bitmask.dtype == torch.int32, lambda: f"bitmask has to be int32, not {bitmask.dtype}")
    torch._check(logits.is_contiguous() and bitmask.is_contiguous(), lambda: "logits and bitmask have to be contiguous")
    torch._check(
        (logits.shape[-1] + 31) // 32 >= bitmask.shape[-1],
        lambda: f"bitmask is longer than logits: {bitmask.shape[-1]} words for {logits.shape[-1]} tokens",
    )
    rows = [tensor.shape[0] if tensor.dim() == 2 else 1 for tensor in (logits, bitmask)]
    if indices is None:
        torch._check(rows[0] == rows[1], lambda: f"logits and bitmask have to have as many rows, not {rows}")
    else:
        torch._check(
            indices.dim() == 1 and indices.dtype == torch.int32,
            lambda: f"indices has to be a list of int32, not {indices.dtype} {list(indices.shape)}",
        )


KERNELS = (top_k_renorm_probs, top_p_renorm_probs, apply_token_bitmask_inplace_cuda)
