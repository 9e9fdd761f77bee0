"""What is written of an artifact: a manifest that says what it needs, and members that hold it."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch

import fxpatch
from fxpatch.artifacts import compiled, exported, graph, modules, tensors
from fxpatch.artifacts.devices import Devices
from fxpatch.artifacts.vocabulary import NotWritableError, Vocabulary
from fxpatch.drivers import driver_versions, vendor_packages
from fxpatch.errors import ArtifactError
from fxpatch.privateuse1 import private_name
from fxpatch.versions import imported_versions


def described(what: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the members of a file, for each kind of artifact.

    Args:
        what: as of `fxpatch.save`.

    Raises:
        ArtifactError: it is nothing of that kind, or holds what has no form in a file.
        TargetMovedError: torch has moved a private name that this kind needs.
    """
    private = private_name()
    manifest: dict[str, Any] = {
        "fxpatch": fxpatch.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": private,
        "driver": list(driver_versions(private)) if private else [],
        "vendor": imported_versions(vendor_packages(private)) if private else {},
    }
    try:
        if isinstance(what, torch.fx.GraphModule):
            return _graph(what, manifest)
        if isinstance(what, torch.export.ExportedProgram):
            return _exported(what, manifest)
    except NotWritableError as error:
        raise ArtifactError(
            "This graph cannot be saved.",
            seen=str(error),
            expected="operators, functions and modules that have a name; tensors; and plain data",
            hint="put what is named into an operator, a parameter or a buffer, or take it out of the graph",
        ) from error
    if compiled.is_caches(what) or compiled.is_function(what):
        device = compiled.device_of(what)
        manifest.update({"kind": "caches" if compiled.is_caches(what) else "function", "devices": []})
        manifest["compiled for"] = compiled.system(device)
        return manifest, {"payload": compiled.payload(what)}
    raise ArtifactError(
        "There is no artifact of this.",
        seen="None: torch has compiled nothing that it caches" if what is None else f"a {type(what).__qualname__}",
        expected="a GraphModule, an ExportedProgram, what save_cache_artifacts() or aot_compile() of torch returned",
        hint="trace a module first: torch.fx.symbolic_trace(module) or torch.export.export(module, args)",
    )


def _graph(what: torch.fx.GraphModule, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    table, notes = tensors.Writer(), graph.Notes()
    tree = modules.Tree(table, notes)
    root = tree.add(what)
    devices = sorted(table.devices | notes.devices)
    manifest.update({"kind": "graph", "root": root, "devices": devices, "left out": sorted(notes.left_out)})
    told = {"modules.json": tree.document(), "tensors.json": table.document()}
    _check_readable(told, root, devices, table.members)
    return manifest, {**{name: json.dumps(each).encode() for name, each in told.items()}, **table.members}


def _check_readable(told: dict[str, Any], root: int, devices: list[str], members: dict[str, bytes]) -> None:
    """That it can be loaded: now, and not when it is needed. On the meta device, which takes no memory."""
    meta = Devices(devices, dict.fromkeys(devices, "meta"))
    try:
        held = tensors.read(told["tensors.json"], members.__getitem__, meta)
        modules.read(told["modules.json"], root, Vocabulary(trusted=True), meta, held)
    except Exception as error:  # of any class: the modules may be the user's
        raise NotWritableError(f"what was written cannot be read: {type(error).__name__}: {error}") from error


def _exported(what: torch.export.ExportedProgram, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    table, named = tensors.Writer(), set[str]()
    members = exported.written(what, table, named)
    manifest.update({"kind": "exported", "devices": sorted(named | table.devices)})
    return manifest, {**members, "tensors.json": json.dumps(table.document()).encode(), **table.members}
