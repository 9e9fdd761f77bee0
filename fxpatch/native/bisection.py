"""Which of many operators break something. The rule: each demotion is proven. The search keeps a set that fails and a
part of it that does not, and halves what lies between; what it ends with is the operator whose addition makes the
difference. After each culprit the rest is tried again, until it works: so several are found too, each alone. Where
operators break something only together, the last in order is the culprit, and the others are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bisection:
    """What a search found.

    Args:
        culprits: in the order in which they were found.
        fails_without: it fails with no operator promoted; then nobody is to blame, and nothing was demoted.
        tries: how often something was tried.
    """

    culprits: tuple[str, ...]
    fails_without: bool
    tries: int

    def __str__(self) -> str:
        tries = f"{self.tries} {'try' if self.tries == 1 else 'tries'}"
        if self.fails_without:
            return f"fails with every operator native too: no optimized forward is to blame ({tries})"
        if not self.culprits:
            return f"does not fail with the promoted operators ({tries})"
        return f"broken by {', '.join(self.culprits)}: demoted; works with the others optimized ({tries})"


def culprits(
    names: Sequence[str], failing: Callable[[set[str]], bool], found: Callable[[str, tuple[str, ...]], None]
) -> Bisection:
    """Searches `names`, calling `found(name, along)` for each culprit; `along` are those it needs in order to fail.

    Args:
        names: in a fixed order; at most about `log2(len(names)) + 2` tries for each culprit.
        failing: whether it fails with exactly these; asked once for each set.
    """
    known: dict[frozenset[str], bool] = {}

    def fails(some: Sequence[str]) -> bool:
        key = frozenset(some)
        if key not in known:
            known[key] = bool(failing(set(some)))
        return known[key]

    remaining, blamed = list(names), []
    while fails(remaining):
        if fails([]):
            return Bisection((), True, len(known))
        culprit, along = _conflict(remaining, fails)
        found(culprit, along)
        blamed.append(culprit)
        remaining.remove(culprit)
    return Bisection(tuple(blamed), False, len(known))


def _conflict(names: list[str], fails: Callable[[Sequence[str]], bool]) -> tuple[str, tuple[str, ...]]:
    """The culprit, and which others have to be there for it to fail. `names` fails, none of them does not."""
    needed: list[str] = []
    while True:
        works, broken = 0, len(names)  # needed + names[:works] works, needed + names[:broken] fails
        while broken - works > 1:
            middle = (works + broken) // 2
            if fails(needed + names[:middle]):
                broken = middle
            else:
                works = middle
        needed.append(names[broken - 1])
        names = names[: broken - 1]
        if fails(needed):
            return needed[0], tuple(needed[1:])
