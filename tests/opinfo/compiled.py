"""The same under torch.compile. The rule: compiled on the device has to equal the CPU's eager result; where it does
not, the same is compiled for the CPU, and what fails there too is torch's and counted apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._inductor.config
from torch.testing._internal import common_methods_invocations

from opinfo import eager, modules
from opinfo.cases import Case, infos
from opinfo.compare import differences
from opinfo.eager import Call
from opinfo.results import Result

_TOLERANCE = (1e-4, 1e-4)  # of results around 1 in float32: a decomposition or a loop sums in its own order


def run(case: Case, device: str) -> Result:
    """All samples of an OpInfo or a module with one compiler."""
    result, backend = Result(case), case.stage.removesuffix("_backward")
    strict = dataclasses.replace(eager.strictness(case), layout=False, tolerance=_TOLERANCE)
    with (
        mock.patch.object(common_methods_invocations, "wrapper_set_seed", _seeded_already),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True, allow_rnn=True),
        torch._inductor.config.patch(compile_threads=1, fallback_random=True),
    ):
        for position, plain, compiled in _pairs(case, backend):
            want = plain.observed("cpu")
            verdict = differences(want, _fresh(compiled, device), plain.goes_to(device), strict)
            if verdict.problems:
                on_cpu = differences(want, _fresh(compiled, "cpu"), "cpu", strict)
                if on_cpu.problems:
                    result.add_cpu_failure(position, on_cpu)
                    continue
            result.add(position, verdict)
    return result


def _seeded_already(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Random OpInfos seed torch around the operator, which no compiler can trace; every call here is seeded anyway."""
    return op(*args, **kwargs)


def _fresh(call: Call, device: str) -> Any:
    torch._dynamo.reset()
    return call.observed(device)


def _pairs(case: Case, backend: str) -> Iterator[tuple[int, Call, Call]]:
    """For each sample the eager call and the compiled one."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    if case.suite == "module":
        pairs = zip(modules.calls(case, lambda module: module), modules.calls(case, compiled), strict=True)
        yield from ((position, plain, call) for (position, plain), (_, call) in pairs)
        return
    info = infos("op")[case.name]
    stage = eager.backward if case.stage.endswith("backward") else eager.forward
    for position, sample in eager.samples(case):
        yield position, stage(info.op, info, sample), stage(compiled(info.op), info, sample)
