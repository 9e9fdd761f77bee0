"""A scheduler's `step` that loses no argument.

The problem: engines wrap diffusers' schedulers, and a wrapper's `step(..., **kwargs)` either drops what it is given or
passes on what the scheduler does not take. A generator that gets lost is the worst of it: images are as good as before,
and no longer reproducible. And a pipeline looks at the signature (`"generator" in inspect.signature(scheduler.step)
.parameters`) to find out what to pass: `**kwargs` makes it pass nothing.

The rule: `explicit_step(scheduler)` replaces the step of this one object with one that has the step's own signature,
passes on every argument by it, and refuses what is not in it with the names that are. The object stays what it is
(class, attributes, config, `save_pretrained`); deep copies and pickles of it have a step of their own (a shallow copy
shares the original's, as it shares the solver's history); `undo()` takes it back.

Source: SGLang #24798 (scheduling_dpm_solver_multistep.py), which writes the names of one scheduler out. Here they come
from the scheduler, so that they are those of the version that is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fxpatch.errors import LayerError

_KEYWORDS, _MORE = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL


class ExplicitStep:
    """What `explicit_step` returns, and what `scheduler.step` is until `undo()`. A context manager that undoes.

    Attributes:
        scheduler: the object whose step this is.
        accepted: names of the arguments, in order.
    """

    def __init__(self, scheduler: Any, step: Callable[..., Any] | None, signature: inspect.Signature) -> None:
        self.scheduler, self._step = scheduler, step
        self.accepted = tuple(signature.parameters)
        self._positional = [
            name for name, each in signature.parameters.items() if each.kind is inspect.Parameter.POSITIONAL_ONLY
        ]
        self.__signature__ = signature
        self.__name__, self.__doc__ = "step", type(scheduler).step.__doc__ if step is None else step.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own step.

        Raises:
            LayerError: an argument that it does not take, one that is missing, one that is given twice.
        """
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise self._refused(error, kwargs) from None
        bound.apply_defaults()  # every parameter is passed on, by its name: `like` may have another order or default
        positional = [bound.arguments.pop(name) for name in self._positional]
        return self.plain()(*positional, **bound.arguments)

    def plain(self) -> Callable[..., Any]:
        """The step that this one calls."""
        if self._step is not None:
            return self._step
        step: Callable[..., Any] = type(self.scheduler).step.__get__(self.scheduler)
        return step

    def undo(self) -> None:
        """Gives the scheduler its step back. A second call does nothing.

        Raises:
            LayerError: somebody has replaced the step since.
        """
        current = vars(self.scheduler).get("step")
        if current is self:
            del self.scheduler.step
            if self._step is not None:
                self.scheduler.step = self._step
        elif current is not self._step:
            raise LayerError(
                f"The step of {type(self.scheduler).__name__} cannot be given back.",
                seen=f"a step that was put there later: {current!r}",
                expected="the one that explicit_step() put there",
                hint="undo in the opposite order",
            )

    def __enter__(self) -> ExplicitStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"explicit step of {type(self.scheduler).__name__}{self.__signature__}"

    def _refused(self, error: TypeError, kwargs: dict[str, Any]) -> LayerError:
        unknown = [name for name in kwargs if name not in self.accepted]
        return LayerError(
            f"The step of {type(self.scheduler).__name__} cannot be called like this.",
            seen=f"unknown: {', '.join(unknown)}" if unknown else str(error),
            expected=", ".join(str(each) for each in self.__signature__.parameters.values()),
            hint="leave unknown arguments out: this scheduler would not use them" if unknown else "pass what it takes",
        )


def explicit_step(scheduler: Any, like: Any = None) -> ExplicitStep:
    """Makes `scheduler.step` explicit: every parameter named and passed on, unknown ones refused.

    Args:
        scheduler: diffusers' DPMSolverMultistepScheduler, or any object with a `step`. It is changed in place. Some
            pipelines make a scheduler of their own from the one they are given: pass `pipeline.scheduler`.
        like: a scheduler, or a class of schedulers, whose step's parameters are taken; needed for a wrapper whose own
            step has `**kwargs` (the scheduler that it wraps, say).

    Returns:
        The new step. The same one for a scheduler that has one already. It belongs to this scheduler: `copy.deepcopy`
        copies both, `copy.copy` leaves the copy with the step of the original (undo first, or copy deeply).

    Raises:
        LayerError: no step; a step with `*args` or `**kwargs`, and no `like`; a `like` with arguments that this step
            would not take, or without one that it needs; a scheduler that is explicit in another way.
    """
    current = getattr(scheduler, "step", None)
    if isinstance(scheduler, type) or not callable(current):
        raise LayerError(
            "A scheduler has a step.",
            seen=f"the class {scheduler.__name__}" if isinstance(scheduler, type) else repr(scheduler)[:200],
            expected="an object with a method `step`",
            hint="make a scheduler of the class first" if isinstance(scheduler, type) else "pass pipeline.scheduler",
        )
    present = current if isinstance(current, ExplicitStep) else None
    own = inspect.signature(current if present is None else present.plain())
    signature = own if like is None else _signature_of(like)
    if any(each.kind in (_KEYWORDS, _MORE) for each in signature.parameters.values()):
        raise LayerError(
            f"The step of {type(scheduler).__name__} does not say what it takes.",
            seen=f"step{signature}",
            expected="named parameters",
            hint="explicit_step(scheduler, like=the scheduler that it wraps)",
        )
    if like is not None:
        _check_fits(scheduler, own, signature)
    if present is not None:
        if present.__signature__ == signature:
            return present
        raise LayerError(
            f"The step of {type(scheduler).__name__} is explicit already, with other parameters.",
            seen=", ".join(present.accepted),
            expected=", ".join(signature.parameters),
            hint="undo() that one first",
        )
    new = ExplicitStep(scheduler, vars(scheduler).get("step"), signature)
    scheduler.step = new
    return new


def _signature_of(like: Any) -> inspect.Signature:
    step = getattr(like, "step", None)
    if not callable(step):
        raise LayerError(
            "`like` says which parameters a step has.", seen=repr(like)[:200], expected="a scheduler, or its class",
            hint="pass the scheduler that is wrapped",
        )  # fmt: skip
    signature = inspect.signature(step)
    parameters = list(signature.parameters.values())
    return signature.replace(parameters=parameters[1:] if isinstance(like, type) else parameters)


def _check_fits(scheduler: Any, own: inspect.Signature, wanted: inspect.Signature) -> None:
    """A call with all of `wanted` has to be one that the step takes, by the same names."""
    names = [name for name, each in wanted.parameters.items() if each.kind is not inspect.Parameter.POSITIONAL_ONLY]
    try:
        own.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise LayerError(
            f"The step of {type(scheduler).__name__} does not take what `like` has.",
            seen=f"step{own}: {error}",
            expected=f"a step that takes {', '.join(names)}",
            hint="without `like` the step's own parameters are used",
        ) from None
