"""What two processes compare of code and values: the same text in both exactly where the same would be traced.

Code is compared as bytecode, constants and names, not as a file: what a process has imported is what it runs, and a
file may have changed since. Line numbers do not count, so a comment above a function changes nothing.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

_PLAIN: tuple[type, ...] = (
    *(int, float, complex, bool, str, bytes, range, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def of_code(code: CodeType) -> str:
    """Of a code object and those within it."""
    parts = [
        code.co_code.hex(),
        str(code.co_names),
        str(code.co_varnames),
        str(code.co_freevars),
        str(code.co_cellvars),
    ]
    parts += [str(code.co_flags), str(code.co_argcount), str(code.co_kwonlyargcount), str(code.co_posonlyargcount)]
    for each in code.co_consts:
        if isinstance(each, CodeType):
            parts.append(of_code(each))
        elif isinstance(each, frozenset):
            parts.append(f"frozenset {sorted(map(repr, each))}")
        else:
            parts.append(f"{type(each).__name__} {each!r}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def of_function(function: Any) -> str:
    """Of a function: its code, its defaults, what it closes over, and the same of what it wraps."""
    function = inspect.unwrap(function)
    if isinstance(function, functools.partial):
        return f"partial {of_function(function.func)} {of_value(function.args)} {of_value(function.keywords)}"
    if isinstance(function, MethodType):
        return f"method {of_function(function.__func__)} of {type(function.__self__).__qualname__}"
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    cells = [_cell(cell) for cell in function.__closure__ or ()]
    return f"{function.__qualname__} {of_code(code)} {of_value(function.__defaults__)} {cells}"


def _cell(cell: Any) -> str:
    try:
        value = cell.cell_contents
    except ValueError:  # not filled yet
        return "empty"
    return of_value(value) if plain(value) is not None else type(value).__qualname__


def plain(value: Any) -> str | None:
    """A value made of numbers, strings and the like, in words; None for any other."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, _PLAIN) and type(value) in _PLAIN:
        return f"{type(value).__name__} {value.hex() if isinstance(value, float) else repr(value)}"
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, functools.partial)):
        return of_function(value)
    if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return f"{type(value).__name__} {value}"
    if callable(value) and isinstance(getattr(value, "__name__", None), str):  # a method of a C class, a ufunc
        return f"{type(value).__name__} {getattr(value, '__qualname__', value.__name__)}"
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and getattr(value, "shape", None) == ():
        return f"{type(value).__name__} {value.tobytes().hex()}"
    if isinstance(value, dict):
        parts = [(plain(key), plain(each)) for key, each in value.items()]
        return None if any(None in each for each in parts) else f"{type(value).__name__} {parts}"
    if isinstance(value, (tuple, list, set, frozenset)):
        found = [plain(each) for each in value]
        if None in found:
            return None
        return f"{type(value).__name__} {sorted(map(str, found)) if isinstance(value, (set, frozenset)) else found}"
    if isinstance(value, slice):
        return f"slice {plain((value.start, value.stop, value.step))}"
    return None


def of_tensor(value: torch.Tensor) -> str:
    """Of a tensor that is bound to a graph: all but its values."""
    strides = list(value.stride()) if value.layout is torch.strided else value.layout
    return (
        f"{type(value).__qualname__} {value.dtype} {value.device} {list(value.shape)} {strides} {value.requires_grad} "
        f"{torch._C._dispatch_keys(value)}"
    )


def of_value(value: Any) -> str:
    """Of any value: what is plain by its content, a tensor by its form, everything else by its type."""
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    found = plain(value)
    return found if found is not None else f"a {type(value).__module__}.{type(value).__qualname__}"
