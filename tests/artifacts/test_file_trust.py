"""Who is believed: only what this user saved, nobody else can write to and nobody changed; or what `trust=` names."""

from __future__ import annotations

import os
import re
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import Plain, traced

import fxpatch
from fxpatch.artifacts import compiled, files, loading, trust
from fxpatch.errors import ArtifactError, FxPatchWarning, MissingHereError, UntrustedArtifactError


class Mine(torch.nn.Module):
    """Of nobody's vocabulary."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


def own_function(x: torch.Tensor) -> torch.Tensor:
    return x - 1


def needs_trust() -> torch.fx.GraphModule:
    """A graph that names a module and a function of the tests."""
    graph = torch.fx.Graph()
    x = graph.call_module("mine", (graph.placeholder("x"),))
    graph.output(graph.call_function(own_function, (x,)))
    return torch.fx.GraphModule(torch.nn.ModuleDict({"mine": Mine()}), graph)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "held" / "graph.fx"
    path.parent.mkdir(mode=0o700)
    fxpatch.save(needs_trust(), path)
    return path


def refused(path: Path, words: str, **options: Any) -> UntrustedArtifactError:
    with pytest.raises(UntrustedArtifactError, match=words) as caught:
        fxpatch.load(path, **options)
    return caught.value


def test_what_this_user_saved_loads(saved: Path, key_file: Path) -> None:
    assert fxpatch.load(saved)(torch.ones(1)).item() == 2
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(key_file.parent.stat().st_mode) == 0o700
    assert len(key_file.read_bytes()) == 32


def test_another_key(saved: Path, key_file: Path) -> None:
    key_file.unlink()
    error = refused(saved, "there is no key")
    fxpatch.save(traced(Plain("cpu")), saved.parent / "other.fx")  # makes a new one
    error = refused(saved, "it was not saved with this user's key")
    assert "it names the module test_file_trust.Mine" in error.seen
    told = re.search(r"trust='([0-9a-f]{64})'", error.hint)
    assert told is not None
    assert fxpatch.load(saved, trust=told[1])(torch.ones(1)).item() == 2
    refused(saved, "This is not the file that trust= names", trust="0" * 64)


def test_the_hash_that_save_returns_is_the_one_to_pass(tmp_path: Path, key_file: Path) -> None:
    told = fxpatch.save(needs_trust(), tmp_path / "g.fx")
    key_file.unlink()
    assert fxpatch.load(tmp_path / "g.fx", trust=told.upper())(torch.ones(1)).item() == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.chmod(0o664), r"graph.fx can be written by others \(-rw-rw-r--\)"),
        (lambda p: p.chmod(0o602), "can be written by others"),
        (lambda p: p.parent.chmod(0o777), "where it is, can be written by others"),
        (lambda p: p.parent.parent.chmod(0o770), "where it is, can be written by others"),
        (lambda p: (p.rename(p.with_name("real")), p.symlink_to(p.with_name("real"))), "is a symbolic link"),
    ],
)
def test_what_others_may_have_written(saved: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(saved)
    try:
        refused(saved, words)
    finally:
        saved.parent.parent.chmod(0o700)


def test_links_on_the_way(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can turn one says which of this user's files is loaded."""
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link").symlink_to(saved.parent)
    (tmp_path / "mine" / "link").symlink_to(Path("..", "open", "link"))  # leads through the other one
    for way in ("open", "mine"):
        assert fxpatch.load(tmp_path / way / "link" / saved.name)(torch.ones(1)).item() == 2
    (tmp_path / "open").chmod(0o777)
    for way in ("open", "mine"):
        refused(tmp_path / way / "link" / saved.name, "open, where it is, can be written by others")
    (tmp_path / "open").chmod(0o1777)  # in a sticky directory it can be turned by whoever made it
    assert fxpatch.load(tmp_path / "open" / "link" / saved.name)(torch.ones(1)).item() == 2
    real = os.lstat

    def lstat(path: Any) -> os.stat_result:
        found = real(path)
        return _owned_by(found, os.geteuid() + 1) if Path(path).name == "link" else found

    monkeypatch.setattr(os, "lstat", lstat)
    refused(tmp_path / "open" / "link" / saved.name, r"link, where it is, is a link of user \d+")


def test_a_file_of_another_user(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: _owned_by(real(fd), os.geteuid() + 1))
    refused(saved, "belongs to user")


def test_a_file_of_root_that_this_user_cannot_write(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may have put it there, with a key that is shared; the bytes are signed all the same."""
    real, stats = os.fstat, {}
    key = trust.key()
    monkeypatch.setattr(loading, "key", lambda: key)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setattr(os, "fstat", lambda fd: _owned_by(real(fd), 0))
    real_stat = os.stat
    monkeypatch.setattr(os, "stat", lambda p, **k: stats.setdefault(str(p), _owned_by(real_stat(p, **k), 0)))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert fxpatch.load(saved)(torch.ones(1)).item() == 2
    monkeypatch.setattr(os, "access", lambda *_: True)
    refused(saved, "belongs to root and can be written by others")


def _owned_by(found: os.stat_result, user: int) -> os.stat_result:
    return os.stat_result((*found[:4], user, *found[5:10]))


def test_a_file_that_is_exchanged_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked is what was read, whatever the name means later."""
    real = os.lstat

    def lstat(path: Any, **options: Any) -> os.stat_result:
        if Path(path) == saved and saved.exists():
            saved.with_name("new").write_bytes(b"other")
            saved.with_name("new").replace(saved)
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    refused(saved, "was replaced while it was read")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.chmod(0o644), "can be read by others"),
        (lambda p: p.write_bytes(b"short"), "it has 5 bytes instead of 32"),
        (lambda p: p.parent.chmod(0o777), "can be written by others"),
        (lambda p: (p.rename(p.with_name("real")), p.symlink_to(p.with_name("real"))), "symbolic links"),
    ],
)
def test_a_key_that_others_may_know(saved: Path, key_file: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(key_file)
    refused(saved, words)
    with pytest.warns(FxPatchWarning, match="the artifact is not signed"):
        files.dumps(traced(Plain("cpu")))


def test_a_system_without_owners(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")
    refused(saved, "does not say who may write")


def test_the_key_is_where_it_is_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(trust.KEY_VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert trust.key_file() == tmp_path / "fxpatch" / "artifacts.key"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert trust.key_file() == Path.home() / ".local" / "share" / "fxpatch" / "artifacts.key"
    assert trust.KEY_VARIABLE == "FXPATCH_KEY_FILE"


def test_anybody_may_read_a_plain_graph(tmp_path: Path, key_file: Path) -> None:
    path = tmp_path / "plain.fx"
    fxpatch.save(traced(Plain("cpu")), path)
    key_file.unlink()
    path.chmod(0o666)
    x = torch.randn(2, 4)
    torch.testing.assert_close(fxpatch.load(path)(x), Plain("cpu")(x))


def test_what_is_not_imported_is_not_imported_for_a_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(MissingHereError, match=r"test_file_trust.Mine is not here(?s:.*)import test_file_trust"):
        fxpatch.load(saved)
    monkeypatch.setitem(sys.modules, __name__, types.ModuleType(__name__))
    with pytest.raises(MissingHereError, match="not here"):
        fxpatch.load(saved)
    monkeypatch.setitem(sys.modules, __name__, module)
    assert fxpatch.load(saved)(torch.ones(1)).item() == 2


def test_code_is_not_saved_where_nobody_could_load_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = tmp_path / "open"
    held.mkdir()
    held.chmod(0o777)
    monkeypatch.setenv(trust.KEY_VARIABLE, str(held / "key"))
    program = torch.export.export(Plain("cpu"), (torch.ones(1, 4),))
    with (
        pytest.warns(FxPatchWarning, match="not signed"),
        pytest.raises(ArtifactError, match=r"cannot be saved without a key(?s:.*)FXPATCH_KEY_FILE"),
    ):
        files.dumps(program)


def test_bytes_are_believed_for_their_signature(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = files.dumps(torch.export.export(Plain("cpu"), (torch.ones(1, 4),)))
    assert isinstance(files.loads(content), torch.export.ExportedProgram)
    monkeypatch.setenv(trust.KEY_VARIABLE, str(key_file.with_name("other")))
    with pytest.raises(UntrustedArtifactError, match="torch evaluates expressions"):
        files.loads(content)


def test_a_mistrusted_program_is_not_looked_at(saved: Path, monkeypatch: pytest.MonkeyPatch, key_file: Path) -> None:
    """Neither torch's reader nor a pickle is reached."""
    path = saved.with_name("program.fx")
    fxpatch.save(torch.export.export(Plain("cpu"), (torch.ones(1, 4),)), path)
    key_file.write_bytes(bytes(32))
    for owner, name in ((compiled, "load_caches"), (loading.exported, "read"), (torch, "load")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("it was looked at"))
    refused(path, "was not saved with this user's key")


def test_a_plain_graph_on_a_system_without_owners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has none of the flags either; nothing is signed, and `trust=` is the way for the rest."""
    for name in ("geteuid", "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    x = torch.randn(2, 4)
    with pytest.warns(FxPatchWarning, match="does not say who may write"):
        told = [
            fxpatch.save(each, tmp_path / name) for name, each in (("p", traced(Plain("cpu"))), ("t", needs_trust()))
        ]
    torch.testing.assert_close(fxpatch.load(tmp_path / "p")(x), Plain("cpu")(x))
    refused(tmp_path / "t", "does not say who may write")
    assert fxpatch.load(tmp_path / "t", trust=told[1])(torch.ones(1)).item() == 2


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container with a number for a user."""
    for name in (trust.KEY_VARIABLE, "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does there
    x = torch.randn(2, 4)
    with pytest.warns(FxPatchWarning, match="no home to keep a key in: set HOME or FXPATCH_KEY_FILE"):
        fxpatch.save(traced(Plain("cpu")), tmp_path / "p")
    torch.testing.assert_close(fxpatch.load(tmp_path / "p")(x), Plain("cpu")(x))
