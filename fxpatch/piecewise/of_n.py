"""Sizes that depend on n, as functions that a call evaluates and a file holds.

Tracing knows a size as a symbolic expression. Evaluating that takes a computer algebra system on every call, and it
cannot be written down; as a line of Python arithmetic it can be both. What is read back from a file is parsed and
checked node by node before it is compiled: arithmetic on n and integers, and nothing else.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import torch

_ALLOWED = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Call),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub),
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min, "abs": abs, "int": int, "float": float}
_KINDS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float}
_TRIED = (2, 3, 4, 7, 8, 15, 64, 1021)


class OfN:
    """A number as a function of n.

    Args:
        kind: `"int"` or `"float"`.
        text: `"2*n + 1"`; None where it cannot be written so, and hence not be saved.
        function: what it computes.
    """

    __slots__ = ("function", "kind", "text")

    def __init__(self, kind: str, text: str | None, function: Callable[[int], Any]) -> None:
        self.kind, self.text, self.function = kind, text, function

    def __call__(self, n: int) -> Any:
        return self.function(n)

    @classmethod
    def read(cls, kind: str, text: str) -> OfN:
        """From its text.

        Raises:
            ValueError: it is more than arithmetic on n.
        """
        tree = ast.parse(text, mode="eval")
        for node in ast.walk(tree):
            if not isinstance(node, _ALLOWED):
                raise ValueError(f"{text!r} is more than arithmetic on n: {type(node).__name__}")
            if isinstance(node, ast.Name) and node.id != "n" and node.id not in _FUNCTIONS:
                raise ValueError(f"{text!r} is more than arithmetic on n: {node.id}")
            if isinstance(node, ast.Constant) and type(node.value) is not int:
                raise ValueError(f"{text!r} is more than arithmetic on n: {node.value!r}")
            if isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Name)):
                raise ValueError(f"{text!r} is more than arithmetic on n: a call")
        _KINDS[kind]
        code = compile(ast.parse(f"lambda n: {kind}({text})", mode="eval"), "<size of n>", "eval")
        return cls(kind, text, eval(code, {"__builtins__": {}, **_FUNCTIONS}))


def of_n(size: Any, kind: Callable[[Any], Any] = int) -> OfN:
    """A size of the graph as a function of n. All symbols are n: no other dimension is dynamic.

    Args:
        size: an integer, float, or symbolic one.
        kind: `int` or `float`: what to give.
    """
    expression = size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else size
    symbols = getattr(expression, "free_symbols", ())
    if not symbols:
        value = kind(expression)
        return OfN(kind.__name__, str(value) if kind is int else None, lambda n: value)
    if expression in symbols:
        return OfN(kind.__name__, "n", kind)

    def exact(n: int) -> Any:
        return kind(expression.subs(dict.fromkeys(symbols, n)))

    return _written(expression, exact, kind.__name__) or OfN(kind.__name__, None, exact)


def _written(expression: Any, exact: Callable[[int], Any], kind: str) -> OfN | None:
    """The expression as arithmetic; None where that is not possible, or gives other numbers."""
    import sympy  # type: ignore[import-untyped]
    from torch.utils._sympy.printers import PythonPrinter

    n = sympy.Symbol("n", integer=True, positive=True)
    try:
        text = PythonPrinter().doprint(expression.subs(dict.fromkeys(expression.free_symbols, n)))
        found = OfN.read(kind, text)
        right = all(found(each) == exact(each) for each in _TRIED)
    except (ValueError, SyntaxError, ArithmeticError, TypeError, NotImplementedError):
        return None
    return found if right else None
