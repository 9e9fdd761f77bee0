"""One call of an operator on meta tensors: what it gave, or how far into the kernel it came before it was refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fake_kernels.audit.adapter import fake_mode
from fake_kernels.audit.kernels import PythonKernel
from fake_kernels.audit.samples import Sample, bind, on_meta, tensors


@dataclass
class Attempt:
    """One call on meta tensors: `error` is None where it was accepted; `reached`: lines of the kernel's file,
    outermost first."""

    sample: Sample
    result: Any = None
    error: Exception | None = None
    reached: tuple[int, ...] = ()
    inputs: tuple[torch.Tensor, ...] = ()


def attempt(overload: Any, sample: Sample, kernel: PythonKernel | None) -> Attempt:
    """Makes the call."""
    args, kwargs = bind(overload._schema, sample, on_meta)
    inputs = tuple(value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor))
    try:
        if any(True for _ in tensors(sample)):
            return Attempt(sample, result=overload(*args, **kwargs), inputs=inputs)
        with fake_mode():  # nothing says "meta" here: the dispatcher would run the real kernel
            return Attempt(sample, result=overload(*args, **kwargs))
    except Exception as error:  # a refusal is what we came to see: it is recorded, not dropped
        return Attempt(sample, error=error, reached=_reached(error, kernel))


def _reached(error: Exception, kernel: PythonKernel | None) -> tuple[int, ...]:
    lines = []
    trace = error.__traceback__
    while trace is not None and kernel is not None:
        if trace.tb_frame.f_code.co_filename == kernel.file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return tuple(lines)
