"""The model of `--model module:function`: found by name, and made with an example call.

The function takes nothing and returns the model and its arguments: `(model, (x, y))`, or `(model, {"x": x})` for
keyword arguments. It makes both wherever it likes; who asks moves them to the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from fxpatch.errors import OptionError

_HINT = "name a function without arguments that returns (model, example arguments): --model package.module:function"


def factory(where: str) -> Callable[[], Any]:
    """The function that `module:function` names.

    Raises:
        OptionError: the text names none. What the module itself raises while it is imported is the cause.
    """
    module, colon, path = where.partition(":")
    if not (module and colon and path):
        raise _error(where, "no module and function with a colon between them")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise _error(where, f"importing {module} fails: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise _error(where, f"{module} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise _error(where, f"{path} is a {type(found).__name__}")
    function: Callable[[], Any] = found
    return function


def example(where: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model with the positional and keyword arguments of one call.

    Raises:
        OptionError: there is no such function, or it returns something else. What it raises itself goes through.
    """
    made = factory(where)()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise _error(where, f"it returns {_kind(made)}")
    model, given = made
    if isinstance(given, Mapping):
        return model, (), dict(given)
    if isinstance(given, tuple):
        return model, given, {}
    raise _error(where, f"it returns a model with {_kind(given)}")


def _error(where: str, seen: str) -> OptionError:
    return OptionError(
        f"There is no model to be had from {where!r}.",
        seen=seen,
        expected="a function that returns (model, (arguments, ...)) or (model, {name: argument})",
        hint=_HINT,
    )


def _kind(value: object) -> str:
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else f"{type(value).__name__}"
