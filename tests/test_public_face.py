"""What others rely on is frozen in `public_face.txt`: names, signatures, options, variables, exit statuses, fixtures.

A change there is a decision, and gets a line in CHANGELOG.md. After one: `python tests/test_public_face.py --write`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FROZEN = Path(__file__).with_name("public_face.txt")
PACKAGES = ("fxpatch", "fake_kernels", "compile_configs")
# upper-case words in modules that read the environment, which are no variables
NO_VARIABLES = {"DRIVER"}

sys.path.insert(0, str(ROOT / "docs"))

from generate.api import PAGES, public_names  # noqa: E402
from generate.command_line import commands  # noqa: E402


class _Written:
    """An annotation as it stands in the source."""

    def __init__(self, text: object) -> None:
        self.text = text if isinstance(text, str) else inspect.formatannotation(text)

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> str:
    """`(device: str | None = None, *, strict: bool = False) -> Installation`"""
    given = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [
        each if each.annotation is empty else each.replace(annotation=_Written(each.annotation))
        for each in given.parameters.values()
    ]
    returns = given.return_annotation
    returns = returns if returns is inspect.Signature.empty else _Written(returns)
    return re.sub(r" at 0x[0-9a-f]+", "", str(given.replace(parameters=parameters, return_annotation=returns)))


def name_lines(path: str, value: Any) -> Iterator[str]:
    """A public name in lines: a function's signature, a class's bases, fields and public members."""
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base.__module__ != "abc" and base is not object]
        yield f"{path}({', '.join(bases)})" if bases else path
        if issubclass(value, Enum):
            yield from (f"{path}.{member.name} = {member.value!r}" for member in value)
            return
        if issubclass(value, BaseException):
            return
        if dataclasses.is_dataclass(value):
            yield from (f"{path}.{each.name}: {each.type}" for each in dataclasses.fields(value) if each.name[0] != "_")
        else:
            yield f"{path}.__init__{signature(value)}"
        for name, member in sorted(vars(value).items()):
            if name.startswith(("_", "test_")):
                continue
            if isinstance(member, property):
                yield f"{path}.{name}: property"
            elif isinstance(member, (staticmethod, classmethod)):
                yield f"{path}.{name}{signature(member.__func__)}"
            elif inspect.isfunction(member):
                yield f"{path}.{name}{signature(member)}"
    elif callable(value) and not hasattr(value, "__args__"):
        yield f"{path}{signature(value)}"
        for each in inspect.signature(value).parameters.values():
            unpacked = re.fullmatch(r"Unpack\[(\w+)\]", str(each.annotation))
            keys = value.__globals__[unpacked[1]].__annotations__ if unpacked else {}
            yield from (f"{path}(... {name}: {of})" for name, of in keys.items())
    else:
        yield f"{path}: {type(value).__name__}"


def names() -> Iterator[str]:
    """Every public name, where users import it from."""
    for page in PAGES:
        for module_name in page.modules:
            module = importlib.import_module(module_name)
            for name in sorted(public_names(module)):
                value = getattr(module, name)
                home = getattr(value, "__module__", module_name)
                if home != module_name and any(home in each.modules for each in PAGES):
                    yield f"{module_name}.{name} is {home}.{name}"
                else:
                    yield from name_lines(f"{module_name}.{name}", value)


def command_line() -> Iterator[str]:
    """Every option and positional argument, with its choices and its default."""
    for name, parser in commands():
        for action in parser._actions:
            if isinstance(action, (argparse._SubParsersAction, argparse._HelpAction)):
                continue
            what = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
            default = "" if action.default in (None, argparse.SUPPRESS, False, []) else f" = {action.default!r}"
            yield f"fxpatch {name} {what}{choices}{default}".replace("  ", " ")


def exit_statuses() -> Iterator[str]:
    """What each command says of its exit status."""
    for name, parser in commands():
        if name:
            assert parser.epilog is not None, f"fxpatch {name} says nothing of its exit status"
            assert "exit status" in parser.epilog
            yield f"fxpatch {name}: {' '.join(parser.epilog.split())}"


def environment() -> Iterator[str]:
    """The variables that are read or set: upper-case words in the modules that look at the environment."""
    from torch._dynamo.guards import GuardBuilder

    found: set[str] = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "expandvars") for node in nodes):
            words = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
            found |= {word.lstrip("$") for word in words if re.fullmatch(r"\$?[A-Z][A-Z0-9]+(_[A-Z0-9]+)*", word)}
    yield from sorted(word for word in found - NO_VARIABLES if not hasattr(GuardBuilder, word))


def entry_points() -> Iterator[str]:
    """The names by which torch, pytest, engines and the shell find us."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from (f"command {name} = {target}" for name, target in project["scripts"].items())
    for group, entries in sorted(project["entry-points"].items()):
        yield from (f"{group}: {name} = {target}" for name, target in sorted(entries.items()))
    yield from (f"extra {name}" for name in sorted(project["optional-dependencies"]))


def pytest_plugin() -> Iterator[str]:
    """Fixtures, options and markers that every run of pytest gets."""
    from fxpatch.testing import plugin

    class Recorded(list[str]):
        def getgroup(self, *_: Any) -> Recorded:
            return self

        def addoption(self, name: str, **_: Any) -> None:
            self.append(f"option {name}")

        def addini(self, name: str, help: str, default: Any = None, **_: Any) -> None:
            self.append(f"ini {name} = {default!r}")

        def addinivalue_line(self, what: str, line: str) -> None:
            self.append(f"{what} {line.partition(':')[0]}")

    recorded: Any = Recorded()
    plugin.pytest_addoption(recorded)
    plugin.pytest_configure(recorded)
    yield from recorded
    for name, value in sorted(vars(plugin).items()):
        marker = getattr(value, "_fixture_function_marker", None)
        if marker is not None:
            yield f"fixture {name}, {marker.scope}"


SECTIONS = {
    "names": names,
    "command line": command_line,
    "exit statuses": exit_statuses,
    "environment": environment,
    "entry points": entry_points,
    "pytest": pytest_plugin,
}


def as_now(section: str) -> list[str]:
    """One section as it is in the source."""
    return list(SECTIONS[section]())


def as_frozen() -> dict[str, list[str]]:
    """All sections as they are in the file."""
    parts = re.split(r"^\[(.+)\]\n", FROZEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip().split("\n") for name, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("section", SECTIONS)
def test_it_is_as_it_was(section: str) -> None:
    changed = list(difflib.unified_diff(as_frozen()[section], as_now(section), "frozen", "now", lineterm="", n=0))
    assert changed == [], "\n".join([*changed, "a decision? then: python tests/test_public_face.py --write"])


def test_every_variable_is_on_the_page_of_the_environment() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    assert [name for name in as_frozen()["environment"] if f"`{name}`" not in page] == []
    in_tables = set(re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|", page, re.MULTILINE))
    assert in_tables == set(as_frozen()["environment"])


def test_every_exit_status_is_on_that_page() -> None:
    page = " ".join((ROOT / "docs" / "environment.md").read_text().split())
    for line in as_frozen()["exit statuses"]:
        command, _, statuses = line.partition(": exit status: ")
        assert f"| `{command}` |" in page
        for number in re.findall(r"\b(\d): ", statuses):
            assert f"| {number} |" in page or f"{number}: " in page, line


def test_a_wrong_option_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    from fxpatch.__main__ import main

    for name, _ in commands():
        with pytest.raises(SystemExit) as stop:
            main([name, "--no-such-option"] if name else ["--no-such-option"])
        assert stop.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_a_change_is_seen() -> None:
    """The test above can fail: a parameter that moves, a name that goes, a field that comes."""
    frozen = as_frozen()["names"]
    install = next(line for line in frozen if line.startswith("fxpatch.install("))

    def install_now(device: str | None = None, strict: bool = False) -> None: ...

    assert f"fxpatch.install{signature(install_now)}" != install
    assert len(frozen) > 300
    assert all(line.strip() == line and line for line in frozen)


def write() -> None:
    """Freezes the public face as it is now."""
    text = "\n\n".join("\n".join([f"[{name}]", *as_now(name)]) for name in SECTIONS)
    FROZEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_public_face.py --write")
    write()
