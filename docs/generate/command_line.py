"""The page of the command line, made from its parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from fxpatch.__main__ import parser as command_line

_WIDTH = 100


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command with its parser, in the parser's order; `""` is `fxpatch` itself."""
    parser = command_line()
    yield "", parser
    for action in parser._actions:  # argparse has no public way to its commands
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def page() -> str:
    """The page's Markdown."""
    parts = [
        "# The command line",
        "`fxpatch COMMAND`, also as `python -m fxpatch`. Results go to stdout or to the files named, progress and "
        "errors to stderr.",
    ]
    for name, parser in commands():
        parts.append(f"## fxpatch {name}".rstrip())
        parser.formatter_class = _formatter(parser.formatter_class)
        parts.append(f"```text\n{parser.format_help().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _formatter(base: Any) -> type[argparse.HelpFormatter]:
    """The parser's own, at a width that does not depend on the terminal, and without colours."""

    class Fixed(base):  # type: ignore[misc]
        def __init__(self, prog: str, **given: object) -> None:
            super().__init__(prog, **{**given, "width": _WIDTH})

    return Fixed
