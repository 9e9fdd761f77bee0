"""`register_fake_if_exists`: the decorator for fake kernels of your own.

    @register_fake_if_exists("mylib::rotate")
    def rotate(x, angle):
        return torch.empty_like(x)

Where the operator is not registered yet, it is asked for again whenever `settle` is called: by `fxpatch.install()`,
when `library` has been imported, and at the start of every compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fake_kernels.kernel import split_name
from fake_kernels.outcomes import Outcome
from fake_kernels.registry import LIBRARIES, Policy, Registry, Wanted

USERS = Registry()


class UserFake:
    """A function that is registered as a fake kernel, or will be; it can still be called.

    Attributes:
        op: the operator.
    """

    def __init__(self, op: str, fn: Callable[..., Any]) -> None:
        self.op = op
        self._fn = fn

    @property
    def outcome(self) -> Outcome | None:
        """What has become of it so far; None after `remove()`."""
        return USERS.outcome(self.op)

    def remove(self) -> None:
        """The operator is as it was. Calling it again does nothing."""
        USERS.remove(self.op)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<fake kernel of {self.op}: {self.outcome}>"


def register_fake_if_exists(
    op: str, *, policy: Policy = "if_missing", library: str | None = None
) -> Callable[[Callable[..., Any]], UserFake]:
    """Decorator: registers the function as the fake kernel of `op` where that is right, now or when it becomes so.

    Args:
        op: `"namespace::name"` or `"namespace::name.overload"`.
        policy: `"if_missing"` leaves a fake kernel alone that is there; `"override"` takes its place.
        library: the importable module that brings the operator; None to go by its namespace.

    Raises:
        OperatorNameError: `op` is not of that form.
        RegisteredTwiceError: it has a fake kernel from this decorator already; `remove()` that first.
    """
    namespace = split_name(op)[0]

    def register(fn: Callable[..., Any]) -> UserFake:
        USERS.want(Wanted(op, fn, library or LIBRARIES.get(namespace, namespace), policy))
        USERS.settle()
        return UserFake(op, fn)

    return register
