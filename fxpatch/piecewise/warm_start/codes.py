"""Finding again, in another process, the functions that Dynamo went through, to compare what they are made of.

A code object knows its file and its qualified name. The module of that file is looked through from that name: the
function itself, what it wraps, closes over and contains. Nothing is imported for it, and the file is not read: what
counts is the code that this process would run.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from fxpatch.piecewise.warm_start.fingerprints import of_code
from fxpatch.piecewise.warm_start.graph_json import Json, NotCacheableError

_STANDARD = os.path.realpath(sysconfig.get_path("stdlib"))
_TORCH = os.path.dirname(os.path.realpath(torch.__file__))


def has_a_version(code: CodeType) -> bool:
    """Whether code belongs to Python, torch or this package's way of tracing: the key holds what says what it is."""
    file = code.co_filename
    if file.startswith("<frozen") or (code.co_qualname, code.co_names, file) == ("traced", ("function",), "<string>"):
        return True
    path = os.path.realpath(file)
    standard = path.startswith(_STANDARD + os.sep) and "site-packages" not in path
    return path.startswith(_TORCH + os.sep) or standard


def written(codes: Iterable[CodeType], known: Collection[CodeType]) -> list[Json]:
    """`[module, qualified name, fingerprint]` of each function that has no version.

    Args:
        codes: what was gone through.
        known: of these, what is compared elsewhere too, and need not be found.

    Raises:
        NotCacheableError: one cannot be found again by name.
    """
    found = []
    modules = _modules()
    others = {id(each) for each in known}
    for code in {id(each): each for each in codes if not has_a_version(each)}.values():
        module = modules.get(os.path.realpath(code.co_filename), "__main__")
        record = [module, code.co_qualname, of_code(code)]
        if difference(record) is not None:
            if id(code) in others:
                continue
            raise NotCacheableError(
                f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}) cannot be found by its name"
            )
        found.append(record)
    return sorted(found)


def difference(record: Json) -> str | None:
    """How the code of this process differs from a record, in words."""
    name, qualified, wanted = record
    module = sys.modules.get(name)
    if module is None:
        return f"the module {name} is not imported"
    seen = False
    for code in _candidates(module, qualified):
        seen = True
        if of_code(code) == wanted:
            return None
    return f"{name}.{qualified} has changed" if seen else f"{name} has no {qualified} any more"


def _modules() -> dict[str, str]:
    """File -> the module that was made from it; `__main__` where it has several names."""
    found: dict[str, str] = {}
    for name in ("__main__", *list(sys.modules)):
        file = getattr(sys.modules.get(name), "__file__", None)
        if isinstance(file, str):
            found.setdefault(os.path.realpath(file), name)
    return found


def _candidates(module: Any, qualified: str) -> Iterator[CodeType]:
    """The code objects of that qualified name that are reached from a module."""
    value: Any = module
    for part in qualified.split(".<locals>.")[0].split("."):
        value = inspect.getattr_static(value, part, None)
    seen: set[int] = set()
    yield from (code for code in _codes(value, seen) if code.co_qualname == qualified)
    # a decorator may have put it under another name, or out of reach of its own: look at all that the module defines
    yield from (code for each in list(vars(module).values()) for code in _codes(each, seen, module.__name__)
                if code.co_qualname == qualified)  # fmt: skip


def _codes(value: Any, seen: set[int], module: str | None = None) -> Iterator[CodeType]:
    if id(value) in seen or value is None:
        return
    seen.add(id(value))
    if isinstance(value, CodeType):
        yield value
        for each in value.co_consts:
            if isinstance(each, CodeType):
                yield from _codes(each, seen)
    elif isinstance(value, FunctionType):
        yield from _codes(value.__code__, seen)
        for within in (getattr(value, "__wrapped__", None), *map(_cell, value.__closure__ or ())):
            if isinstance(within, (FunctionType, MethodType, functools.partial)):
                yield from _codes(within, seen)
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from _codes(value.__func__, seen)
    elif isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            yield from _codes(part, seen)
    elif isinstance(value, (functools.partial, functools.cached_property)):
        yield from _codes(value.func, seen)
    elif isinstance(value, type) and (module is None or value.__module__ == module):
        for each in list(vars(value).values()):
            yield from _codes(each, seen)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
