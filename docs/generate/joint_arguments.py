"""Two habits of our docstrings that griffe does not know: `rtol, atol: as of ...` says once what two arguments have in
common, and `**settings: Unpack[Settings]` is described by the keys of `Settings`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEADING = re.compile(r"^\s*(Args|Attributes|Raises):\s*$")
_ENTRY = re.compile(r"^(\s+)(\S[^:`]*, [^:`]*): (.*)$")


class JointArguments(griffe.Extension):
    """Takes both apart before griffe reads a docstring."""

    def on_object(self, *, obj: griffe.Object, **_kwargs: Any) -> None:
        """Called by griffe for every object; `obj` is the one it has just read."""
        if obj.docstring is not None:
            obj.docstring.value = apart(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_kwargs: Any) -> None:
        """Called by griffe for every function; `func` is the one it has just read."""
        for parameter in list(func.parameters):
            annotation = parameter.annotation
            if isinstance(annotation, griffe.ExprSubscript) and annotation.canonical_path == "typing.Unpack":
                assert isinstance(annotation.slice, griffe.Expr)
                func.parameters = griffe.Parameters(
                    *(each for each in func.parameters if each is not parameter),
                    *_keywords(func.modules_collection[annotation.slice.canonical_path]),
                )


def _keywords(settings: griffe.Object) -> list[griffe.Parameter]:
    """The keys of a `TypedDict(total=False)` as keyword arguments."""
    kind = griffe.ParameterKind.keyword_only
    return [
        griffe.Parameter(name, annotation=member.annotation, kind=kind, default="...")
        for name, member in settings.members.items()
        if isinstance(member, griffe.Attribute)
    ]


def apart(docstring: str) -> str:
    """`first, second: what both are` as two entries; everything else as it is."""
    done: list[str] = []
    lines = docstring.split("\n")
    inside, number = None, 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if _HEADING.match(line):
            inside = len(line) - len(line.lstrip())
        elif line.strip() and inside is not None and len(line) - len(line.lstrip()) <= inside:
            inside = None
        found = _ENTRY.match(line) if inside is not None else None
        if found is None or len(found[1]) != (inside or 0) + 4:
            done.append(line)
            continue
        more: list[str] = []
        while number < len(lines) and lines[number].startswith(found[1] + " "):
            more.append(lines[number])
            number += 1
        for name in found[2].split(", "):
            done += [f"{found[1]}{name}: {found[3]}", *more]
    return "\n".join(done)
