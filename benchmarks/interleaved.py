"""How all benchmarks measure: the ways to be compared take turns within each round, in rotating order, so that what
slows the machine slows all of them; a ratio is the median over rounds of that round's ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def milliseconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def take_turns(ways: dict[str, Callable[[], float]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Times of each way, round by round; who goes first rotates."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds + warm_up):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = ways[name]()
            if turn >= warm_up:
                times[name].append(elapsed)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and interquartile range, in ms."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "iqr_ms": high - low, "rounds": len(times)}


def ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of time to base."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def difference(times: list[float], base: list[float]) -> dict[str, float]:
    """Median and interquartile range over rounds of time less base, in ms."""
    return summary([a - b for a, b in zip(times, base, strict=True)])
