"""Whether a command that a page shows exists, with the options it shows. None is run: most take minutes."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from fxpatch.__main__ import parser as command_line

ROOT = Path(__file__).resolve().parents[2]
_TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
_OURS = ("make", "fxpatch", "pytest", "python", "pip")


def complaint(line: str, language: str) -> str | None:
    """What is wrong with one line of a block, in words; None where nothing is, or the line is no command of ours.

    Args:
        line: as on the page. What stands behind two spaces, or behind `#`, is a remark.
        language: in an `indented` block, lines that are no commands are other things than commands.
    """
    line = re.split(r"\s{2,}|\s#", line.strip().removeprefix("$ "))[0]
    while match := re.match(r"[A-Z_]+=\S* ", line):  # variables in front
        line = line[match.end() :]
    words = shlex.split(line, comments=True)
    if not words or (language == "indented" and words[0] not in _OURS):
        return None
    check = _CHECKS.get(words[0])
    if check is None:
        return f"{words[0]} is no command that this test knows"
    return check(words[1:])


def _make(words: list[str]) -> str | None:
    missing = [word for word in words if word not in _TARGETS]
    return f"make has no target {', '.join(missing)}" if missing else None


def _fxpatch(words: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            command_line().parse_args(words)
    except SystemExit as stop:
        return None if stop.code == 0 else said.getvalue()
    return None


def _pytest(words: list[str]) -> str | None:
    plugin = (ROOT / "fxpatch" / "testing" / "plugin.py").read_text()
    own = set(re.findall(r'addoption\("(--[\w-]+)"', plugin))
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((f"pytest has no {option}" for option in options if option not in own), None)


def _python(words: list[str]) -> str | None:
    if words[:2] == ["-m", "fxpatch"]:
        return _fxpatch(words[2:])
    if words and words[0] == "-c":
        compile(words[1], "a page", "exec")
        return None
    script = next((word for word in words if not word.startswith("-")), "")
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    source = (ROOT / script).read_text()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((f"{script} has no {option}" for option in options if f'"{option}"' not in source), None)


def _pip(words: list[str]) -> str | None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    if words[:1] != ["install"]:
        return "pip without install"
    for word in words[1:]:
        wanted = re.fullmatch(r"fxpatch(?:\[([\w,]+)\])?", word)
        if wanted and wanted[1]:
            missing = [extra for extra in wanted[1].split(",") if extra not in extras]
            if missing:
                return f"there is no extra {missing}"
    return None


_CHECKS = {"make": _make, "fxpatch": _fxpatch, "pytest": _pytest, "python": _python, "pip": _pip}
