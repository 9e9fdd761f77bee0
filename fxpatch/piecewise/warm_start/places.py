"""Where a trace found a value, as plain data: `L['self'].config.eps` without a parser or `eval` when it is read.

Dynamo names what it looked at by Python expressions, thousands for a deep model and most of them with a common
beginning. They become one table of steps, each of which goes on from an earlier one; walking it costs a microsecond per
step, and can do no more than read attributes and items, and ask for a type or for the keys of a dict.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fxpatch.piecewise.warm_start.graph_json import Json, NotCacheableError

_ASK: dict[str, Any] = {
    **{each.__name__: each for each in (type, dict, list, tuple, set, len, iter, next, str, int, float, bool)},
    "dict.keys": dict.keys,
    "dict.values": dict.values,
    "dict.items": dict.items,
    "dict.__getitem__": dict.__getitem__,
    "list.__getitem__": list.__getitem__,
    "tuple.__getitem__": tuple.__getitem__,
    "object.__getattribute__": object.__getattribute__,
    "torch.get_default_dtype": torch.get_default_dtype,
}


class Places:
    """A table of steps.

    Attributes:
        steps: each `[kind, ...]`, where a number is the place of an earlier step.
    """

    def __init__(self, steps: list[Json] | None = None) -> None:
        self.steps: list[Json] = steps if steps is not None else []
        self._known: dict[str, int] = {}

    def add(self, expression: str) -> int:
        """The place of an expression; its steps are added where they are new.

        Raises:
            NotCacheableError: it does more than to read.
        """
        if expression not in self._known:
            self._known[expression] = self._step(ast.parse(expression, mode="eval").body)
        return self._known[expression]

    def _step(self, node: ast.expr) -> int:
        key = ast.unparse(node)
        if key not in self._known:
            self.steps.append(self._spelled(node, key))
            self._known[key] = len(self.steps) - 1
        return self._known[key]

    def _spelled(self, node: ast.expr, text: str) -> Json:
        if isinstance(node, ast.Name):
            return ["name", node.id]
        if isinstance(node, ast.Attribute):
            return ["attribute", self._step(node.value), node.attr]
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, type(None))):
            return ["constant", node.value]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return ["constant", -node.operand.value]  # type: ignore[operator]
        if isinstance(node, ast.Subscript):
            return ["item", self._step(node.value), self._step(node.slice)]
        if isinstance(node, ast.Call) and not node.keywords:
            name = ast.unparse(node.func)
            if name in ("__import__", "__load_module") and isinstance(node.args[0], ast.Constant):
                return ["module", node.args[0].value]
            if name in _ASK:
                return ["ask", name, [self._step(each) for each in node.args]]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("keys", "values", "items") and not node.args:
                return ["ask", f"dict.{node.func.attr}", [self._step(node.func.value)]]
        raise NotCacheableError(f"the trace depends on {text}, which another process cannot look up")

    def walk(self, names: Mapping[str, Any]) -> list[Any]:
        """The value at each place; `MISSING` where there is none."""
        found: list[Any] = []
        for step in self.steps:
            try:
                found.append(self._value(step, found, names))
            except Exception as error:  # of any class: the attributes are the user's
                found.append(Missing(f"{type(error).__name__}: {error}"))
        return found

    def _value(self, step: Json, found: list[Any], names: Mapping[str, Any]) -> Any:
        kind = step[0]
        if kind == "attribute":
            return getattr(_there(found[step[1]]), step[2])
        if kind == "item":
            return _there(found[step[1]])[_there(found[step[2]])]
        if kind == "constant":
            return step[1]
        if kind == "name":
            return names[step[1]]
        if kind == "module":
            return sys.modules[step[1]]
        if kind == "ask":
            return _ASK[step[1]](*[_there(found[each]) for each in step[2]])
        raise ValueError(f"no step to a value: {kind!r}")


class Missing:
    """There is no value at a place."""

    def __init__(self, why: str) -> None:
        self.why = why


class Globals(dict[str, Any]):
    """The names of a function's module, and those by which Dynamo reaches other modules from there."""

    def __missing__(self, name: str) -> Any:
        if name.startswith("__import_"):
            wanted = name.removeprefix("__import_")
            if wanted.replace("_dot_", ".") in sys.modules:
                return sys.modules[wanted.replace("_dot_", ".")]
        if name.startswith("__builtins_dict__"):
            return vars(builtins)
        raise KeyError(name)


def _there(value: Any) -> Any:
    if isinstance(value, Missing):
        raise LookupError(value.why)
    return value
