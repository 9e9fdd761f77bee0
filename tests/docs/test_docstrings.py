"""Every public name says what it is, what its arguments are and what it raises."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from docstring_rules import complaints, listed, parameters, raised, sections
from generate.api import PAGES, defined_in, public_names

import fxpatch.layers
from fxpatch.errors import OptionError

# modules of fxpatch.layers that only its other modules use
INSIDE = {"adopted", "exact_match", "shared_state"}


def _public() -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for page in PAGES:
        for module_name in page.modules:
            module = importlib.import_module(module_name)
            found |= {defined_in(module, name): getattr(module, name) for name in public_names(module)}
    return list(found.items())


def test_every_public_name_is_documented() -> None:
    public = _public()
    missing = [said for path, value in public if callable(value) for said in complaints(value, path)]
    assert missing == []
    assert len(public) > 150


def test_every_module_has_its_page_or_is_inside() -> None:
    listed_here = {module.rpartition(".")[2] for page in PAGES for module in page.modules if ".layers." in module}
    assert listed_here | INSIDE == {info.name for info in pkgutil.iter_modules(fxpatch.layers.__path__)}
    assert not listed_here & INSIDE


def test_names_are_found_where_they_are_defined() -> None:
    for path, value in _public():
        home, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(home), name) is value


# -- the rules themselves ----------------------------------------------------------------------------------------------


def nothing(x: int) -> None: ...


def no_argument(x: int, why: str) -> None:
    """Takes `x`, and says nothing of the other.

    Args:
        other: something else.
    """


def no_error(x: int) -> None:
    """Takes `x`.

    Raises:
        ValueError: another one.
    """

    def inner() -> None:
        raise TypeError("not mine")

    if x:
        raise OptionError("what", seen="", expected="", hint="")
    inner()


def all_said(x: int, y: int, *rest: int) -> None:
    """Says it.

    Args:
        x, y: numbers.
        *rest: more of them.

    Raises:
        OptionError: a number is zero.
    """
    if not x:
        raise OptionError("what", seen="", expected="", hint="")


@dataclass
class Fields:
    """A record.

    Attributes:
        first: said.
    """

    first: int
    second: int


class Methods:
    """A class."""

    def __init__(self, size: int) -> None: ...

    def method(self, given: int) -> None:
        """Nothing of what it is given."""

    @property
    def silent(self) -> int:
        return 1


def test_the_rules_find_what_is_missing() -> None:
    assert list(complaints(nothing, "f")) == ["f: no docstring"]
    assert list(complaints(no_argument, "f")) == ["f: why is not in Args"]
    assert list(complaints(no_error, "f")) == ["f: OptionError is not in Raises"]
    assert list(complaints(all_said, "f")) == []
    assert list(complaints(Fields, "C")) == ["C: second is not in Args"]
    assert list(complaints(Methods, "C")) == [
        "C(): size is not in Args",
        "C.method: given is not in Args",
        "C.silent: no docstring",
    ]


def test_docstrings_are_read_as_written() -> None:
    assert listed(sections(all_said.__doc__ or "")["Args"]) == {"x", "y", "rest"}
    assert raised(no_error) == {"OptionError"}
    assert {"memory", "strict"} < set(parameters(fxpatch.simulate))
