"""A page per patch record, made from the record: what is wrong, where, since when, until when, and how it is found."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import fxpatch
from compile_configs import load_profile
from fxpatch import codegen
from fxpatch.fakes import Fakes
from fxpatch.patching import Patch, Target
from fxpatch.repair import patches
from fxpatch.settings import settings_patch

SOURCE = Path(fxpatch.__file__).resolve().parent.parent


def all_patches() -> tuple[Patch[Any], ...]:
    """Every record that `install()` applies, in its order; the settings of an empty profile stand for all profiles."""
    fakes = Fakes(load_profile("musa")).patch()
    return (codegen.PATCH, fakes, *patches(), settings_patch("dynamo", {}), settings_patch("inductor", {}))


def index_page() -> str:
    """The table of all records."""
    rows = "\n".join(f"| [`{p.name}`]({p.name}.md) | {_cell(p.why)} | {_cell(p.until)} |" for p in all_patches())
    return f"""# Patches

Everything that `fxpatch.install()` can change in torch, in the order of application. Each has a probe, and where
nothing is wrong nothing is touched; `print(fxpatch.status())` says what was needed in your process. These pages are
made from the records in the source.

| patch | what is wrong without it | when it can go |
|---|---|---|
{rows}
"""


def page(patch: Patch[Any]) -> str:
    """The page of one record."""
    parts = [
        f"# {patch.name}",
        f"**What is wrong without it.** {_sentence(patch.why)}",
        f"**Upstream.** {_link(patch.upstream)}",
        f"**When it can go.** {_sentence(patch.until)}",
        f"**Seen in torch** {', '.join(patch.seen_in)}, with the signatures below.",
        _targets(patch),
        _arrival(patch),
        "## How it is found",
        "The probe reads and changes nothing; the decision is a pure function of what it has read. `status()` shows "
        "the reason that the decision gives.",
        *(_source(role, function) for role, function in (("Probe", patch.probe), ("Decision", patch.decide))),
        "## What it changes",
        "All edits go through `edits`, which remembers how to take them back.",
        _source("Edits", patch.apply),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _targets(patch: Patch[Any]) -> str:
    if not patch.targets:
        return "**Private names it touches:** none of torch's by name."
    rows = "\n".join(f"| `{each.module}` | `{each.path}` | {_signature(each)} |" for each in patch.targets)
    return (
        "**Private names it touches.** They are checked before anything is changed; if one has moved, the patch is "
        "left out with a warning (`install(strict=True)`: an error).\n\n"
        f"| module | name | parameters expected |\n|---|---|---|\n{rows}"
    )


def _signature(target: Target) -> str:
    return "not called" if target.parameters is None else f"`({target.parameters})`"


def _arrival(patch: Patch[Any]) -> str:
    notes = []
    if patch.waits_for:
        modules = ", ".join(f"`{name}`" for name in patch.waits_for)
        notes.append(f"**Waits for** {modules}: nothing is wrong before that is imported.")
    if patch.per_context:
        notes.append("**Per context.** Its edits live in context variables, as torch's own settings do.")
    if patch.refresh is not None:
        notes.append("**Grows.** It is looked at again at the start of every compilation.")
    return "\n\n".join(notes)


def _source(role: str, function: Any) -> str:
    function = inspect.unwrap(function)
    path = Path(inspect.getsourcefile(function) or "").resolve().relative_to(SOURCE)
    code = textwrap.dedent(inspect.getsource(function)).rstrip()
    return f'**{role}**, in `{path.as_posix()}`:\n\n```{{.python title="{path.as_posix()}"}}\n{code}\n```'


def _link(where: str) -> str:
    return f"[{where.removeprefix('https://')}]({where})" if where.startswith("https://") else _sentence(where)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", ")")) else ".")


def _cell(words: str) -> str:
    return words.replace("|", "\\|")
