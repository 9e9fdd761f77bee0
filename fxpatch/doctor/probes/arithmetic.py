"""Are operators right where narrower arithmetic would show: large integers, float64, special values?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxpatch.doctor.probe import NotApplicable, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, run_all, same_bits
from fxpatch.doctor.probes.presence import needs_accelerator

_BIG = [2**40 + 1, 2**53 + 1, -(2**53) - 3, 2**62, 7]
INTEGERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "x + 1": lambda x: x + 1,
    "x * 3": lambda x: x.remainder(2**60) * 3,
    "x // 7": lambda x: x // 7,
    "x % 1000": lambda x: x % 1000,
    "sum": lambda x: x.sum(),
    "cumsum": lambda x: x.cumsum(0),
    "max": lambda x: x.max(),
    "sort": lambda x: x.sort().values,
    "x == 2**53": lambda x: x == 2**53,
    "x & 0xFFFFFFFFF": lambda x: x & 0xFFFFFFFFF,
    "arange": lambda x: torch.arange(2**53, 2**53 + 3, device=x.device),
}
SPECIAL: dict[str, Callable[[torch.Tensor], Any]] = {
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "signbit": torch.signbit,
    "x == x": lambda x: x == x,
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "amax": lambda x: x.amax(),
    "nan_to_num": lambda x: torch.nan_to_num(x, 5.0, 6.0, 7.0),
    "where": lambda x: torch.where(x > 0, x, -x),
    "masked softmax": lambda x: torch.where(x > 0, -torch.inf, 0.0).softmax(0),
}


def _integers(subject: Subject) -> str:
    needs_accelerator(subject)
    host = torch.tensor(_BIG)
    there = host.to(subject.device)

    def check(function: Callable[[torch.Tensor], Any]) -> None:
        want, got = function(host), function(there)
        expect(got.dtype, want.dtype, "the dtype")
        expect(got.cpu().tolist(), want.tolist(), "the result")

    run_all({name: partial(check, f) for name, f in INTEGERS.items()})
    return f"{len(INTEGERS)} operators on int64 beyond 2**53, as on the CPU"


def _special(subject: Subject) -> str:
    needs_accelerator(subject)
    host = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -2.0])

    def check(function: Callable[[torch.Tensor], Any]) -> None:
        got, want = function(host.to(subject.device)).cpu(), function(host)
        expect(got.dtype, want.dtype, "the dtype")
        if not same_bits(got, want):
            raise Differs(f"the result is {got.tolist()}, and on the CPU {want.tolist()}")

    run_all({name: partial(check, f) for name, f in SPECIAL.items()})
    return f"{len(SPECIAL)} operators on NaN, infinities and both zeros, as on the CPU"


def _double(subject: Subject) -> str:
    needs_accelerator(subject)
    host = torch.tensor([1 + 2**-40, 1.0, 1e300, -3.0], dtype=torch.float64)
    try:
        there = host.to(subject.device)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise NotApplicable(f"the device has no float64, and says so: {str(error).splitlines()[0]}") from error

    def check(function: Callable[[torch.Tensor], Any]) -> None:
        got, want = function(there).cpu(), function(host)
        expect(got.dtype, want.dtype, "the dtype")
        if not torch.allclose(got, want, rtol=2**-44, atol=0):
            raise Differs(f"the result is {got.tolist()}, and on the CPU {want.tolist()}")

    functions: dict[str, Callable[[torch.Tensor], Any]] = {
        "x - 1": lambda x: x - 1,
        "sum": lambda x: x[:2].sum() - 2,
        "exp": lambda x: x[:2].exp(),
        "matmul": lambda x: x[:2].outer(x[:2]) @ x[:2] - 2,
        "mean": lambda x: x[:2].mean() - 1,
    }
    run_all({name: partial(check, f) for name, f in functions.items()})
    return f"{len(functions)} operators keep 40 bits behind the point"


PROBES = (
    Probe(
        name="int64",
        stage="numerics",
        title="large integers",
        run=_integers,
        why="accelerators compute int64 in int32, float32 or float64: token ids, hashes, offsets and sums go wrong "
        "beyond 2**31 or 2**53, silently",
        todo="vendor: compute in 64 bits, or raise; until then keep such numbers on the CPU",
        installs=False,
    ),
    Probe(
        name="float64",
        stage="numerics",
        title="float64 is double",
        run=_double,
        why="a device that computes float64 in float32 and labels the result float64 loses 29 bits silently",
        todo="vendor: raise for float64 where the hardware has none",
        installs=False,
    ),
    Probe(
        name="special-values",
        stage="numerics",
        title="NaN, infinities, -0.0",
        run=_special,
        why="masks are built of infinities and checked by isnan: fast-math kernels that assume finite numbers let NaN "
        "through, or make it",
        todo="vendor: compile these kernels without finite-math assumptions",
        installs=False,
    ),
)
