"""What fake_kernels raises on purpose: what was seen, what was expected, and what to do.

Every class is a `FakeKernelError`, and the built-in error that a caller of torch's own functions would catch.
"""

from __future__ import annotations


class FakeKernelError(Exception):
    """Base class. `str(error)` is one readable paragraph made of the four parts.

    Args:
        what: one sentence: which request could not be met.
        seen: what was found.
        expected: what would have been accepted.
        hint: what to do now.
    """

    def __init__(self, what: str, *, seen: str, expected: str, hint: str) -> None:
        self.what, self.seen, self.expected, self.hint = what, seen, expected, hint
        super().__init__(f"{what}\n  seen: {seen}\n  expected: {expected}\n  to do: {hint}")


class OperatorNameError(FakeKernelError, ValueError):
    """The text cannot be the name of an operator."""


class SchemaError(FakeKernelError, ValueError):
    """The text cannot be parsed as a schema, or contradicts what is registered."""


class SignatureError(FakeKernelError, TypeError):
    """A fake kernel does not take the arguments of its schema."""


class UnknownOperatorError(FakeKernelError, LookupError):
    """There is no such operator, or no record of it."""


class RegisteredTwiceError(FakeKernelError, ValueError):
    """Two fake kernels are wanted for one operator."""


class FakeReadsDataError(FakeKernelError, RuntimeError):
    """A fake kernel asked a tensor for its values."""


class FakeResultsError(FakeKernelError, RuntimeError):
    """A fake kernel returned another number of results than its operator."""


class NoDerivativeError(FakeKernelError, RuntimeError):
    """An argument of a shadowed operator needs a gradient."""


class ConformanceError(FakeKernelError, AssertionError):
    """A fake kernel and its reference disagree."""
