"""Does the backward of an operator trace? Only where it has an autograd kernel; by running it on meta tensors.

The autograd kernel of a PrivateUse1 device is called by its dispatch key: it records the same graph for meta tensors
as for the device's, and autograd, running it, asks no driver for a stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from fake_kernels.audit.adapter import call_with_autograd, has_kernel
from fake_kernels.audit.findings import Confidence, Finding, stable
from fake_kernels.audit.samples import Sample, Spec, bind, on_meta
from fake_kernels.audit.target import Target, result_tensors

_NO_FAKE = re.compile(r"^(\S+): attempted to run this operator with Meta tensors")


def has_autograd(name: str) -> bool:
    """Whether the operator has an autograd kernel of its own."""
    return any(has_kernel(name, key) for key in ("AutogradPrivateUse1", "Autograd"))


def probe_backward(target: Target, sample: Sample) -> Iterator[Finding]:
    """Findings of the rule backward-fails: the forward has worked with this call."""

    def make(spec: Spec) -> Any:
        return on_meta(spec).requires_grad_(spec.dtype.is_floating_point and spec.dtype.itemsize > 1)

    args, kwargs = bind(target.schema, sample, make)
    inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and value.requires_grad]
    if not inputs:
        return
    try:
        result = call_with_autograd(target.overload, args, kwargs)
    except Exception as error:
        yield from _judge(target, error, "the forward, with requires_grad", sample)
        return
    for index, tensor in enumerate(result_tensors(target.schema, result)):
        if not tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        try:
            torch.autograd.grad(tensor, inputs, torch.empty_like(tensor), allow_unused=True, retain_graph=True)
        except Exception as error:
            yield from _judge(target, error, f"for result {index}", sample)
            return


def _judge(target: Target, error: Exception, where: str, sample: Sample) -> Iterator[Finding]:
    """What fails in the dispatcher or in Python is a fake kernel's; what C++ refuses is refused on the device too."""
    missing = _NO_FAKE.match(str(error))
    if missing:
        yield target.finding("backward-fails", f"{where}: {missing[1]} has no fake kernel", sample)
        return
    text = f"{where}: {type(error).__name__}: {stable(str(error))}"
    if "returned an invalid gradient" in str(error):
        text += ". The call was generated: a kernel may refuse it"
        yield target.finding("backward-fails", text, sample, confidence=Confidence.ASK_KERNEL)
    elif isinstance(error, TypeError) or _in_python(error, target):
        yield target.finding("backward-fails", text, sample)


def _in_python(error: Exception, target: Target) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if target.kernel is not None and trace.tb_frame.f_code.co_filename == target.kernel.file:
            return True
        trace = trace.tb_next
    return False
