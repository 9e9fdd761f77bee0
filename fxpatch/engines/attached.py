"""A runner in the place of a module's `forward`: whoever calls the module, calls the runner.

The runner must not run into itself when it traces the module, or falls back to it. So it is given a twin: the same
parameters, buffers and children, the `forward` of before, and no hooks, which run once, around it all.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from fxpatch.engines.unchanged import Snapshot
from fxpatch.errors import AlreadyInstalledError
from fxpatch.piecewise.runner import PiecewiseRunner

_MARK = "_fxpatch_attached"
CHANGED = "the model has changed"
log = logging.getLogger("fxpatch")


class Attached:
    """A module whose `forward` is another function, and the way back. Use as a context manager, or call `undo()`.

    Args:
        module: of somebody else.
        forward: what to call instead; it has the signature of the module's own for those who ask.

    Attributes:
        runner: what calls go through; None until there is one.
        calls: what went to the module as it is, by the reason.

    Raises:
        AlreadyInstalledError: something is attached to it.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        if is_attached(module):
            raise AlreadyInstalledError(
                f"Calls of this {type(module).__name__} go through a runner already.",
                seen="a second one for the same module",
                expected="a module with its own forward",
                hint="undo() the first one, or make it with other options",
            )
        self.module = module
        self.runner: PiecewiseRunner | None = None
        self.calls: Counter[str] = Counter()
        self._plain, self._snapshot = twin(module), Snapshot(module)
        self._own = vars(module).get("forward")
        original = module.forward

        module.forward = _Instead(original, forward)
        setattr(module, _MARK, module.forward)

    def snapshot(self) -> None:
        """What graphs are made of now is what the module has to be later."""
        self._snapshot = Snapshot(self.module)

    def changed(self) -> str | None:
        """Why a call must not go through the runner any more, told once in the log; None where it may."""
        change = self._snapshot.change()
        if not change:
            return None
        if not any(why.startswith(CHANGED) for why in self.calls):
            log.warning(
                "%s has changed since it was captured (%s): its calls go to the module itself; undo() and attach anew",
                *(type(self.module).__name__, change),
            )
        return f"{CHANGED}: {change}"

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module as it is, without its hooks, which run around this."""
        self._plain.training = self.module.training  # the one thing that the two do not share
        return self._plain(*args, **kwargs)

    def undo(self) -> None:
        """Gives the module its `forward` back, and the graphs their memory. Calling it again does nothing."""
        if not is_attached(self.module):
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


class _Instead:
    """What stands in a module's `forward`. In a copy of the module stands a copy of what stood there before: a runner
    of the original has the original's parameters."""

    def __init__(self, original: Callable[..., Any], forward: Callable[..., Any]) -> None:
        self._original, self._forward = original, forward
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)


def is_attached(module: torch.nn.Module) -> bool:
    """Whether its calls go through a runner."""
    return isinstance(getattr(module, _MARK, None), _Instead)


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """The same module without its hooks: parameters, buffers and children are shared, now and later."""
    same = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(same)[name] = OrderedDict() if isinstance(value, OrderedDict) else type(value)()
    return same
