"""What became of a fake kernel that somebody wanted. None of these is an error; each says why, for the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Registered:
    """It is in place. `replaced` says what it took the place of, if anything.

    Args:
        operator: its name.
        reason: why it was needed.
    """

    operator: str
    reason: str
    replaced: str = ""


@dataclass(frozen=True)
class Shadowed:
    """The operator's schema hides what it writes or returns: calls go through an honest operator (`shadow`).

    Args:
        operator: its name.
        reason: what its schema hides.
    """

    operator: str
    reason: str


@dataclass(frozen=True)
class AlreadyHad:
    """The operator has a fake kernel of its own, or torch makes one: left alone.

    Args:
        operator: its name.
        reason: whose fake kernel it is.
    """

    operator: str
    reason: str


@dataclass(frozen=True)
class Deferred:
    """There is no such operator yet: it is asked again when `module` has been imported, and at every compilation.

    Args:
        operator: its name.
        reason: what is not there yet.
    """

    operator: str
    module: str
    reason: str


@dataclass(frozen=True)
class SchemaDiffers:
    """The operator that is registered is another one than the fake kernel was written for: it was not registered.

    Args:
        operator: its name.
        seen: the schema that is registered.
        expected: the schema that the fake kernel was written for.
    """

    operator: str
    seen: str
    expected: str

    @property
    def reason(self) -> str:
        """Both schemas."""
        return f"registered is {self.seen}, and the fake kernel is for {self.expected}"


@dataclass(frozen=True)
class RefusedHidden:
    """The operator returns nothing and declares no mutation: with a fake kernel, compiled code would drop the call.

    Args:
        operator: its name.
        reason: what its schema says, and what to use instead.
    """

    operator: str
    reason: str


@dataclass(frozen=True)
class Skipped:
    """A fake kernel would have no effect: the operator decomposes into others.

    Args:
        operator: its name.
        reason: what a fake kernel would not change.
    """

    operator: str
    reason: str


Outcome = Registered | Shadowed | AlreadyHad | Deferred | SchemaDiffers | RefusedHidden | Skipped
