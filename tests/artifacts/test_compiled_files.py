"""Compiled code in files: called in another process without compiling, refused where it was not compiled for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fxpatch
from fxpatch.artifacts import compiled, files
from fxpatch.errors import ArtifactError, MissingHereError, UntrustedArtifactError

SAVE = """
import os, sys, torch, fxpatch
held = os.environ["HELD"]
sys.path.insert(0, held)
from held_model import f
fxpatch.simulate("musa")
fxpatch.install("musa")
x = torch.arange(16.0).view(4, 4) / 16
given = x.to("musa")
made = torch.compile(f, fullgraph=True, backend="inductor").aot_compile(((given,), {}))
torch.testing.assert_close(made(given), f(given))
fxpatch.save(made, os.path.join(held, "musa"))
torch.compile(f)(x.to("musa"))
fxpatch.save(torch.compiler.save_cache_artifacts(), os.path.join(held, "caches"))
torch.save(f(x), os.path.join(held, "wanted"))
"""
MODEL = """
import torch
def f(x):
    return torch.nn.functional.gelu(x @ x.T) + 1
"""
LOAD = """
import os, sys, torch, fxpatch
from fxpatch.errors import ArtifactError, MissingHereError
held = os.environ["HELD"]
wanted = torch.load(os.path.join(held, "wanted"))
x = torch.arange(16.0).view(4, 4) / 16
def load(name, **options):
    return fxpatch.load(os.path.join(held, name), **options)
def refused(name, *words, **options):
    try:
        load(name, **options)
    except ArtifactError as error:
        assert all(each in str(error) for each in words), str(error)
    else:
        raise AssertionError(name)
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held")
    (path / "held_model.py").write_text(MODEL)
    return path


@pytest.mark.slow
def test_in_other_processes(fresh: Callable[..., str], held: Path) -> None:
    env = {"HELD": str(held), "FXPATCH_KEY_FILE": str(held / "key")}
    fresh(SAVE, TORCHINDUCTOR_CACHE_DIR=str(held / "first"), **env)
    fresh(
        LOAD
        + """
sys.path.insert(0, held)
from held_model import f
fxpatch.simulate("musa")
fxpatch.install("musa")
import torch._dynamo
found = load("musa")
torch.testing.assert_close(found(x.to("musa")).cpu(), wanted)
try:
    found(torch.ones(3, 5).to("musa"))
except RuntimeError as error:
    assert "GuardManager" in str(error)
else:
    raise AssertionError("it took another shape")
assert torch._dynamo.utils.counters["frames"]["total"] == 0
refused("musa", "cannot be moved", device="cpu")
refused("caches", "cannot be moved", unpin=True)
info = load("caches")
assert info.inductor_artifacts and info.aot_autograd_artifacts, info
torch.testing.assert_close(torch.compile(f)(x.to("musa")).cpu(), wanted)
counters = torch._dynamo.utils.counters
assert counters["aot_autograd"]["autograd_cache_hit"] == 1, counters
assert not counters["inductor"].get("fxgraph_cache_miss"), counters
""",
        TORCHINDUCTOR_CACHE_DIR=str(held / "second"),
        **env,
    )
    fresh(
        LOAD
        + """
refused("musa", "compiled for something else", "device: musa there, none of that name")
refused("caches", "device: musa there")
fxpatch.simulate("npu")
refused("musa", "device: musa there, none of that name (PrivateUse1 is npu) here")
""",
        TORCHINDUCTOR_CACHE_DIR=str(held / "third"),
        **env,
    )


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A file of caches, with content that torch would not make."""

    class Info:
        artifacts: ClassVar[dict[str, Any]] = {}

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: ("loaded", content))
    return files.dumps((b"not for everybody", Info()))


def test_what_differs_is_named(caches: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.loads(caches) == ("loaded", b"not for everybody")
    real = compiled.system
    others = {
        "PrivateUse1": "npu",
        "torch": "2.12",
        "machine": "linux riscv",
        "driver": ["driver=7"],
        "vendor": ["a=1"],
    }
    for name, value in others.items():
        monkeypatch.setattr(compiled, "system", lambda device, n=name, v=value: {**real(device), n: v})
        told = value if isinstance(value, str) else value[0]
        with pytest.raises(MissingHereError, match=rf"seen: {name}: .* there, .*{told}"):
            files.loads(caches)


def test_caches_of_somebody_else_do_not_reach_torch(caches: bytes, key_file: Path, tmp_path: Path) -> None:
    key_file.write_bytes(bytes(32))
    (tmp_path / "caches").write_bytes(caches)
    for load in (lambda: files.loads(caches), lambda: fxpatch.load(tmp_path / "caches")):
        with pytest.raises(UntrustedArtifactError, match="compiler caches are pickles and machine code"):
            load()


def test_caches_that_torch_cannot_read(monkeypatch: pytest.MonkeyPatch, caches: bytes) -> None:
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: None)
    with pytest.raises(ArtifactError, match="torch cannot read these cache artifacts"):
        files.loads(caches)
