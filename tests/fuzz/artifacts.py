"""The loader of artifacts, for any bytes: a graph, or an error of fxpatch's own that can be printed.

Nothing is unpickled, no program started and no file written whatever the bytes are, since nobody has signed them. A
graph that was loaded is whole: it can be saved and loaded again as the same one.

Bytes as they are seldom get past the hashes. So most inputs are what is in a file, one member after the other, which is
sealed here as anybody could seal it: the readers of its documents see every change.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from fxpatch.artifacts.container import MANIFEST, SEAL, Opened, pack
from fxpatch.artifacts.files import dumps, loads
from fxpatch.artifacts.trust import KEY_VARIABLE
from fxpatch.errors import ArtifactError, FxPatchWarning

_BETWEEN = b"\n\xff\n"
_FORBIDDEN = (
    *("pickle.find_class", "ctypes.dlopen", "os.system", "os.exec", "os.fork", "os.posix_spawn"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree", "socket.connect", "subprocess.Popen"),
)
_watching: list[str] = []  # what happened while an artifact was being loaded
_is_watched = False


def check(data: bytes) -> None:
    """`data` as a file, or as what is in one."""
    content = _sealed(data[1:]) if data[:1] == b"m" else data
    if content is None:
        return
    with warnings.catch_warnings(action="ignore"):  # torch's and fxpatch's own: nobody reads them here
        loaded = _load(content)
        if loaded is not None:
            _assert_whole(loaded)


def seeds() -> list[bytes]:
    """Files of several graphs, as they are and member by member. They are made anew: the format may change."""
    found = []
    for gm in _graphs():
        with warnings.catch_warnings(action="ignore", category=FxPatchWarning), _no_key():
            content = dumps(gm)
        found += [content, _members(content)]
        loads(content)  # what torch imports and makes at the first one is no doing of the file's
    return found


def _graphs() -> list[GraphModule]:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("scale", torch.tensor([2.0, 0.5]))

        def forward(self, x: torch.Tensor, factor: int = 2) -> Any:
            left, right = self.linear(x).relu().split(1, -1)
            return {"sum": left + right * factor, "scaled": (self.scale[0] * x, x.to(torch.float64))}

    second = Graph()
    y = second.placeholder("y")
    second.output(second.call_function(torch.ops.aten.sum.dim_IntList, (y, [0]), {"keepdim": True}))
    first = Graph()
    first.output((first.placeholder("device"), torch.device("cpu"), slice(1, None, 2), "text", 1.5, None, True))
    return [torch.fx.symbolic_trace(Small()), GraphModule({}, first), GraphModule({}, second)]


def _members(content: bytes) -> bytes:
    """An input that `_sealed` makes the file of again."""
    opened = Opened(content)
    described = opened.manifest["members"]
    manifest = {key: value for key, value in opened.manifest.items() if key not in ("members", "format")}
    parts = [json.dumps(manifest).encode()]
    for name in described:
        parts += [name.encode(), opened.raw(name)]
    return b"m" + _BETWEEN.join(parts)


def _sealed(data: bytes) -> bytes | None:
    """The file whose manifest and members are these; None where they are no such thing."""
    first, *rest = data.split(_BETWEEN)
    try:
        manifest = json.loads(first)
    except (ValueError, RecursionError):
        return None
    names = [each.decode("latin-1") for each in rest[::2]]
    if not isinstance(manifest, dict) or {MANIFEST, SEAL} & {*names} or not all(names):
        return None
    with warnings.catch_warnings(action="ignore"):  # zipfile's, about a name that is there twice
        return pack(manifest, dict(zip(names, rest[1::2], strict=False)), None)


def _load(content: bytes) -> Any:
    global _is_watched
    _watching.clear()
    with _no_key():
        _is_watched = True
        try:
            loaded, refusal = loads(content), None
        except ArtifactError as error:
            loaded, refusal = None, error
        finally:
            _is_watched = False
    assert not _watching, f"loading it did {', '.join(_watching)}"
    if refusal is not None:
        assert refusal.seen
        assert refusal.expected
        assert refusal.hint
        str(refusal).encode()
    return loaded


def _assert_whole(loaded: Any) -> None:
    assert isinstance(loaded, GraphModule)
    loaded.graph.lint()
    with _no_key():
        again = loads(dumps(loaded))
    assert again.code == loaded.code
    for one, other in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


@contextmanager
def _no_key() -> Iterator[None]:
    """For a while this user has no key, and nothing can be trusted."""
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = os.path.join(tempfile.gettempdir(), "no such directory", "key")
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY_VARIABLE]
        else:
            os.environ[KEY_VARIABLE] = before


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _is_watched:
        return
    if event in _FORBIDDEN:
        _watching.append(event)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _watching.append(f"open({arguments[0]!r}, {arguments[1]!r})")


sys.addaudithook(_hook)
