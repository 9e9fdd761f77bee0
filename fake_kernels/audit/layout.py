"""Strides and dtypes of results, for inputs that are not contiguous or not of one dtype.

Here the fake kernel alone cannot be called wrong: `empty_like` is right for a kernel that keeps its input's strides,
and wrong for one that allocates. So these findings are questions, put only where the answer makes a difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from fake_kernels.audit.attempt import Attempt, attempt
from fake_kernels.audit.findings import Confidence, Finding, stable
from fake_kernels.audit.samples import Sample, Spec, tensors, with_one
from fake_kernels.audit.target import Target, result_tensors, shares_storage

_FACTOR = re.compile(r"gamma|beta|bias|scale|weight|cos|sin|probs|r1|r2")  # what multiplies or shifts the data
_INTERNAL = (NameError, AttributeError, TypeError, KeyError, ZeroDivisionError, IndexError)


def probe_strides(target: Target, base: Attempt) -> Iterator[Finding]:
    """Findings of the rule permuted-strides: one for the operator, naming results and arguments."""
    if any(returned.alias_info is not None for returned in target.schema.returns):
        return
    kept: dict[int, list[str]] = {}
    shown: Sample | None = None
    for name, spec in tensors(base.sample):
        if len(spec.shape) < 2 or min(spec.shape[-2:]) < 2:
            continue
        rank = len(spec.shape)
        order = (*range(rank - 2), rank - 1, rank - 2)
        sample = with_one(base.sample, name, order=order)
        tried = attempt(target.overload, sample, target.kernel)
        if tried.error is not None:
            continue
        before = result_tensors(target.schema, base.result)
        for index, tensor in enumerate(result_tensors(target.schema, tried.result)):
            if any(shares_storage(tensor, given) for given in tried.inputs):
                continue
            if index < len(before) and before[index].is_contiguous() and not tensor.is_contiguous():
                kept.setdefault(index, []).append(name)
                shown = shown or sample
    if shown is not None:
        text = "; ".join(f"result {i} keeps those of {', '.join(f'`{n}`' for n in names)}" for i, names in kept.items())
        yield target.finding(
            "permuted-strides",
            f"with a transposed input, {text}. Only the kernel can tell whether it does so too",
            shown,
            confidence=Confidence.ASK_KERNEL,
        )


def probe_dtypes(target: Target, base: Attempt) -> Iterator[Finding]:
    """Findings of the rules mixed-dtype and python-error: each floating argument but the first, in another dtype;
    the former only for arguments that scale or shift the data, by name."""
    floating = [
        (name, spec)
        for name, spec in tensors(base.sample)
        if spec.dtype in (torch.float16, torch.bfloat16, torch.float32)
    ]
    before = result_tensors(target.schema, base.result)
    for name, spec in floating[1:]:
        other = torch.float16 if spec.dtype == torch.float32 else torch.float32
        if other == floating[0][1].dtype:
            continue
        sample = with_one(base.sample, name, dtype=other)
        tried = attempt(target.overload, sample, target.kernel)
        if tried.error is not None:
            if isinstance(tried.error, _INTERNAL) and tried.reached:
                text = f"with `{name}` in {other}: {type(tried.error).__name__}: {stable(str(tried.error))}"
                yield target.finding("python-error", text, sample, line=tried.reached[-1])
            continue
        after = result_tensors(target.schema, tried.result)
        for index, (old, new) in enumerate(zip(before, after, strict=False)):
            if new.dtype == other != old.dtype and _FACTOR.search(name) and not _gradient_like(new, spec):
                yield target.finding(
                    "mixed-dtype",
                    f"result {index} takes the dtype of `{name}` ({other}), not of `{floating[0][0]}`. Only the kernel "
                    "can tell whether it does so too",
                    sample,
                    confidence=Confidence.ASK_KERNEL,
                )


def _gradient_like(result: torch.Tensor, spec: Spec) -> bool:
    return tuple(result.shape) == spec.shape  # the gradient, or the updated value, of that argument
