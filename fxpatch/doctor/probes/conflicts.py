"""Who else has changed what fxpatch repairs: redundant and conflicting patches."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import torch

from fxpatch import codegen
from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import listed
from fxpatch.doctor.probes.fx import expect_as_interpreted, graph_module
from fxpatch.errors import TargetMovedError
from fxpatch.patching import Patch
from fxpatch.repair import patches
from fxpatch.repair.device_class import REAL

_TORCHADA_REPAIRS_FX = (0, 1, 94)


def _patches() -> tuple[Patch[Any], ...]:
    return (codegen.PATCH, *patches())


def home(function: Any) -> str:
    """The module in which a function's code was written, whatever name it has been given since; a context manager's is
    that of its body."""
    scope = getattr(function, "__globals__", {}).get("__name__")
    if scope == "contextlib" and hasattr(function, "__wrapped__"):
        return home(function.__wrapped__)
    return str(scope or getattr(function, "__module__", None) or "")


def _wrapped_codegen() -> str:
    """Who has wrapped `CodeGen._gen_python_code`, other than fxpatch; empty for nobody."""
    owner = home(torch.fx.graph.CodeGen._gen_python_code)
    return "" if owner == "torch.fx.graph" or owner.startswith("fxpatch.") else owner


def _conflicts(subject: Subject) -> str:
    moved, others = [], []
    for patch in _patches():
        for target in patch.targets:
            try:
                found = target.resolve()
            except TargetMovedError as error:
                moved.append(f"{patch.name}: {error.seen}")
                continue
            owner = home(found) if callable(found) and target.parameters is not None else ""
            if owner and not owner.startswith(("torch.", "fxpatch.")) and owner != "torch":
                others.append(f"{target.module}.{target.path} is {owner}'s")
    wrapper = _wrapped_codegen()
    if wrapper:
        _keeps_text(subject, wrapper)
    if moved:
        raise Broken(listed(moved), why="fxpatch leaves such a patch out, and says so in status()")
    if redundant := _redundant(wrapper):
        raise Broken(
            redundant, why="two repairs of one thing: slower, and hard to tell apart", todo="remove the older one"
        )
    return (
        f"{listed(sorted(set(others)))}: fxpatch builds on it"
        if others
        else "nobody else has changed what fxpatch repairs"
    )


def _keeps_text(subject: Subject, wrapper: str) -> None:
    """Raises:
    Broken: the wrapper changes data, not only devices.
    """
    device = REAL(subject.device) if subject.device == "cpu" else REAL(subject.device, 0)
    try:
        expect_as_interpreted(graph_module("text that looks like one", device, "x"))
    except Exception as error:
        raise Broken(
            f"{wrapper} rewrites FX's generated code and changes text in it: {error}",
            why="a rewrite by regular expression changes strings, keys and messages that look like a device "
            "(out-of-tree catalogue S5)",
            todo=f"remove the patch of CodeGen._gen_python_code in {wrapper}: fxpatch.install() does what it is for",
        ) from error


def _redundant(wrapper: str) -> str:
    """A wrapper like SGLang's beside a torchada that has repaired the cause; in words."""
    if not wrapper or "torchada" not in sys.modules:
        return ""
    version = importlib.metadata.version("torchada")
    parts = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if parts < _TORCHADA_REPAIRS_FX:
        return ""
    return f"{wrapper} rewrites FX's generated code, and torchada {version} has repaired the cause"


PROBES = (
    Probe(
        name="conflicts",
        stage="versions",
        title="redundant or conflicting patches",
        run=_conflicts,
        why="engines and vendors patch the same private names; the last one wins, and an older patch can undo or "
        "damage what a newer one repairs (out-of-tree catalogue 0.2, 2.3)",
        todo="remove the other patch where fxpatch covers it; else report it to fxpatch",
        installs=False,
    ),
)
