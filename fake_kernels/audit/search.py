"""Finding calls that a fake kernel accepts: climbing by how far into the kernel a call gets.

A vendor's kernel refuses most calls with a chain of checks. Which line refused is in the traceback, so a call that gets
further is a better one; what to change next is in the message (it mostly names an argument), and which strings and
numbers are wanted is in the kernel's own constants. Tries are counted, not timed, and random choices are seeded by the
operator's name: the same kernel gives the same calls on every machine.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch

from fake_kernels.audit.attempt import Attempt, attempt
from fake_kernels.audit.kernels import PythonKernel
from fake_kernels.audit.samples import (
    OMIT,
    SIZES,
    Sample,
    Spec,
    first_sample,
    kind_of,
    plain_value,
    tensor_for,
    tensors,
    values_for,
    with_shape,
    with_tensors,
)
from fake_kernels.audit.signature import constants

_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
)
_FIRST_TRIES, _NEXT_TRIES, _MOST_SAMPLES = 1500, 40, 6
_BY_NAME = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*_DTYPES, torch.float8_e5m2, torch.float64, torch.int16, torch.uint32)
} | {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "half": torch.float16,
    "float": torch.float32,
}
_READ = re.compile(
    r"cannot be called on meta tensors|Cannot copy out of meta tensor|data-dependent|cannot extract|with meta storage"
    r"|Can't call numpy|meta tensor.*has no data",
    re.IGNORECASE,
)


@dataclass
class Found:
    """Accepted calls, and of the refused ones: which came furthest, the first that read data, and the first that failed
    outside of the kernel, where what it returned is taken over."""

    accepted: list[Attempt] = field(default_factory=list)
    furthest: Attempt | None = None
    tries: int = 0
    reads: Attempt | None = None
    unfit: Attempt | None = None


class Search:
    """The climb for one operator."""

    def __init__(self, overload: Any, kernel: PythonKernel | None) -> None:
        self.overload, self.kernel = overload, kernel
        self.arguments = {argument.name: argument for argument in overload._schema.arguments}
        self.strings, self.numbers = constants(kernel)
        self.random = random.Random(overload.name())
        self.found = Found()
        self.lines: set[tuple[str, int]] = set()
        self.asked: set[str] = set()  # the words of the last refusal

    def run(self) -> Found:
        """Up to six accepted calls, each reaching lines of the kernel that those before it did not."""
        start: Attempt | None = None
        for sample in self._starts():
            tried = self._try(sample)
            if tried.error is None:
                start = tried
                break
            if start is None or tried.reached > start.reached:
                start = tried
        if start is not None and start.error is not None:
            start = self._climb(start, _FIRST_TRIES, frozenset())
        if start is None or start.error is not None:
            return self.found
        self._keep(start)
        for changed, sample in self._variants(start.sample):
            if len(self.found.accepted) >= _MOST_SAMPLES:
                break
            tried = self._try(sample)
            if tried.error is not None and tried.reached:
                tried = self._climb(tried, _NEXT_TRIES, frozenset([changed]))
            if tried.error is None:
                self._keep(tried)
        return self.found

    def _starts(self) -> Iterator[Sample]:
        for rank in (2, 3, 4, 1, 5):
            yield first_sample(self.overload._schema, rank)
        everything = first_sample(self.overload._schema, 3)
        for name, argument in self.arguments.items():
            if everything[name] == OMIT and kind_of(argument)[0] in ("Tensor", "Tensor[]"):
                everything[name] = plain_value(argument, 3)
        yield everything
        for rank in (3, 4):
            same = Spec(SIZES[-rank:])
            yield with_tensors(first_sample(self.overload._schema, rank), partial(_always, same))

    def _variants(self, sample: Sample) -> Iterator[tuple[str, Sample]]:
        for name, argument in self.arguments.items():
            kind, _ = kind_of(argument)
            if kind in ("Tensor", "Tensor[]"):
                if sample[name] == OMIT or sample[name] is None:
                    for rank in (1, 2):
                        spec = tensor_for(name, rank)
                        yield name, {**sample, name: spec if kind == "Tensor" else [spec, spec]}
                continue
            for value in values_for(argument, self.strings, self.numbers)[:10]:
                if value != sample[name]:
                    yield name, {**sample, name: value}
        for rank in (3, 4, 2):
            for name, spec in tensors(sample):
                yield name, with_shape(sample, spec.shape, partial(_with_rank, rank=rank))

    def _climb(self, start: Attempt, tries: int, frozen: frozenset[str]) -> Attempt:
        best = start
        for _ in range(tries):
            sample = self._mutated(best, frozen)
            if self.random.random() < 0.35:
                sample = self._mutated(replace(best, sample=sample), frozen)
            tried = self._try(sample)
            if tried.error is None:
                return tried
            if tried.reached >= best.reached and _unbound(tried.error) <= _unbound(best.error):
                best = tried
        return best

    def _mutated(self, of: Attempt, frozen: frozenset[str]) -> Sample:
        names = [name for name in self.arguments if name not in frozen]
        if not names:
            return of.sample
        words = self.asked = set(re.findall(r"\w+", str(of.error)))
        named = [name for name in names if name in words or name.rstrip("_") in words]
        name = self.random.choice(named if named and self.random.random() < 0.6 else names)
        argument, value = self.arguments[name], of.sample[name]
        kind, _ = kind_of(argument)
        if kind == "Tensor":
            return self._mutated_tensor(of.sample, name)
        if kind == "Tensor[]":
            if argument.has_default_value() and self.random.random() < 0.3:
                return {**of.sample, name: OMIT}
            one = value[0] if isinstance(value, list) and value else tensor_for(name, 2)
            return {**of.sample, name: [self._changed(one, of.sample)] * self.random.choice((1, 2))}
        options = values_for(argument, self.strings, self.numbers)
        if argument.has_default_value():
            options.append(OMIT)
        return {**of.sample, name: self.random.choice(options)}

    def _mutated_tensor(self, sample: Sample, name: str) -> Sample:
        argument, value = self.arguments[name], sample[name]
        if not isinstance(value, Spec):
            return {**sample, name: tensor_for(name, self.random.choice((1, 2, 3, 4)))}
        if kind_of(argument)[1] and self.random.random() < 0.2:
            return {**sample, name: OMIT if argument.has_default_value() else None}
        new = self._changed(value, sample)
        if self.random.random() < 0.25:  # what looks alike mostly has to stay alike
            return with_tensors(sample, lambda _, s: new if s == value else s)
        if new.dtype != value.dtype and self.random.random() < 0.5:
            return with_tensors(sample, lambda _, s: replace(s, dtype=new.dtype) if s.dtype == value.dtype else s)
        return {**sample, name: new}

    def _changed(self, spec: Spec, sample: Sample) -> Spec:
        choice = self.random.random()
        if choice < 0.25:
            asked = [dtype for word, dtype in _BY_NAME.items() if word in self.asked]
            return replace(spec, dtype=self.random.choice(asked if asked and choice < 0.15 else _DTYPES))
        if choice < 0.5:
            return _with_rank(spec, self.random.choice((1, 2, 3, 4)))
        others = [other for _, other in tensors(sample)]
        if choice < 0.75 and others:
            return replace(spec, shape=self.random.choice(others).shape)
        if not spec.shape:
            return replace(spec, shape=(64,))
        axis = self.random.randrange(len(spec.shape))
        pool = [*SIZES, 1, 2, 3, 32, 128, 256, *(n for n in self.numbers if 1 < n <= 512)]
        pool += (
            [n for other in others for n in other.shape]
            + [n * 2 for n in spec.shape]
            + [n // 2 for n in spec.shape if n > 3]
        )
        return replace(spec, shape=(*spec.shape[:axis], self.random.choice(pool), *spec.shape[axis + 1 :]))

    def _try(self, sample: Sample) -> Attempt:
        self.found.tries += 1
        tried = attempt(self.overload, sample, self.kernel)
        if tried.error is not None:
            if self.found.furthest is None or tried.reached > self.found.furthest.reached:
                self.found.furthest = tried
            if self.found.reads is None and tried.reached and _READ.search(str(tried.error)):
                self.found.reads = tried
            if self.found.unfit is None and not tried.reached and not _unbound(tried.error):
                self.found.unfit = tried
        return tried

    def _keep(self, tried: Attempt) -> None:
        lines = self._lines_of(tried.sample)
        if not self.found.accepted or lines - self.lines:
            self.lines |= lines
            self.found.accepted.append(tried)

    def _lines_of(self, sample: Sample) -> set[tuple[str, int]]:
        if self.kernel is None:
            return set()
        file, lines = self.kernel.file, set()

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            lines.add((file, frame.f_lineno))
            return local

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            return local if frame.f_code.co_filename == file else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            attempt(self.overload, sample, self.kernel)
        finally:
            sys.settrace(before)
        return lines


def _always(same: Spec, name: str, spec: Spec) -> Spec:
    return same


def _with_rank(spec: Spec, rank: int) -> Spec:
    shape = (*SIZES[: max(0, rank - len(spec.shape))], *spec.shape)
    return replace(spec, shape=shape[-rank:], order=None)


def _unbound(error: Exception | None) -> int:
    """How many arguments a call failed to bind: 0 for any other error."""
    return str(error).count("'") if isinstance(error, TypeError) and "argument" in str(error) else 0
