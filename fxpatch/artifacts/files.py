"""`fxpatch.save` and `fxpatch.load`: one file for a graph, an exported program or compiled code.

    fxpatch.save(graph_module, "model.fx")
    graph_module = fxpatch.load("model.fx", device="npu")   # another name for the backend, another index, the CPU

A file says what it needs before anything of it is made, and what cannot be had is refused with an error that says what
to import or to ask for; what is loaded is whole. Whoever wrote it: loading a graph runs nothing and unpickles nothing.
What can only be loaded by running code is loaded only when it is trusted (`fxpatch.artifacts.trust`).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from fxpatch.artifacts.container import Opened, pack
from fxpatch.artifacts.devices import Asked
from fxpatch.artifacts.loading import RUNS_CODE, read
from fxpatch.artifacts.saving import described
from fxpatch.artifacts.trust import KEY_VARIABLE, DistrustedError, key, key_file, read_and_judge
from fxpatch.artifacts.whole_file import write_whole
from fxpatch.errors import ArtifactError, FxPatchWarning


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
    write_whole(Path(path), content, 0o644)
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
    return read(content, others, device, unpin, trust, names, str(path))


def loads(
    content: bytes,
    *,
    device: Asked = None,
    unpin: bool = False,
    trust: str | None = None,
    names: dict[str, object] | None = None,
) -> Any:
    """`load` for a file's bytes: what kind of file they come from is not looked at, only who signed them."""
    return read(content, None, device, unpin, trust, names, "the bytes")


def dumps(what: Any) -> bytes:
    """What `save` writes, as bytes."""
    try:
        secret = key(make=True)
    except DistrustedError as error:
        secret = None
        warnings.warn(f"the artifact is not signed: {error}", FxPatchWarning, stacklevel=3)
    manifest, members = described(what)
    if secret is None and manifest["kind"] in RUNS_CODE:
        raise ArtifactError(
            "This cannot be saved without a key: nobody could load it.",
            seen=f"no key can be made at {key_file()}",
            expected=f"a directory of this user's own; {RUNS_CODE[manifest['kind']]}",
            hint=f"name a file in one by {KEY_VARIABLE}",
        )
    return pack(manifest, members, secret)
