"""What a docstring of the public face has to say: what each argument is, and what each error means.

An argument is said in `Args:` (for a record `Attributes:` too), or, where a sentence says it all, by its name in
backquotes. An error that a function raises itself is said in `Raises:`, or likewise. Left out are arguments that no
user gives: those of pytest's fixtures, of errors, and of classes that a function makes (`MADE_BY`).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any

# classes that users are handed and do not make
MADE_BY = {
    "Installation": "install",
    "Declared": "declare",
    "ExplicitStep": "explicit_step",
    "Optimized": "optimize",
    "Shadow": "shadow",
    "UserFake": "register_fake_if_exists",
}
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\s*$", re.MULTILINE)


def sections(docstring: str) -> dict[str, str]:
    """The text of each section of a docstring, by its heading; "" is what comes before the first."""
    parts = _SECTION.split(inspect.cleandoc(docstring))
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def listed(section: str) -> set[str]:
    """The names that a section lists: `name:`, `first, second:`, `*args:`."""
    found = re.findall(r"^ {4}(\S[^:\n]*):(?:\s|$)", section, re.MULTILINE)
    return {name.strip().lstrip("*") for names in found for name in names.split(",")}


def complaints(value: Any, path: str) -> Iterator[str]:
    """What is missing in the docstrings of one public name, and of the public methods of a class."""
    if inspect.isclass(value):
        yield from _of_class(value, path)
    elif callable(value):
        yield from _of_function(value, path, value.__doc__ or "")


def _of_class(cls: type, path: str) -> Iterator[str]:
    docstring = vars(cls).get("__doc__") or ""
    if not docstring or docstring.startswith(f"{cls.__name__}("):  # what dataclasses write when nobody has
        yield f"{path}: no docstring"
        return
    if issubclass(cls, Enum):
        return
    if dataclasses.is_dataclass(cls) and "__init__" not in _written(cls):
        said = _said(docstring)
        own = vars(cls).get("__annotations__", {})
        wanted = [each.name for each in dataclasses.fields(cls) if each.name in own and not each.name.startswith("_")]
        yield from (f"{path}: {name} is not in Args" for name in wanted if name not in said)
    elif "__init__" in _written(cls) and not issubclass(cls, BaseException) and cls.__name__ not in MADE_BY:
        init = vars(cls)["__init__"]
        yield from _of_function(init, f"{path}()", docstring + "\n\n" + inspect.cleandoc(init.__doc__ or ""))
    for name, member in vars(cls).items():
        function = _function_of(member)
        if name.startswith(("_", "test_", "pytest_")) or function is None or name not in _written(cls):
            continue
        if not isinstance(member, property) and _overrides(cls, name) and not function.__doc__:
            continue  # its docstring is that of what it overrides
        yield from _of_function(function, f"{path}.{name}", function.__doc__ or "")


def _of_function(function: Any, path: str, docstring: str) -> Iterator[str]:
    if hasattr(function, "_fixture_function_marker") or hasattr(function, "_pytestfixturefunction"):
        if not docstring:
            yield f"{path}: no docstring"
        return
    function = inspect.unwrap(function)
    if not docstring:
        yield f"{path}: no docstring"
        return
    said = _said(docstring)
    for name in parameters(function):
        if name not in ("self", "cls", *said) and not name.startswith("_"):
            yield f"{path}: {name} is not in Args"
    for error in sorted(raised(function)):
        if not re.search(rf"\b{error}\b", docstring):
            yield f"{path}: {error} is not in Raises"


def parameters(function: Any) -> list[str]:
    """The names of a function's parameters; `**settings: Unpack[Settings]` counts as the keys of `Settings`."""
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        unpacked = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
        names += function.__globals__[unpacked[1]].__annotations__ if unpacked else [name]
    return names


def raised(function: Any) -> set[str]:
    """The classes of what a function's own body raises by name; functions inside it are others'."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return set()
    found: set[str] = set()
    pending: list[ast.AST] = list(getattr(tree.body[0], "body", []))
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            if name[:1].isupper() and name != "NotImplementedError":
                found.add(name)
        pending.extend(ast.iter_child_nodes(node))
    return found


def _said(docstring: str) -> set[str]:
    parts = sections(docstring)
    in_prose = {word for quoted in re.findall(r"`([^`\n]+)`", docstring) for word in re.findall(r"\w+", quoted)}
    return in_prose | listed(parts.get("Args", "")) | listed(parts.get("Attributes", ""))


def _written(cls: type) -> set[str]:
    """The methods that stand in the class's source: not those that a decorator has added."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def _function_of(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if hasattr(member, "_fixture_function_marker"):
        return member
    return member if inspect.isfunction(member) else None


def _overrides(cls: type, name: str) -> bool:
    return any(name in vars(base) for base in cls.__mro__[1:])
