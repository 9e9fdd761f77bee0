"""torch_musa's fused attention, which it adds to torch's own namespace: the flash and the math kernel, forward.

Of torch_musa's generations this is the one for torch 2.7: three results, no `return_debug_mask`. The flash kernel's
output is `[N, L, H, Ev]` in memory, seen as `[N, H, L, Ev]`: a fake that says contiguous makes compiled code read
transposed values. Three-dimensional calls have no batch. A two-dimensional mask is `[L, S]`, or `[N, S]` (which keys
there are) where it is not that.

Which values of the dropout mask mean "kept" is not in the open source (mudnn); the reference keeps where it is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

SOURCE = "MooreThreads/torch_musa torch_musa/csrc/aten/ops/attention/mudnn/SDP.cpp"
MASKS = ("none", "causal", "[L, S]", "[N, S]", "[1, L, S]", "[H, L, S]", "[N, 1, 1, S]", "[N, H, L, S]")


def scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, float]:
    """Reference: masked scores `[N, H, L, S]` in float32 of four-dimensional query and key, and their scale."""
    scale = scale if scale is not None else 1 / math.sqrt(max(query.shape[-1], 1))
    found = query.float() @ per_query_head(key, query).mT * scale
    mask = attn_mask
    if is_causal:
        mask = found.new_ones(found.shape[-2:], dtype=torch.bool).tril()
    elif mask is not None and mask.dim() == 2 and mask.shape != found.shape[-2:]:
        mask = mask[:, None, None]
    if mask is None:
        return found, scale
    if not (2 <= mask.dim() <= 4) or torch.broadcast_shapes(mask.shape, found.shape) != found.shape:
        raise ValueError(f"a mask {tuple(mask.shape)} for scores {tuple(found.shape)}")
    return (found.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else found + mask.float()), scale


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Reference: keys or values in float32, repeated for the query heads that share them."""
    return x.float().repeat_interleave(query.shape[1] // max(x.shape[1], 1), 1)


def batched(*tensors: Tensor) -> list[Tensor]:
    """Reference: each with a batch dimension."""
    return [tensor if tensor.dim() == 4 else tensor[None] for tensor in tensors]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if is_causal and attn_mask is not None:
        raise ValueError("a mask and is_causal")
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        raise ValueError("attention of tensors with other than 3 or 4 dimensions")
    q, k, v = batched(query, key, value)
    masked, _ = scores(q, k, attn_mask, is_causal, scale)
    weights = masked.softmax(-1)
    kept = torch.empty(0, dtype=torch.bool, device=query.device)
    if dropout_p > 0:
        kept = torch.rand_like(weights) >= dropout_p
    dropped = weights * kept / (1 - dropout_p) if dropout_p > 0 else weights
    return (dropped @ per_query_head(v, q)).to(query.dtype), masked.logsumexp(-1), weights.to(query.dtype), kept


def _squeezed(query: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t[0] if query.dim() == 3 and t.dim() > 1 else t for t in tensors)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    output, logsumexp, _, kept = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return _squeezed(query, output, logsumexp.contiguous(), kept.contiguous())


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    output, _, weights, kept = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return _squeezed(query, output.contiguous(), weights.contiguous(), kept.contiguous())


def draw_attention(draw: Draw) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, bool]:
    """Draws query, key, value, a mask and `is_causal`."""
    dtype, dims, kind, shared = draw.choice(*FLOATS), draw.choice(4, 3), draw.choice(*MASKS), draw.choice(1, 2)
    mask_dtype = draw.choice(torch.bool, dtype)
    n, h = draw.size() if dims == 4 else 1, draw.size(least=1)
    length, keys, width, value_width = draw.sizes(4, least=1)
    sizes = {"N": n, "H": h * shared, "L": length, "S": keys, "1": 1}
    mask = None
    if kind.startswith("["):
        shape = [sizes[name] for name in kind[1:-1].split(", ")]
        mask = draw.floats(*shape, dtype=torch.float32)
        mask = draw.placed(mask > -1 if mask_dtype == torch.bool else mask.to(mask_dtype))
        if mask.dtype == torch.bool:
            mask[..., :1] = True  # somewhere to look for each query
    batch = (n,) if dims == 4 else ()
    query = draw.floats(*batch, h * shared, length, width, dtype=dtype)
    key = draw.floats(*batch, h, keys, width, dtype=dtype)
    return (query, key, draw.floats(*batch, h, keys, value_width, dtype=dtype)), mask, kind == "causal"


def _arguments(draw: Draw) -> Call:
    dropout_p, scale = draw.choice(0.0, 0.5), draw.choice(None, 0.3)
    tensors, mask, is_causal = draw_attention(draw)
    return (*tensors, mask, dropout_p, is_causal), {} if scale is None else {"scale": scale}


def _with(*mask: int, is_causal: bool = False, dims: int = 4) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        x = draw.floats(*(2, 3, 4, 8)[4 - dims :] if dims < 5 else (1, 2, 3, 4, 8), dtype=torch.float16)
        return (x, x, x, draw.floats(*mask, dtype=torch.float16) if mask else None, 0.0, is_causal), {}

    return call


_REFUSES = {
    "should not be set when is_causal=True": _with(4, 4, is_causal=True),
    "2D attn_mask should be [L, S] or [N, S]": _with(3, 4),
    "3D attn_mask should be expandable to [H_q, L, S]": _with(2, 4, 4),
    "4D attn_mask should be expandable to [N, H_q, L, S]": _with(3, 3, 4, 4),
    "should be 2/3/4D": _with(4),
    "3 (no batch) or 4 dimensions": _with(dims=5),
}


def check_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    """The fakes' check of the mask, in the kernel's words."""
    if is_causal:
        torch._check(attn_mask is None, lambda: "Explicit attn_mask should not be set when is_causal=True")
    if attn_mask is None:
        return
    (heads, length), keys, shape = query.shape[-3:-1], key.shape[-2], attn_mask.shape
    n = query.shape[0] if query.dim() == 4 else 1
    seen = f"is {tuple(shape)}"
    torch._check(2 <= len(shape) <= 4, lambda: f"attn_mask should be 2/3/4D, and {seen}")
    if len(shape) == 2:
        fits = (shape[1] == keys) & ((shape[0] == length) | (shape[0] == n))
        torch._check(
            fits, lambda: f"a 2D attn_mask should be [L, S] or [N, S], here [{length} or {n}, {keys}], and {seen}"
        )
        return
    target = (n, heads, length, keys)[4 - len(shape) :]
    names = "[H_q, L, S]" if len(shape) == 3 else "[N, H_q, L, S]"
    for size, wanted in zip(shape, target, strict=True):
        torch._check(
            (size == 1) | (size == wanted),
            lambda: f"a {len(shape)}D attn_mask should be expandable to {names}, here {tuple(target)}, and {seen}",
        )


def _checked(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> tuple[tuple[int, ...], Tensor]:
    """`(N, H_q, L, S, Ev)`, and the dropout mask."""
    dims = query.dim(), key.dim(), value.dim()
    torch._check(
        dims in ((3, 3, 3), (4, 4, 4)),
        lambda: f"query, key and value should have 3 (no batch) or 4 dimensions, and have {dims}",
    )
    check_mask(query, key, attn_mask, is_causal)
    n = query.shape[0] if query.dim() == 4 else 1
    sizes = (n, *query.shape[-3:-1], key.shape[-2], value.shape[-1])
    return sizes, query.new_empty(sizes[:4] if dropout_p > 0.0 else (0,), dtype=torch.bool)


def _as_given(query: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.squeeze(0) if query.dim() == 3 and t.dim() > 1 else t for t in tensors)


@fake_kernel(
    "aten::_scaled_dot_product_attention_flash_musa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None) "
    "-> (Tensor output, Tensor logsumexp, Tensor dropout_mask)",
    reference=_flash,
    source=f"{SOURCE} (MuDNNFlashSDPAFwd, ParseMaskType)",
    library="torch_musa",
    arguments=_arguments,
    refuses=_REFUSES,
)
def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """`query` `[N, Hq, L, E]`, `key` `[N, H, S, E]`, `value` `[N, H, S, Ev]`, or all without N; any layout.

    Returns the output `[N, Hq, L, Ev]` of query's dtype, the transpose of a contiguous `[N, L, Hq, Ev]`; logsumexp
    `[N, Hq, L]`, float32; and the dropout mask, bool: `[0]`, or `[N, Hq, L, S]` if `dropout_p` is above zero.
    """
    (n, heads, length, _, width), dropped = _checked(query, key, value, attn_mask, dropout_p, is_causal)
    output = query.new_empty((n, length, heads, width)).transpose(1, 2)
    return _as_given(query, output, query.new_empty((n, heads, length), dtype=torch.float32), dropped)


@fake_kernel(
    "aten::_scaled_dot_product_attention_math_musa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None) "
    "-> (Tensor output, Tensor attn_weights, Tensor dropout_mask)",
    reference=_math,
    source=f"{SOURCE} (MuDNNMathSDPAFwd, MathCheckTensorShapes)",
    library="torch_musa",
    arguments=_arguments,
    refuses=_REFUSES,
)
def attention_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Inputs as of the flash kernel. Returns the output `[N, Hq, L, Ev]`, contiguous; the weights before dropout
    `[N, Hq, L, S]`, of query's dtype; and the dropout mask as the flash kernel."""
    (n, heads, length, keys, width), dropped = _checked(query, key, value, attn_mask, dropout_p, is_causal)
    output = query.new_empty((n, heads, length, width))
    return _as_given(query, output, query.new_empty((n, heads, length, keys)), dropped)


KERNELS = (flash, attention_math)
