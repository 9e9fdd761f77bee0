"""Reading an artifact: is it trusted, what kind is it, and where is it to live.

Hashes and the signature are checked before anything is made of the content; what could run code is refused where
nothing shows that this user saved it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxpatch.artifacts import compiled, exported, modules, tensors
from fxpatch.artifacts.container import Opened, damaged
from fxpatch.artifacts.devices import Asked, Devices
from fxpatch.artifacts.trust import KEY_VARIABLE, DistrustedError, key
from fxpatch.artifacts.vocabulary import NotTrustedError, Vocabulary
from fxpatch.errors import ArtifactError, FxPatchError, UntrustedArtifactError

RUNS_CODE = {
    "exported": "torch evaluates expressions of an exported program when it reads it",
    "caches": "compiler caches are pickles and machine code",
    "function": "a compiled function is a pickle and machine code",
}


def read(
    content: bytes,
    others: str | None,
    device: Asked,
    unpin: bool,
    trusted: str | None,
    names: dict[str, object] | None,
    where: str,
) -> Any:
    """What a file holds, or an error: nothing is half loaded, and code runs only where the file is trusted.

    Args:
        content: of the file.
        others: how others could have written to it, in words; None: they could not.
        device, unpin, names: as of `fxpatch.load`.
        trusted: SHA-256 of a file that may run code whoever wrote it.
        where: what the content is called in errors.

    Raises:
        ArtifactError, UntrustedArtifactError, MissingHereError: as of `fxpatch.load`.
    """
    opened = Opened(content)
    doubt = _doubt(opened, others, trusted, where)
    if opened.kind in RUNS_CODE and doubt is not None:
        raise _untrusted(RUNS_CODE[opened.kind], doubt, opened, where)
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
