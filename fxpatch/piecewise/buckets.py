"""The sizes that are captured, and which of them a call is padded to. The problem: each size costs one graph per piece,
and off CUDA a device has room for about two thousand; a call between two sizes computes rows for nothing. The rule:
sizes are checked once, thinned evenly to what the device has room for (what was left out is told), and looked up by
table.

No size is below 2: Dynamo makes a graph of its own for a dimension of 1, so one row is padded to two. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from fxpatch.errors import BudgetError, SizesError

LEAST = 2
MOST = 1 << 22  # the table has a place for each n: 32 MiB here


@dataclass(frozen=True)
class Buckets:
    """Sizes in ascending order.

    Args:
        sizes: what is captured, in elements of the dynamic dimension.
        pruned: sizes that were asked for and are not captured, ascending.
        reason: why not.

    Attributes:
        table: `table[n]` is the size for n elements, from 0 to the largest size.
    """

    sizes: tuple[int, ...]
    pruned: tuple[int, ...] = ()
    reason: str = ""
    table: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.sizes)
        table = [self.sizes[0]]
        for size in self.sizes:
            table.extend([size] * (size + 1 - len(table)))
        object.__setattr__(self, "table", tuple(table))

    @property
    def largest(self) -> int:
        """The largest size; there is none for a greater n."""
        return self.sizes[-1]

    def of(self, n: int) -> int | None:
        """The smallest size that n elements fit in; None if there is none.

        Args:
            n: a number of elements, 0 or more.

        Raises:
            SizesError: n is negative.
        """
        if 0 <= n < len(self.table):
            return self.table[n]
        if n < 0:
            _refuse(f"{n} elements", "a number of elements", "pass what tensor.size(dim) says")
        return None

    @classmethod
    def geometric(cls, max: int, align: int = 8, ratio: float = 2.0) -> Buckets:
        """Sizes that grow by a factor, so that no call is padded to more than about `ratio` times its rows.

        Args:
            max: the largest size; a multiple of `align`.
            align: every size is a multiple of it, and it is the smallest (kernels that want 8 or 16 rows; the ranks of
                sequence parallelism).
            ratio: from one size to the next, before rounding up to `align`; above 1.
        """
        for name, value in (("max", max), ("align", align)):
            if type(value) is not int or value < 1:
                _refuse(f"{name}={value!r}", "a positive int", "correct the arguments of Buckets.geometric()")
        if max % align:
            up = -(-max // align) * align
            _refuse(f"max={max}, align={align}", "a max that is a multiple of align", f"take max={up}")
        if not 1 < ratio < float("inf"):
            _refuse(f"ratio={ratio!r}", "a factor above 1", "take 2, or 1.25 for closer sizes")
        first = min(max, -(-LEAST // align) * align)
        sizes = [first]
        while sizes[-1] < max:
            grown = -(-int(sizes[-1] * ratio) // align) * align
            sizes.append(min(max, grown if grown > sizes[-1] else sizes[-1] + align))
        return cls(tuple(sizes))

    def keep(self, count: int, reason: str) -> Buckets:
        """At most `count` of the sizes, spread evenly over them; the largest and, of two or more, the smallest stay.

        Args:
            count: how many sizes to keep, at least 1.
            reason: why, for the report.
        """
        last = len(self.sizes) - 1
        if count > last:
            return self
        chosen = {last} if count == 1 else {round(i * last / (count - 1)) for i in range(count)}
        kept = tuple(size for i, size in enumerate(self.sizes) if i in chosen)
        return Buckets(kept, tuple(sorted({*self.pruned, *self.sizes} - {*kept})), _and(self.reason, reason))


def buckets(
    sizes: Sequence[int] | Buckets | str,
    *,
    profile_sizes: Sequence[int],
    budget: int | None = None,
    pieces: int = 1,
    largest: int | None = None,
    least: int = LEAST,
) -> Buckets:
    """The sizes to capture.

    Args:
        sizes: a list in any order, `Buckets`, or "auto" for the profile's.
        profile_sizes: the device's default sizes.
        budget: how many graphs the device has room for; None: no limit is known.
        pieces: graphs per size.
        largest: no call is larger. "auto" then ends there: the profile's sizes above it go, and where the profile ends
            earlier, sizes are doubled up to it. None: nothing is known.
        least: no smaller size is captured; smaller ones become this.

    Raises:
        SizesError: no sizes; one that is no positive int, is there twice or is above `largest`.
        BudgetError: `pieces` graphs for one size are more than `budget`.
    """
    _check_limits(budget, pieces, largest, least)
    chosen = _chosen(sizes, profile_sizes, largest)
    if largest is not None and chosen.largest > largest:
        _refuse(f"a size of {chosen.largest} with largest={largest}", "no size above the largest call", "leave it out")
    chosen = _raised(chosen, least)
    if budget is None or not pieces:
        return chosen
    room = budget // pieces
    if not room:
        raise BudgetError(
            "The device has not room for the graphs of a single size.",
            seen=f"{pieces} pieces, each a graph, and a budget of {budget} graphs",
            expected="at least one graph for each piece",
            hint="split at fewer operators, or raise the budget in the device's profile if the device has more room",
        )
    of = f"{room} of {len(chosen.sizes)} sizes"
    reason = f"{pieces} graphs for each size, and the device has room for {budget}: {of}"
    return chosen.keep(room, reason)


def _chosen(sizes: Sequence[int] | Buckets | str, profile_sizes: Sequence[int], largest: int | None) -> Buckets:
    if isinstance(sizes, Buckets):
        return sizes
    if isinstance(sizes, str):
        if sizes != "auto":
            _refuse(f"sizes={sizes!r}", "a list of ints, Buckets, or 'auto'", "write sizes='auto', or name them")
        return _auto(profile_sizes, largest)
    try:
        given = list(sizes)
    except TypeError:
        _refuse(f"sizes={sizes!r}", "a list of ints, Buckets, or 'auto'", f"write sizes=[{sizes!r}] for a single one")
    _check(given, ordered=False)
    return Buckets(tuple(sorted(given)))


def _auto(profile_sizes: Sequence[int], largest: int | None) -> Buckets:
    """The profile's sizes up to `largest`, and `largest`: every n has a size, padded at most twofold above."""
    sizes = list(profile_sizes)
    _check(sizes)
    if largest is not None:
        while sizes[-1] < largest:
            sizes.append(min(2 * sizes[-1], largest))
        sizes = [size for size in sizes if size < largest] + [largest]
    return Buckets(tuple(sizes))


def _raised(chosen: Buckets, least: int) -> Buckets:
    """The sizes with those below `least` as one of `least`."""
    small = [size for size in chosen.sizes if size < least]
    if not small:
        return chosen
    sizes = tuple(sorted({max(size, least) for size in chosen.sizes}))
    reason = f"nothing below {least} is captured, as Dynamo makes a graph of its own for 1"
    return Buckets(sizes, tuple(sorted({*chosen.pruned, *small})), _and(chosen.reason, reason))


def _check(sizes: Sequence[object], *, ordered: bool = True) -> None:
    if not sizes:
        _refuse("no sizes", "at least one", "name the sizes to capture, or pass 'auto'")
    for size in sizes:
        if type(size) is not int:
            _refuse(f"{size!r}, a {type(size).__qualname__}", "sizes that are ints", "write int(size)")
        if size <= 0:
            _refuse(f"a size of {size}", "sizes above 0", "leave it out: nothing is computed for no rows")
        if size > MOST:
            _refuse(f"a size of {size}", f"sizes up to {MOST}", "count the dimension in larger units")
    if len(set(sizes)) < len(sizes):
        twice = next(size for i, size in enumerate(sizes) if size in sizes[:i])
        _refuse(f"{twice} twice", "each size once", "leave one out")
    if ordered and list(sizes) != sorted(sizes):  # type: ignore[type-var]
        _refuse(f"{tuple(sizes)}", "ascending sizes", "sort them")


def _check_limits(budget: object, pieces: object, largest: object, least: object) -> None:
    wanted = (("budget", budget, 1, True), ("pieces", pieces, 0, False), ("largest", largest, 1, True))
    for name, value, lowest, optional in (*wanted, ("least", least, 1, False)):
        if not (type(value) is int and value >= lowest) and not (optional and value is None):
            _refuse(f"{name}={value!r}", f"an int from {lowest} on", f"correct {name}")


def _and(first: str, second: str) -> str:
    return f"{first}; {second}" if first and first != second else second


def _refuse(seen: str, expected: str, hint: str) -> NoReturn:
    raise SizesError("The sizes to capture make no sense.", seen=seen, expected=expected, hint=hint)
