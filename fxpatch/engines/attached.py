"""A runner in the place of a module's `forward`: whoever calls the module, calls the runner.

The runner must not run into itself when it traces the module, or falls back to it. So it is given a twin: the same
parameters, buffers and children, the `forward` of before, and no hooks, which run once, around it all.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from fxpatch.errors import AlreadyInstalledError
from fxpatch.piecewise.runner import PiecewiseRunner

_MARK = "_fxpatch_attached"


class Attached:
    """A module whose `forward` is another function, and the way back. Use as a context manager, or call `undo()`.

    Args:
        module: of somebody else.
        forward: what to call instead; it has the signature of the module's own for those who ask.

    Attributes:
        runner: what calls go through; None until there is one.

    Raises:
        AlreadyInstalledError: something is attached to it.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        if hasattr(module, _MARK):
            raise AlreadyInstalledError(
                f"Calls of this {type(module).__name__} go through a runner already.",
                seen="a second one for the same module",
                expected="a module with its own forward",
                hint="undo() the first one, or make it with other options",
            )
        self.module = module
        self.runner: PiecewiseRunner | None = None
        self._own = vars(module).get("forward")
        original = module.forward

        @functools.wraps(original)
        def instead(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        module.forward = instead
        setattr(module, _MARK, True)

    def undo(self) -> None:
        """Gives the module its `forward` back, and the graphs their memory. Calling it again does nothing."""
        if not hasattr(self.module, _MARK):
            return
        delattr(self.module, _MARK)
        if self._own is None:
            del self.module.forward
        else:
            self.module.forward = self._own
        if self.runner is not None:
            self.runner.release()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """The same module without its hooks: parameters, buffers and children are shared, now and later."""
    same = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(same)[name] = OrderedDict() if isinstance(value, OrderedDict) else type(value)()
    return same
