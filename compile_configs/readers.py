"""Readers: each takes one value out of a profile and gives it back checked and immutable, or says what is wrong.

A reader is called with the value and with the path of its key, and raises `Wrong` with all it found. It accepts what it
gives back, so the same readers check a parsed TOML file and a dataclass built by hand. `Table` holds them together: a
table of a profile is a frozen dataclass whose fields are its keys, each with `field(metadata=by(reader))`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import Any, TypeVar

from compile_configs.errors import Problem, ProfileError
from compile_configs.version import version_key

T = TypeVar("T", bound="Table")

Reader = Callable[[object, str], Any]

_TOO_LARGE = 1 << 63  # what TOML promises to keep; Python keeps more, and prints no more than 4300 digits
_OF_64_BITS = "an integer of 64 bits"
_TOML_NAMES = {bool: "a boolean", int: "an integer", float: "a float", str: "a string"}


class Wrong(Exception):
    """What a reader raises; it never leaves this package."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems


class Table:
    """A table of a profile. Building one by hand runs the same checks as reading it from a file."""

    __slots__ = ()

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in _keys(type(self)).values()}
        try:
            checked = read_keys(type(self), given, "")
        except Wrong as wrong:
            raise ProfileError.of(getattr(self, "origin", type(self).__name__), wrong.problems) from None
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def by(reader: Reader) -> dict[str, Reader]:
    """The metadata of a field that is a key of its table. Without a default in the field, the key is required."""
    return {"reader": reader}


def read_keys(cls: type[Table], values: Mapping[str, object], path: str) -> dict[str, Any]:
    """All keys of one table; raises `Wrong` with every problem in it and below it."""
    keys = _keys(cls)
    problems: list[Problem] = []
    kept: dict[str, Any] = {}
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in keys:
            known = ", ".join(sorted(keys))
            what = f"unknown key '{prefix}{name}'"
            hint = closest(name, keys, "remove it; example.toml explains every key")
            problems.append(Problem(f"{prefix}{name}", what, _shown(name), f"one of {known}", hint))
    for name, spec in keys.items():
        if name not in values:
            if spec.default is MISSING:
                what = f"missing key '{prefix}{name}'"
                table_name = f"table [{path}]" if path else "the top level"
                hint = "add it; example.toml explains every key"
                problems.append(Problem(f"{prefix}{name}", what, "nothing", f"'{name}' in {table_name}", hint))
        elif values[name] is not spec.default:
            try:
                kept[name] = spec.metadata["reader"](values[name], f"{prefix}{name}")
            except Wrong as wrong:
                problems += wrong.problems
    if problems:
        raise Wrong(*problems)
    return kept


def table(cls: type[T]) -> Reader:
    """Reads one TOML table into `cls`."""

    def read(value: object, at: str) -> T:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _wrong_type(value, at, "a table")
        return cls(**read_keys(cls, value, at))

    return read


def each(reader: Reader, *, unique: str = "") -> Reader:
    """Reads an array. No two entries may be equal, or, with `unique`, have the same value under that key."""

    def read(value: object, at: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _wrong_type(value, at, "an array")
        entries: list[Any] = []
        problems: list[Problem] = []
        first: dict[object, int] = {}
        for n, item in enumerate(value):
            try:
                entry = reader(item, f"{at}[{n}]")
            except Wrong as wrong:
                problems += wrong.problems
                continue
            entries.append(entry)
            same = getattr(entry, unique) if unique else entry
            if (before := first.setdefault(same, n)) != n:
                where = f"{at}[{n}].{unique}" if unique else f"{at}[{n}]"
                expected = f"each one once, and it is in {at}[{before}] already"
                problems.append(_wrong_value(same, where, "is there twice", expected, "remove one of the two"))
        if problems:
            raise Wrong(*problems)
        return tuple(entries)

    return read


def text(value: object, at: str) -> str:
    """Reads a sentence, a name or a source, of which at least one character shows."""
    if not isinstance(value, str):
        raise _wrong_type(value, at, "a string")
    if not value.strip():
        raise Wrong(_wrong_value(value, at, "is empty", "a string with something in it", "fill it in"))
    return value


def matching(pattern: str, expected: str, hint: str) -> Reader:
    """Reads a string that a regular expression accepts."""

    def read(value: object, at: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(value, at, "a string")
        if not re.fullmatch(pattern, value, re.ASCII):
            raise Wrong(_wrong_value(value, at, "has a wrong value", expected, hint))
        return value

    return read


def one_of(choices: Sequence[str]) -> Reader:
    """Reads one of a few fixed words."""

    def read(value: object, at: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(value, at, "a string")
        if value not in choices:
            expected = f"one of {', '.join(choices)}"
            hint = closest(value, choices, "write one of those")
            raise Wrong(_wrong_value(value, at, "has a wrong value", expected, hint))
        return value

    return read


def version_from(oldest: str) -> Reader:
    """Reads a torch version that is not older than `oldest`."""
    expected = f'a torch version such as "2.13" or "2.13.1", and at least "{oldest}"'

    def read(value: object, at: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(value, at, "a string")
        seen, least = version_key(value), version_key(oldest)
        if seen is None:
            raise Wrong(_wrong_value(value, at, "is not a version", expected, "write digits and dots"))
        if least is not None and seen < least:
            hint = "raise it; older ones lack hooks that everything here stands on"
            raise Wrong(_wrong_value(value, at, "is too old", expected, hint))
        return value

    return read


def positive(value: object, at: str) -> int:
    """Reads a count; zero is not one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(value, at, "an integer")
    if not 1 <= value < _TOO_LARGE:
        expected = "an integer of at least 1" if value < 1 else _OF_64_BITS
        raise Wrong(_wrong_value(value, at, "has a wrong value", expected, "correct it, or remove it"))
    return value


def ascending(value: object, at: str) -> tuple[int, ...]:
    """Reads counts that grow; a bucket is looked up by bisection, so order is part of the meaning."""
    sizes: tuple[int, ...] = each(positive)(value, at)
    if not sizes:
        raise Wrong(_wrong_value(value, at, "is empty", "at least one size", "write [8], say"))
    for n, (before, size) in enumerate(pairwise(sizes), 1):
        if size < before:
            expected = f"more than the {before} before it"
            raise Wrong(_wrong_value(size, f"{at}[{n}]", "is out of order", expected, "sort the sizes"))
    return sizes


def scalar(value: object, at: str) -> bool | int | float | str:
    """Reads the value of a torch setting."""
    if type(value) not in _TOML_NAMES:
        raise _wrong_type(value, at, "a boolean, an integer, a float or a string")
    if isinstance(value, int) and not -_TOO_LARGE <= value < _TOO_LARGE:
        raise Wrong(_wrong_value(value, at, "has a wrong value", _OF_64_BITS, "correct it"))
    return value  # type: ignore[return-value]


def _keys(cls: type[Table]) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls) if "reader" in f.metadata}  # type: ignore[arg-type]


def _wrong_type(value: object, at: str, expected: str) -> Wrong:
    seen = f"{_shown(value)}, {_kind(value)}"
    return Wrong(Problem(at, f"'{at}' has a wrong type", seen, expected, f"write {expected} there"))


def _wrong_value(value: object, at: str, fault: str, expected: str, hint: str) -> Problem:
    return Problem(at, f"'{at}' {fault}", _shown(value), expected, hint)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    return _TOML_NAMES.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError) as error:  # a number of too many digits, tables too deep in each other
        return f"{_kind(value)} that cannot be printed ({error})"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def closest(name: object, known: Iterable[str], otherwise: str) -> str:
    """What to do about a name that is not known: take the one that was probably meant, if one is close."""
    from difflib import get_close_matches  # only where something is wrong

    close = get_close_matches(str(name), list(known), n=1)
    return f"did you mean '{close[0]}'?" if close else otherwise
