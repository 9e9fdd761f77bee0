"""What torch writes to reproduce a failure runs in a new process, on the simulated device."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.repro.after_aot as after_aot
from torch._dynamo import debug_utils
from torch._dynamo.repro import after_dynamo

import fxpatch
from fxpatch.patching import Applied, NotNeeded
from fxpatch.repair import repro_scripts

ROOT = Path(__file__).resolve().parents[2]
MODULES = (debug_utils, after_dynamo, after_aot)


def graph() -> torch.fx.GraphModule:
    made = torch.fx.Graph()
    x = made.placeholder("x")
    ones = made.call_function(torch.ops.aten.ones.default, ([4],), {"device": torch.device("musa", 0)})
    made.output((made.call_function(torch.ops.aten.add.Tensor, (x, ones)),))
    return torch.fx.GraphModule({}, made)


def scripts(path: Path) -> dict[str, Path]:
    """A script of the minifier after Dynamo, and an `fx_graph_runnable` for after AOTAutograd."""
    args = [torch.ones(4, device="musa")]
    found = {"after_dynamo": path / "after_dynamo.py", "after_aot": path / "fx_graph_runnable.py"}
    found["after_dynamo"].write_text(after_dynamo.generate_dynamo_fx_repro_string(graph(), args, "aot_eager"))
    with found["after_aot"].open("w") as file:
        after_aot.save_graph_repro(file, graph(), args, "inductor", save_dir=None)
    return found


def run(script: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FXPATCH_AUTOLOAD": "0"}
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, timeout=250)


def test_imports_are_put_in_and_taken_out(tmp_path: Path) -> None:
    before = [module.extra_imports for module in MODULES]
    wanted = "import fxpatch\nfxpatch.simulate('musa')\nimport fxpatch\nfxpatch.install('musa')"
    with fxpatch.install("musa") as installation:
        assert isinstance(installation.outcomes["repro-scripts"], Applied)
        assert [module.extra_imports for module in MODULES] == [wanted] * 3
        for script in scripts(tmp_path).values():
            assert "\nfxpatch.install('musa')\n" in script.read_text()
        assert isinstance(installation.settle()["repro-scripts"], Applied)
    assert [module.extra_imports for module in MODULES] == before
    for script in scripts(tmp_path).values():
        assert "fxpatch" not in script.read_text()


def test_what_others_put_there_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "extra_imports", "import json")
    with fxpatch.install("musa"):
        assert after_aot.extra_imports.startswith("import json\nimport fxpatch\n")
        after_dynamo.extra_imports = "import theirs"
    assert after_aot.extra_imports == "import json"
    assert after_dynamo.extra_imports == "import theirs"


def test_the_vendors_packages_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that made the device module, whatever its name; the shim after it."""
    vendor = types.ModuleType("torch.musa")
    vendor.device_count = lambda: 1  # type: ignore[attr-defined]
    vendor.device_count.__module__ = "moore_torch.core"
    monkeypatch.setattr(torch, "musa", vendor)
    monkeypatch.setitem(sys.modules, "moore_torch", types.ModuleType("moore_torch"))
    monkeypatch.setitem(sys.modules, "torchada", types.ModuleType("torchada"))
    assert repro_scripts._lines("musa").splitlines() == [
        "import moore_torch", "import torchada", "import fxpatch", "fxpatch.install('musa')"
    ]  # fmt: skip


def test_a_profile_of_the_users_is_named_with_its_packages(tmp_path: Path) -> None:
    """Without its path the script would find no profile for the device, or another one."""
    text = (ROOT / "compile_configs" / "musa.toml").read_text()
    own = tmp_path / "mine.toml"
    own.write_text(text.replace('packages = ["torch_musa", "torchada"]', 'packages = ["hypothesis"]'))
    with fxpatch.install("musa", profile=own):
        lines = debug_utils.extra_imports.splitlines()
        assert "/hypothesis=" in torch.compiler.config.cache_key_tag
    assert lines[-3:] == ["import hypothesis", "import fxpatch", f"fxpatch.install('musa', profile={str(own)!r})"]


def test_a_device_of_torchs_own() -> None:
    assert isinstance(repro_scripts._decide(repro_scripts._probe("cpu")), NotNeeded)


def test_a_script_without_it_does_not_know_the_device(tmp_path: Path) -> None:
    """The failure that the patch is for; and it is the device's name, not something else in the script."""
    done = run(scripts(tmp_path)["after_dynamo"])
    assert done.returncode != 0
    assert "device string: musa" in done.stderr


@pytest.mark.slow
def test_what_the_minifier_writes_runs(tmp_path: Path) -> None:
    with fxpatch.install("musa"):
        script = scripts(tmp_path)["after_dynamo"]
    with script.open("a") as file:
        file.write("\nprint(torch._dynamo.utils.counters['stats']['unique_graphs'], fxpatch.status().device)\n")
    done = run(script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "1 musa"


@pytest.mark.slow
def test_what_torch_writes_while_it_compiles(fresh: Callable[..., str], tmp_path: Path) -> None:
    """TORCH_COMPILE_DEBUG, as a user sets it; the file is found and run."""
    fresh(
        """
        import torch, fxpatch
        fxpatch.simulate("musa")
        fxpatch.install("musa")
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device="musa"))
        """,
        TORCH_COMPILE_DEBUG="1",
        TORCH_COMPILE_DEBUG_DIR=str(tmp_path / "debug"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),  # nothing is written for a graph that has been compiled before
        FXPATCH_AUTOLOAD="0",
    )
    found = list((tmp_path / "debug").rglob("fx_graph_runnable.py"))
    assert len(found) == 1
    done = run(found[0])
    assert done.returncode == 0, done.stderr[-3000:]
