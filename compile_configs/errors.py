"""The one error of this package: a compile profile that cannot be used, and everything that is wrong with it.

A profile is written by hand, so one mistake rarely comes alone: all problems of a file are collected and told together.
`str(error)` has the four parts of every message in fxpatch (what, seen, expected, to do), because fxpatch turns this
error into its own without this package knowing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong. `key` is the path to it, such as `capture.sizes[3]`, "" for the file as a whole."""

    key: str
    what: str
    seen: str
    expected: str
    hint: str


class ProfileError(ValueError):
    """A compile profile is missing, cannot be read, or has a wrong key, type or value.

    Args:
        what: one sentence: which profile, and what is wrong with it.
        seen: what was found.
        expected: what would have been accepted.
        hint: what to do now.
        problems: the same, one by one, for a reader that is a program.
    """

    def __init__(self, what: str, *, seen: str, expected: str, hint: str, problems: Sequence[Problem] = ()) -> None:
        self.what, self.seen, self.expected, self.hint = what, seen, expected, hint
        self.problems = tuple(problems) or (Problem("", what, seen, expected, hint),)
        super().__init__(f"{what}\n  seen: {seen}\n  expected: {expected}\n  to do: {hint}")

    @classmethod
    def of(cls, origin: str, problems: Sequence[Problem]) -> ProfileError:
        """The error for all problems of the profile that came from `origin`; several are numbered, one is not.

        Args:
            problems: at least one.
        """

        def part(name: str) -> str:
            texts = [getattr(problem, name) for problem in problems]
            return texts[0] if len(texts) == 1 else "; ".join(f"({n}) {text}" for n, text in enumerate(texts, 1))

        count = "" if len(problems) == 1 else f"{len(problems)} problems: "
        what = f"compile profile {origin}: {count}{part('what')}"
        return cls(what, seen=part("seen"), expected=part("expected"), hint=part("hint"), problems=problems)
