"""Which forward an operator runs, for the length of a context. The problem: `forward` is one attribute that tracing,
trials and several threads want to change, and a class is shared by models that nobody asked about. The rule: only the
instance attribute `forward` is set, all contexts that are open for an instance form a stack of which the youngest
rules, and when the last closes, in whatever order they close, the instance is exactly as it was.

The attribute is shared by all threads; what runs while two threads disagree is the younger context's choice.

What is set is a function whose code carries a file name of its own (`<fxpatch native layers.0.act>`): stack traces,
and so the nodes of a graph traced meanwhile, say whose forward they came from (see `absence`)."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxpatch.errors import FxPatchWarning
from fxpatch.native.operators import NativeOperator

NATIVE, OPTIMIZED = "native", "optimized"
_ABSENT = object()
_lock = threading.RLock()


@dataclass
class _Overridden:
    """An instance while contexts are open for it."""

    module: nn.Module
    before: object
    stack: list[tuple[object, Callable[..., Any]]] = field(default_factory=list)


_overridden: dict[int, _Overridden] = {}


def marker(kind: str, name: str) -> str:
    """The file name in the stack traces of what operator `name` ran as its `kind` of forward."""
    return f"<fxpatch {kind} {name}>"


@contextlib.contextmanager
def running(chosen: Iterable[tuple[NativeOperator, str]]) -> Iterator[None]:
    """Makes each operator run its `"native"` or `"optimized"` forward until the context closes. Contexts nest."""
    with replaced((op, marked(getattr(op, kind), marker(kind, op.name))) for op, kind in chosen):
        yield


@contextlib.contextmanager
def native(operators: Iterable[NativeOperator]) -> Iterator[None]:
    """Makes all operators run `forward_native` until the context closes; no class is edited. Contexts nest."""
    with running((op, NATIVE) for op in operators):
        yield


@contextlib.contextmanager
def replaced(forwards: Iterable[tuple[NativeOperator, Callable[..., Any]]]) -> Iterator[None]:
    """Makes each operator's `forward` the function given, until the context closes."""
    token = object()
    entered: list[NativeOperator] = []
    try:
        for op, function in forwards:
            entered.append(op)
            _push(op.module, token, function)
        yield
    finally:
        for op in reversed(entered):
            _drop(op.module, token)


def marked(function: Callable[..., Any], filename: str) -> Callable[..., Any]:
    """A function that calls `function`, with code of its own that carries `filename`.

    Code of its own, since Dynamo keeps what it compiles, and counts recompilations, per code object.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = forward.__code__.replace(co_filename=filename)
    made = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    return functools.wraps(function)(made)


def _push(module: nn.Module, token: object, function: Callable[..., Any]) -> None:
    with _lock:
        entry = _overridden.get(id(module))
        if entry is None:
            before = module.__dict__.get("forward", _ABSENT)
            entry = _overridden[id(module)] = _Overridden(module, before)
        entry.stack.append((token, function))
        module.__dict__["forward"] = function


def _drop(module: nn.Module, token: object) -> None:
    with _lock:
        entry = _overridden.get(id(module))
        if entry is None:  # what was about to be set was interrupted
            return
        ours = entry.stack[-1][1]
        entry.stack = [(owner, function) for owner, function in entry.stack if owner is not token]
        if not entry.stack:
            del _overridden[id(module)]
        if module.__dict__.get("forward", _ABSENT) is not ours:
            message = f"forward of a {type(module).__name__} was changed by somebody else meanwhile: left as it is"
            warnings.warn(message, FxPatchWarning, stacklevel=2)
        elif entry.stack:
            module.__dict__["forward"] = entry.stack[-1][1]
        elif entry.before is _ABSENT:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = entry.before
