"""What a fake kernel does besides computing shapes: asks the device runtime, reads data, hands back its inputs.

The call is made under `FakeTensorMode` with tensors that claim to be on the real device, as while compiling, and
watched by a profile function: every call, made below the kernel's frame, into the module `torch.<device>` or into its
C extension counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from fake_kernels.audit.adapter import data_dependent_errors, is_device_module
from fake_kernels.audit.attempt import attempt
from fake_kernels.audit.findings import Confidence, Finding, stable
from fake_kernels.audit.kernels import PythonKernel
from fake_kernels.audit.samples import Sample, kind_of
from fake_kernels.audit.search import Found
from fake_kernels.audit.target import Target, results_of, shares_storage

_INTERNAL = (NameError, AttributeError, TypeError, ZeroDivisionError)


class Watch:
    """Context manager: while it is open, `calls` collects calls into the device runtime made by the kernel, and
    `returned` what the kernel itself returned."""

    def __init__(self, kernel: PythonKernel | None) -> None:
        self.code = kernel.function.__code__ if kernel else None
        self.calls: dict[str, None] = {}
        self.returned: list[Any] = []
        self._inside = 0

    def __enter__(self) -> Watch:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        if frame.f_code is self.code:
            if event == "call":
                self._inside += 1
            elif event == "return":
                self._inside -= 1
                self.returned.append(arg)
        if not self._inside:
            return
        if event == "c_call" and not self._below_torch(frame):
            module = getattr(arg, "__module__", None) or getattr(getattr(arg, "__self__", None), "__name__", "")
            if isinstance(module, str) and module.endswith("._C") and not module.startswith("torch."):
                self.calls[f"{module}.{arg.__name__}"] = None
        elif event == "call" and frame.f_code is not self.code:
            module = frame.f_globals.get("__name__", "")
            if is_device_module(module) and not self._below_torch(frame.f_back):
                self.calls[f"{module}.{frame.f_code.co_qualname}"] = None

    def _below_torch(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self.code:
            if _from_torch(frame):
                return True
            frame = frame.f_back
        return False


def probe_effects(target: Target, sample: Sample) -> Iterator[Finding]:
    """Findings of the rules touches-hardware, reads-data, fake-tensor-fails, result-count, result-kind and the alias
    rules."""
    failed: Exception | None = None
    result = args = kwargs = None
    with Watch(target.kernel) as watch:
        try:
            args, kwargs, result = target.call_faked(sample)
        except Exception as error:
            failed = error
    yield from _touches(target, watch, sample)
    if isinstance(failed, data_dependent_errors()):
        yield target.finding("reads-data", f"{type(failed).__name__}: {stable(str(failed))}", sample)
    elif failed is not None and not watch.calls:
        yield target.finding("fake-tensor-fails", f"{type(failed).__name__}: {stable(str(failed))}", sample)
    elif failed is None and args is not None and kwargs is not None:
        yield from check_results(target, result, sample)
        yield from _aliases(target, args, kwargs, result, sample)


def probe_refused(target: Target, found: Found) -> Iterator[Finding]:
    """For an operator none of whose generated calls was accepted: what the refused call that came furthest shows."""
    if found.reads is not None and not found.accepted:
        error = found.reads.error
        line = found.reads.reached[-1]
        yield target.finding(
            "reads-data", f"{type(error).__name__}: {stable(str(error))}", found.reads.sample, line=line
        )
    if found.furthest is None or found.accepted:
        return
    with Watch(target.kernel) as watch:
        attempt(target.overload, found.furthest.sample, target.kernel)
    yield from _touches(target, watch, found.furthest.sample)
    error = found.furthest.error
    if isinstance(error, _INTERNAL) and found.furthest.reached and found.reads is None:
        text = f"no generated call gets past {type(error).__name__}: {stable(str(error))}"
        line = found.furthest.reached[-1]
        yield target.finding("python-error", text, found.furthest.sample, confidence=Confidence.LIKELY, line=line)
    if found.unfit is None:
        return
    with Watch(target.kernel) as watch:
        again = attempt(target.overload, found.unfit.sample, target.kernel)
    if again.error is not None and watch.returned and watch.returned[-1] is not None:
        yield from check_results(target, watch.returned[-1], found.unfit.sample)


def check_results(target: Target, result: Any, sample: Sample) -> Iterator[Finding]:
    """Findings of the rules result-count and result-kind: what was returned, against the schema."""
    returns = target.schema.returns
    got = results_of(target.schema, result)
    if len(returns) == 1 and isinstance(result, tuple) and not kind_of(returns[0])[0].endswith("[]"):
        got = list(result)
    if len(returns) > 1 and not isinstance(result, tuple | list):
        yield target.finding(
            "result-count", f"returns one {_kind(result)}; the schema has {len(returns)} results", sample
        )
        return
    if len(got) != len(returns):
        yield target.finding("result-count", f"returns {len(got)} results; the schema has {len(returns)}", sample)
        return
    for index, (returned, value) in enumerate(zip(returns, got, strict=True)):
        kind, _ = kind_of(returned)
        if not _fits(kind, value):
            yield target.finding("result-kind", f"result {index} is {_kind(value)}; the schema says {kind}", sample)


def _fits(kind: str, value: Any) -> bool:
    if kind == "Tensor":
        return value is None or isinstance(
            value, torch.Tensor
        )  # None is an undefined tensor, as backward operators give
    if kind.endswith("[]"):
        return isinstance(value, list | tuple)
    if kind == "bool":
        return isinstance(value, bool | torch.SymBool)
    if kind == "int":
        return isinstance(value, int | torch.SymInt)
    if kind in ("float", "Scalar"):
        return isinstance(value, int | float | torch.SymInt | torch.SymFloat)
    return True


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "Tensor"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def _touches(target: Target, watch: Watch, sample: Sample) -> Iterator[Finding]:
    if watch.calls:
        init = any(name.rpartition(".")[2].endswith("_init") for name in watch.calls)
        what = "initialises the device: " if init else ""
        yield target.finding("touches-hardware", f"{what}calls {', '.join(watch.calls)}", sample)


def _aliases(target: Target, args: list[Any], kwargs: dict[str, Any], result: Any, sample: Sample) -> Iterator[Finding]:
    given = {a.name: v for a, v in zip(target.schema.arguments, args, strict=False)} | kwargs
    inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    for index, (returned, value) in enumerate(
        zip(target.schema.returns, results_of(target.schema, result), strict=False)
    ):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            continue
        same = [name for name, tensor in inputs.items() if shares_storage(tensor, value)]
        info = returned.alias_info
        if info is None and same:
            yield target.finding("undeclared-alias", f"result {index} shares the storage of `{same[0]}`", sample)
        elif info is not None and info.is_write and not same:
            declared = [
                a.name
                for a in target.schema.arguments
                if a.alias_info is not None and a.alias_info.before_set == info.before_set
            ]
            if any(name in inputs for name in declared):
                yield target.finding(
                    "dropped-alias", f"result {index} is a fresh tensor; the schema says it is `{declared[0]}`", sample
                )


def not_probed(target: Target, found: Found) -> Finding:
    """The finding for an operator that accepted nothing: with the last word of the call that came furthest."""
    furthest = found.furthest
    if furthest is None or furthest.error is None:
        return target.finding("not-probed", f"no call could be generated; {found.tries} tries")
    line = furthest.reached[-1] if furthest.reached else 0
    return target.finding(
        "not-probed",
        f"{found.tries} generated calls were refused; the one that came furthest: "
        f"{type(furthest.error).__name__}: {stable(str(furthest.error))}",
        furthest.sample,
        confidence=Confidence.SHOWN,
        line=line,
    )


def _from_torch(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "torch" or name.startswith("torch.")
