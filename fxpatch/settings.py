"""Dynamo's and Inductor's settings as a compile profile asks for them: set when their modules arrive, then restored."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxpatch.errors import ProfileError
from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Refused

_MODULES = {"dynamo": "torch._dynamo.config", "inductor": "torch._inductor.config"}


@dataclass(frozen=True)
class Current:
    """The settings a profile names, as they are now; and what is wrong with the names and values, in words."""

    values: tuple[tuple[str, Any], ...]
    wrong: tuple[str, ...]


def settings_patch(table: str, wanted: Mapping[str, Any]) -> Patch[Current]:
    """The record that applies one table of settings.

    Args:
        table: `"dynamo"` or `"inductor"`.
        wanted: setting name (dotted for nested ones, `"triton.cudagraphs"`) -> value.
    """
    module = _MODULES[table]

    def probe(_device: str) -> Current:
        config = sys.modules[module]
        wrong = tuple(filter(None, (_complaint(config, name, value) for name, value in wanted.items())))
        return Current(() if wrong else tuple((name, getattr(config, name)) for name in wanted), wrong)

    def decide(current: Current) -> Needed | NotNeeded | Refused:
        if current.wrong:
            return Refused("; ".join(current.wrong), error=_refusal(table, current.wrong))
        differing = [name for name, value in current.values if value != wanted[name]]
        if not differing:
            return NotNeeded("the settings are as the profile wants them" if wanted else "the profile has no settings")
        return Needed(f"the profile sets {', '.join(differing)}")

    def apply(_device: str, current: Current, edits: Edits) -> str:
        config = sys.modules[module]
        for name, value in current.values:
            if value != wanted[name]:
                edits.set_attr(config, name, wanted[name])
        return ", ".join(f"{name} = {value!r}" for name, value in wanted.items())

    return Patch(
        name=f"{table}-settings",
        why=f"the device's compile profile asks for settings in {module}",
        upstream=f"https://github.com/pytorch/pytorch/blob/v2.13.0/{module.replace('.', '/')}.py",
        until="never: this is torch's own configuration",
        seen_in=("2.11.0", "2.13.0", "2.15.0"),
        targets=(),
        probe=probe,
        decide=decide,
        apply=apply,
        waits_for=(module,),
        per_context=True,
    )


def _refusal(table: str, wrong: tuple[str, ...]) -> ProfileError:
    return ProfileError(
        f"The [{table}] settings of the profile cannot be set.",
        seen="; ".join(wrong),
        expected=f"names and types of {_MODULES[table]}",
        hint="correct the profile; none of its settings in this table is in force",
    )


def _complaint(config: Any, name: str, value: Any) -> str | None:
    try:
        now = getattr(config, name)
    except AttributeError:
        return f"{config.__name__} of torch {torch.__version__} has no setting {name!r}"
    if now is not None and type(now) is not type(value):
        return f"{config.__name__}.{name} is a {type(now).__name__}, and the profile gives {value!r}"
    return None
