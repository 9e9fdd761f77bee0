"""Ascend's top-k and top-p filters, with and without the sampling step.

The rule: a filter keeps at least one token in every row, and what it removes becomes `-inf` (0 where the input is
probabilities), so that a softmax over the result is the truncated distribution.

Sources: Ascend/op-plugin docs/context/torch_npu-npu_top_k_top_p.md and op_plugin/ops/opapi (the file that defines
npu_top_k_top_p_sample), cann/ops-nn aclnn_apply_top_k_top_p.cpp for the first operator's checks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_INF = float("-inf")


def _top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    if logits.dim() != 2 or any(t is not None and t.shape != logits.shape[:1] for t in (p, k)):
        raise ValueError("logits [batch, vocabulary] with one p and one k per row")
    if p is not None and p.dtype != logits.dtype:
        raise ValueError("p of another dtype than logits")
    values, order = logits.float().sort(dim=-1, stable=True)  # ascending
    if logits.shape[1] < 2:
        return logits.clone(memory_format=torch.contiguous_format)  # nothing to remove: the kernel copies
    if k is not None:
        threshold = values.gather(1, (values.shape[1] - k.long()).clamp(min=0)[:, None])
        values = values.masked_fill(values < threshold, _INF)
    if p is not None:
        below = values.softmax(-1).cumsum(-1) <= 1 - p.float()[:, None]
        below[:, -1] = False
        values = values.masked_fill(below, _INF)
    return torch.empty_like(values).scatter_(1, order, values).to(logits.dtype).contiguous()


def _top_k_top_p_arguments(draw: Draw) -> Call:
    dtype, number = draw.choice(*FLOATS), draw.choice(torch.int32, torch.int64)
    with_p, with_k = draw.choice((True, True), (True, False), (False, True))
    batch, vocabulary = draw.size(), draw.size(least=1, times=3)
    logits = draw.floats(batch, vocabulary, dtype=dtype)
    p = draw.placed(draw.floats(batch, dtype=torch.float32, layout="contiguous").sigmoid().to(dtype))
    k = draw.integers(batch, low=1, high=vocabulary + 1, dtype=number)
    return (logits, p if with_p else None), {"k": k if with_k else None}


@fake_kernel(
    "npu::npu_top_k_top_p(Tensor logits, Tensor? p=None, Tensor? k=None) -> Tensor",
    reference=_top_k_top_p,
    source="cann/ops-nn aclnn_apply_top_k_top_p.cpp; Ascend/op-plugin docs/context/torch_npu-npu_top_k_top_p.md",
    library="torch_npu",
    arguments=_top_k_top_p_arguments,
    refuses={
        "logits has to have 2 dimensions": lambda draw: ((draw.floats(2, 3, 4, dtype=torch.float32),), {}),
        "one p per row": lambda draw: ((draw.floats(2, 3, dtype=torch.float32), torch.rand(3, device=draw.device)), {}),
        "one k per row": lambda draw: (
            (draw.floats(2, 3, dtype=torch.float32),),
            {"k": torch.ones(2, 1, dtype=torch.int32, device=draw.device)},
        ),
        "p has to be of the dtype of logits": lambda draw: (
            (draw.floats(2, 3, dtype=torch.float16), torch.rand(2, device=draw.device)),
            {},
        ),
    },
)
def top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """`logits` `[batch, vocabulary]`, with what top-k, and then top-p, remove set to `-inf`.

    Args:
        logits: float32, float16 or bfloat16.
        p: `[batch]`, of the dtype of `logits`, in [0, 1].
        k: `[batch]`, int32 or int64, from 1 to `vocabulary`.

    Returns a new tensor of shape and dtype of `logits`. Contiguous: the entry in op-plugin's list of structured
    operators was not read, and all of those allocate with `apply_tensor_without_format`. CANN's kernel of 2025 refuses
    a missing `p` or `k`; the schema and newer ones allow it.
    """
    torch._check(logits.dim() == 2, lambda: f"logits has to have 2 dimensions, not {logits.dim()}")
    for name, tensor in (("p", p), ("k", k)):
        if tensor is not None:
            torch._check(
                tensor.dim() == 1 and tensor.shape[0] == logits.shape[0],
                lambda name=name, tensor=tensor: (
                    f"one {name} per row of logits {list(logits.shape)} is expected, not {list(tensor.shape)}"
                ),
            )
    torch._check(p is None or p.dtype == logits.dtype, lambda: "p has to be of the dtype of logits")
    return logits.new_empty(logits.shape)


def _top_k_top_p_sample(
    logits: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    q: Tensor | None = None,
    eps: float | None = 1e-8,
    is_need_logits: bool | None = False,
    top_k_guess: int | None = 32,
    min_ps: Tensor | None = None,
    ks_max: int | None = 1024,
    input_is_logits: bool | None = True,
    post_sample: str | None = "qSample",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    if logits.dim() != 2:
        raise ValueError("logits are [batch, vocabulary]")
    batch, vocabulary = logits.shape
    are_logits = input_is_logits is None or input_is_logits
    given, k, p = logits.float(), top_k.view(batch, 1), top_p.float().view(batch, 1)
    filters_k = (k >= 1) & (k <= min(vocabulary, ks_max or 1024, 1024))
    place = torch.arange(vocabulary, device=logits.device)
    order = given.argsort(dim=-1, descending=True, stable=True)
    order = torch.where(filters_k | (p < 1), order, place)  # unsorted where nothing is filtered
    values = given.gather(1, order)
    kept = ~filters_k | (place < k)
    probabilities = values.masked_fill(~kept, _INF).softmax(-1) if are_logits else values * kept
    before = probabilities.cumsum(-1) - probabilities
    kept = kept & ((p >= 1) | torch.where(p <= 0, place < 1, before <= p))
    probabilities = probabilities * kept
    if min_ps is not None:
        least = probabilities.amax(-1, keepdim=True) * min_ps.float().view(batch, 1).clamp(0, 1)
        kept = kept & (probabilities >= least)
        probabilities = probabilities * kept
    if post_sample == "multiNomial":
        chosen = torch.multinomial(probabilities, 1, generator=generator)
    elif post_sample == "qSample" and q is not None:
        noise = q.float().gather(1, (kept.cumsum(-1) - 1).clamp(min=0))
        chosen = (probabilities / (noise.abs() + (1e-8 if eps is None else eps))).argmax(-1, keepdim=True)
    else:
        chosen = probabilities.argmax(-1, keepdim=True)
    selected = torch.full_like(given, _INF if are_logits else 0.0, memory_format=torch.contiguous_format)
    if is_need_logits:  # not filled by the kernel otherwise
        selected.scatter_(1, order, values.masked_fill(~kept, _INF if are_logits else 0.0))
    return order.gather(1, chosen)[:, 0].contiguous(), selected


def _sample_arguments(draw: Draw) -> Call:
    dtype = draw.choice(torch.float16, torch.bfloat16, torch.float32)
    options = {
        "is_need_logits": draw.flag(),
        "top_k_guess": draw.choice(32, 0),
        "ks_max": draw.choice(1024, 8),
        "input_is_logits": draw.choice(True, False),
        "post_sample": draw.choice("qSample", "multiNomial", "None"),
    }
    with_q, with_min_p = draw.flag() and options["post_sample"] == "qSample", draw.flag()
    batch, vocabulary = draw.size(least=1), draw.size(least=1, times=3)

    def unit(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw.placed(draw.floats(*shape, dtype=torch.float32, layout="contiguous").sigmoid().to(dtype))

    logits = draw.floats(batch, vocabulary, dtype=dtype)
    if not options["input_is_logits"]:
        logits = draw.placed(logits.float().softmax(-1).to(dtype))
    top_k = draw.integers(batch, low=0, high=vocabulary + 2, dtype=torch.int32)
    q = unit(batch, vocabulary, dtype=torch.float32) if with_q else None
    return (logits, top_k, unit(batch), q), {**options, "min_ps": unit(batch) if with_min_p else None}


@fake_kernel(
    "npu::npu_top_k_top_p_sample(Tensor logits, Tensor top_k, Tensor top_p, Tensor? q=None, float? eps=1e-08, "
    "bool? is_need_logits=False, int? top_k_guess=32, Tensor? min_ps=None, int? ks_max=1024, "
    'bool? input_is_logits=True, str? post_sample="qSample", Generator? generator=None) -> (Tensor, Tensor)',
    reference=_top_k_top_p_sample,
    source="Ascend/op-plugin op_plugin/ops/opapi (npu_top_k_top_p_sample), its test and its document",
    library="torch_npu",
    arguments=_sample_arguments,
    refuses={
        "logits has to have 2 dimensions": lambda draw: (
            (draw.floats(3, dtype=torch.float16), torch.ones(3, device=draw.device), torch.ones(3, device=draw.device)),
            {},
        )
    },
)
def top_k_top_p_sample(
    logits: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    q: Tensor | None = None,
    eps: float | None = 1e-8,
    is_need_logits: bool | None = False,
    top_k_guess: int | None = 32,
    min_ps: Tensor | None = None,
    ks_max: int | None = 1024,
    input_is_logits: bool | None = True,
    post_sample: str | None = "qSample",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row of `logits` `[batch, vocabulary]`, after top-k, top-p and min-p.

    Returns the token, int64 `[batch]` for every `post_sample`, and the filtered logits, float32 `[batch, vocabulary]`,
    which are allocated always and filled only with `is_need_logits`. Both contiguous. `"multiNomial"` reads its result
    back to the host, so that it cannot be captured in a graph of the device.
    """
    torch._check(logits.dim() == 2, lambda: f"logits has to have 2 dimensions, not {logits.dim()}")
    return logits.new_empty(logits.shape[:1], dtype=torch.int64), logits.new_empty(logits.shape, dtype=torch.float32)


KERNELS = (top_k_top_p, top_k_top_p_sample)
