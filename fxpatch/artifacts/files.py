"""`fxpatch.save` and `fxpatch.load`: one file for a graph, an exported program or compiled code.

    fxpatch.save(graph_module, "model.fx")
    graph_module = fxpatch.load("model.fx", device="npu")   # another name for the backend, another index, the CPU

A file says what it needs before anything of it is made, and what cannot be had is refused with an error that says what
to import or to ask for; what is loaded is whole. Whoever wrote it: loading a graph runs nothing and unpickles nothing.
What can only be loaded by running code is loaded only when it is trusted (`fxpatch.artifacts.trust`).
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import fxpatch
from fxpatch.artifacts import compiled, exported, graph, modules, tensors
from fxpatch.artifacts.container import Opened, damaged, pack
from fxpatch.artifacts.devices import Asked, Devices, private_name
from fxpatch.artifacts.trust import KEY_VARIABLE, DistrustedError, key, key_file, read_and_judge
from fxpatch.artifacts.vocabulary import NotTrustedError, NotWritableError, Vocabulary
from fxpatch.drivers import driver_versions
from fxpatch.errors import ArtifactError, FxPatchError, FxPatchWarning, UntrustedArtifactError
from fxpatch.versions import imported_versions

_RUNS_CODE = {
    "exported": "torch evaluates expressions of an exported program when it reads it",
    "caches": "compiler caches are pickles and machine code",
    "function": "a compiled function is a pickle and machine code",
}


def save(what: Any, path: str | os.PathLike[str]) -> str:
    """Writes one file, whole or not at all, and signs it with this user's key (made at the first save).

    Args:
        what: a `torch.fx.GraphModule`; a `torch.export.ExportedProgram`; what `torch.compiler.save_cache_artifacts()`
            returned; or what `torch.compile(f, fullgraph=True).aot_compile(((args), {kwargs}))` returned.
        path: of the file; what is there is replaced. Its directory exists.

    Returns:
        SHA-256 of the file, hexadecimal: what somebody else passes as `trust=`.

    Raises:
        ArtifactError: it is nothing of that kind, or holds what has no form in a file.
        TargetMovedError: torch has moved a private name that this kind needs.
        OSError: the file cannot be written.
    """
    content = dumps(what)
    _write(Path(path), content)
    return Opened(content).sha256


def load(
    path: str | os.PathLike[str],
    *,
    device: Asked = None,
    unpin: bool = False,
    trust: str | None = None,
    names: dict[str, object] | None = None,
) -> Any:
    """Reads what `save` wrote.

    Args:
        path: of the file.
        device: where it is to live: None, where it was; `"npu"`, on the accelerator of this name, each index as it was;
            `"npu:1"`, there; `"cpu"`; or a mapping, `{"musa:0": "npu:1", "musa:1": "cpu"}`.
        unpin: device literals in the graph lose their index, and mean the device that is current when it runs.
        trust: SHA-256 of the file, hexadecimal: says that this file may run code although this user did not save it.
        names: the globals of a compiled function, where it uses any.

    Returns:
        A GraphModule, an ExportedProgram, a compiled function, or, once they are in torch's caches, a `CacheInfo`.

    Raises:
        ArtifactError: the file is damaged, or what is asked for makes no sense.
        UntrustedArtifactError: loading it could run code, and it is not shown to be this user's.
        MissingHereError: this process lacks a device, an operator, a function or the torch that it needs.
        OSError: the file cannot be read.
    """
    content, others = read_and_judge(Path(path))
    return _load(content, others, device, unpin, trust, names, str(path))


def loads(
    content: bytes,
    *,
    device: Asked = None,
    unpin: bool = False,
    trust: str | None = None,
    names: dict[str, object] | None = None,
) -> Any:
    """`load` for a file's bytes: what kind of file they come from is not looked at, only who signed them."""
    return _load(content, None, device, unpin, trust, names, "the bytes")


def dumps(what: Any) -> bytes:
    """What `save` writes, as bytes."""
    try:
        secret = key(make=True)
    except DistrustedError as error:
        secret = None
        warnings.warn(f"the artifact is not signed: {error}", FxPatchWarning, stacklevel=3)
    manifest, members = _described(what)
    if secret is None and manifest["kind"] in _RUNS_CODE:
        raise ArtifactError(
            "This cannot be saved without a key: nobody could load it.",
            seen=f"no key can be made at {key_file()}",
            expected=f"a directory of this user's own; {_RUNS_CODE[manifest['kind']]}",
            hint=f"name a file in one by {KEY_VARIABLE}",
        )
    return pack(manifest, members, secret)


# -- saving ------------------------------------------------------------------------------------------------------------


def _described(what: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    private = private_name()
    manifest: dict[str, Any] = {
        "fxpatch": fxpatch.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": private,
        "driver": list(driver_versions(private)) if private else [],
        "vendor": imported_versions((f"torch_{private}", "torchada")) if private else {},
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


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# -- loading -----------------------------------------------------------------------------------------------------------


def _load(
    content: bytes,
    others: str | None,
    device: Asked,
    unpin: bool,
    trusted: str | None,
    names: dict[str, object] | None,
    where: str,
) -> Any:
    opened = Opened(content)
    doubt = _doubt(opened, others, trusted, where)
    if opened.kind in _RUNS_CODE and doubt is not None:
        raise _untrusted(_RUNS_CODE[opened.kind], doubt, opened, where)
    try:
        return _READERS[opened.kind](opened, doubt is None, device, unpin, names)
    except NotTrustedError as error:
        raise _untrusted(f"it names {error}", str(doubt), opened, where) from error
    except FxPatchError:
        raise
    except Exception as error:  # of any class: hashes match, so somebody wrote it like this, or torch reads it no more
        raise damaged(f"{type(error).__name__}: {str(error)[:300]}") from error


def _doubt(opened: Opened, others: str | None, trusted: str | None, where: str) -> str | None:
    """Why a file is not believed; None where it is."""
    if trusted is not None:
        if trusted.strip().lower() != opened.sha256:
            raise UntrustedArtifactError(
                "This is not the file that trust= names.",
                seen=f"{where} with SHA-256 {opened.sha256}",
                expected=f"SHA-256 {trusted}",
                hint="ask whoever saved it for the hash that fxpatch.save() returned",
            )
        return None
    if others is not None:
        return others
    try:
        signed = opened.is_signed_by(key())
    except DistrustedError as error:
        return str(error)
    return None if signed else "it was not saved with this user's key"


def _untrusted(why: str, doubt: str, opened: Opened, where: str) -> UntrustedArtifactError:
    return UntrustedArtifactError(
        "This artifact is not loaded, because that could run code of somebody else's.",
        seen=f"{where}: {why}; {doubt}",
        expected="a file that this user saved, which nobody else can write to and which is as it was saved",
        hint=f"if you trust whoever saved it, pass trust={opened.sha256!r}; or share the key file ({KEY_VARIABLE})",
    )


def _read_graph(opened: Opened, trusted: bool, device: Asked, unpin: bool, names: Any) -> torch.nn.Module:
    where = Devices(_devices(opened), device, unpin=unpin)
    held = tensors.read(opened.document("tensors.json"), opened.raw, where)
    table, root = opened.document("modules.json"), opened.manifest["root"]
    found = modules.read(table, root, Vocabulary(trusted=trusted), where, held)
    if not isinstance(found, torch.fx.GraphModule):
        raise damaged(f"its root is a {type(found).__qualname__}")
    return found


def _read_exported(opened: Opened, trusted: bool, device: Asked, unpin: bool, names: Any) -> Any:
    where = Devices(_devices(opened), device, unpin=unpin)
    held = tensors.read(opened.document("tensors.json"), opened.raw, where)
    return exported.read(opened.document("program.json"), opened.document("exported.json"), where, held)


def _read_caches(opened: Opened, trusted: bool, device: Asked, unpin: bool, names: Any) -> Any:
    _check_compiled(opened, device, unpin)
    return compiled.load_caches(opened.raw("payload"))


def _read_function(opened: Opened, trusted: bool, device: Asked, unpin: bool, names: Any) -> Any:
    _check_compiled(opened, device, unpin)
    return compiled.load_function(opened.raw("payload"), names)


def _check_compiled(opened: Opened, device: Asked, unpin: bool) -> None:
    saved: Mapping[str, Any] = opened.manifest["compiled for"]
    if unpin or (device is not None and str(device) != saved["device"]):
        raise ArtifactError(
            "Compiled kernels cannot be moved to another device.",
            seen=f"device={str(device)!r}, unpin={unpin}; the kernels are for {saved['device']!r}",
            expected="no device=",
            hint="save the GraphModule or ExportedProgram, load that with device=, and compile it there",
        )
    compiled.check(saved)


def _devices(opened: Opened) -> list[str]:
    found = opened.manifest["devices"]
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise damaged("its devices are no list of names")
    return found


_READERS: dict[str, Callable[[Opened, bool, Asked, bool, Any], Any]] = {
    "graph": _read_graph,
    "exported": _read_exported,
    "caches": _read_caches,
    "function": _read_function,
}
