"""One operator under audit, and how findings on it are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fake_kernels.audit.adapter import fake_mode, fake_tensor, traced_device, tracing
from fake_kernels.audit.findings import Confidence, Finding
from fake_kernels.audit.kernels import PythonKernel
from fake_kernels.audit.samples import Sample, Spec, bind, render


@dataclass(frozen=True)
class Target:
    """An overload, and its fake kernel where that is written in Python."""

    name: str
    overload: Any
    kernel: PythonKernel | None

    @property
    def schema(self) -> Any:
        """The operator's schema."""
        return self.overload._schema

    def finding(
        self,
        rule: str,
        message: str,
        sample: Sample | None = None,
        *,
        confidence: str = Confidence.SHOWN,
        line: int = 0,
    ) -> Finding:
        """A finding on this operator, with the call that shows it."""
        evidence = "" if sample is None else render(self.name, self.schema, sample)
        file = self.kernel.short_file if self.kernel else ""
        return Finding(
            self.name, rule, message, str(confidence), evidence, file, line or (self.kernel.line if self.kernel else 0)
        )

    def call_faked(self, sample: Sample) -> tuple[list[Any], dict[str, Any], Any]:
        """Makes the call with fake tensors on the device that a compiled program would use; arguments and result."""
        mode, device = fake_mode(), traced_device()

        def make(spec: Spec) -> Any:
            return fake_tensor(mode, spec.shape, spec.strides(), spec.dtype, device)

        args, kwargs = bind(self.schema, sample, make)
        with tracing(mode):
            return args, kwargs, self.overload(*args, **kwargs)


def results_of(schema: Any, result: Any) -> list[Any]:
    """The results as a list with one entry for each return of the schema, as far as there are that many."""
    if len(schema.returns) == 0:
        return [] if result is None else [result]
    if len(schema.returns) == 1:
        return [result]
    return list(result) if isinstance(result, tuple | list) else [result]


def result_tensors(schema: Any, result: Any) -> list[torch.Tensor]:
    """Every tensor among the results, lists taken apart."""
    found: list[torch.Tensor] = []
    for one in results_of(schema, result):
        found.extend(t for t in (one if isinstance(one, list | tuple) else [one]) if isinstance(t, torch.Tensor))
    return found


def shares_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing through one may be seen through the other."""
    if one.layout != torch.strided or other.layout != torch.strided:
        return one is other
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
