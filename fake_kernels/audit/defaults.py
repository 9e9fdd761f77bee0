"""Does a default that differs from the schema's matter? Only where the fake kernel answers differently: it is asked
both ways.

A vendor may well write `dtype=1` where the schema has `None`, and mean the same by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fake_kernels.audit.findings import Confidence, Finding, stable
from fake_kernels.audit.samples import OMIT, Sample, made, on_meta
from fake_kernels.audit.search import Found
from fake_kernels.audit.signature import differing_defaults, parameter_names
from fake_kernels.audit.target import Target, result_tensors


def probe_defaults(target: Target, found: Found) -> Iterator[Finding]:
    """Findings of the rule differing-default: with the schema's value the kernel gives other results, or other
    errors."""
    if target.kernel is None:
        return
    for argument, parameter in differing_defaults(target.schema, target.kernel):
        says = (
            f"{target.kernel.name}: `{parameter.name}` has the default {parameter.default!r}; the schema says "
            f"{argument.name}={argument.default_value!r}"
        )
        if not found.accepted:
            yield target.finding("differing-default", says, confidence=Confidence.LIKELY)
            continue
        for tried in found.accepted:
            sample = {**tried.sample, argument.name: OMIT}
            seen = _answer(target, sample, {})
            meant = _answer(target, sample, {parameter.name: argument.default_value})
            if seen != meant and not isinstance(meant, str):
                yield target.finding("differing-default", f"{says}: {_words(seen)} instead of {_words(meant)}", sample)
                break


def _answer(target: Target, sample: Sample, extra: dict[str, Any]) -> str | list[tuple[Any, ...]]:
    """Sizes, strides and dtypes of what the kernel's own function returns; the error as text."""
    assert target.kernel is not None
    names = parameter_names(target.schema, target.kernel)
    given = {
        names[name]: made(value, on_meta)
        for name, value in sample.items()
        if name in names and not (isinstance(value, str) and value == OMIT)
    }
    try:
        result = target.kernel.function(**given, **extra)
    except Exception as error:
        return f"{type(error).__name__}: {stable(str(error))}"
    return [(tuple(t.shape), t.stride(), t.dtype) for t in result_tensors(target.schema, result)]


def _words(answer: str | list[tuple[Any, ...]]) -> str:
    return answer if isinstance(answer, str) else ", ".join(f"{shape} {dtype}" for shape, _, dtype in answer)
