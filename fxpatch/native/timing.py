"""Which of two calls is faster. The problem: on a shared machine the same call takes twice as long a second later. The
rule: the two take turns, each turn as many calls as make it long enough to time, and the medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

ROUNDS = 11
_TURN_SECONDS = 3e-4
_MOST_CALLS = 64


def ratio(
    a: Callable[[], object],
    b: Callable[[], object],
    synchronize: Callable[[], object],
    before_each: Callable[[], object] | None = None,
) -> float:
    """Time of `a` over time of `b`: 2.0 means that `b` takes half as long. Median of `ROUNDS` turns each.

    Args:
        synchronize: waits until the device has done what was launched.
        before_each: runs before every call, untimed (arguments that the calls overwrite); turns then are single calls.
    """
    calls = 1
    if before_each is None:
        single = _turn(a, 1, synchronize, None)
        calls = max(1, min(_MOST_CALLS, round(_TURN_SECONDS / max(single, 1e-9))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for of, call in zip(times, (a, b), strict=True):
            of.append(_turn(call, calls, synchronize, before_each))
    first, second = (statistics.median(of) for of in times)
    return first / max(second, 1e-9)


def _turn(
    call: Callable[[], object],
    calls: int,
    synchronize: Callable[[], object],
    before: Callable[[], object] | None,
) -> float:
    if before is not None:
        before()
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return time.perf_counter() - begin
