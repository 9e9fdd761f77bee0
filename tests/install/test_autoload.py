"""The `torch.backends` entry point never makes `import torch` fail, imports no compiler, and acts in every order."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fxpatch.autoload import autoload

IMPORT = "import torch, sys, fxpatch; print('OK', fxpatch.status().installed)"
NAMED = """
import torch, types
torch.utils.rename_privateuse1_backend("musa")
torch._register_device_module("musa", types.ModuleType("torch.musa"))
"""


def with_entry_points(tmp_path: Path, code: str, **entry_points: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where the `torch.backends` entry points are these, in this order, and no others."""
    info = tmp_path / "backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backends\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\n" + "".join(f"{name} = {target}\n" for name, target in entry_points.items())
    )
    startup = "import importlib.metadata as m; e = m.entry_points\n" + textwrap.dedent(
        f"""
        from pathlib import Path
        ours = m.PathDistribution(Path({str(info)!r})).entry_points
        m.entry_points = lambda group=None, **k: ours if group == "torch.backends" else e(group=group, **k)
        """
    )
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", startup + textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "FXPATCH_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "failing", ["fxpatch.arrival.when_imported", "fxpatch.installer.install_automatically", "fxpatch.arrival"]
)
def test_import_torch_works_when_everything_inside_fails(tmp_path: Path, failing: str) -> None:
    """What the entry point calls raises, or cannot even be imported; then it is the import of Dynamo that must work."""
    module, _, name = failing.rpartition(".")
    sabotage = f"sys.modules[{failing!r}] = None" if failing == "fxpatch.arrival" else f"m.{name} = fail"
    (tmp_path / "sabotage.py").write_text(
        NAMED + f"import {module} as m, sys\ndef fail(*a, **k): raise RuntimeError('sabotage')\n{sabotage}\n"
        "def load(): pass\n"
    )
    code = "import torch, torch._dynamo; print('OK')"
    done = with_entry_points(tmp_path, code, a="sabotage:load", b="fxpatch.autoload:autoload")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "OK\n"
    assert "fxpatch could not install itself; torch works as it does without it" in done.stderr
    assert "sabotage" in done.stderr or "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("first", ["vendor", "fxpatch"])
def test_the_order_of_entry_points_makes_no_difference(tmp_path: Path, first: str) -> None:
    """Nothing is done by `import torch`; all is, by the time Dynamo can be used."""
    (tmp_path / "vendor.py").write_text(NAMED + "def load(): pass\n")
    both = {"vendor": "vendor:load", "fxpatch": "fxpatch.autoload:autoload"}
    ordered = {first: both.pop(first), **both}
    code = IMPORT + "\nimport torch._dynamo; print(fxpatch.status().installed)"
    done = with_entry_points(tmp_path, code, **ordered)
    assert (done.returncode, done.stdout) == (0, "OK False\nTrue\n"), done.stderr


def test_a_vendor_that_is_imported_after_torch(tmp_path: Path) -> None:
    (tmp_path / "vendor.py").write_text(NAMED)
    code = IMPORT + "\nimport vendor, torch._dynamo; print(fxpatch.status().installed)"
    done = with_entry_points(tmp_path, code, a="fxpatch.autoload:autoload")
    assert (done.returncode, done.stdout) == (0, "OK False\nTrue\n"), done.stderr


def test_a_vendor_that_imports_dynamo_in_the_middle_of_itself(tmp_path: Path) -> None:
    """As torch_npu and torch_musa do: nothing is installed before its import has ended, and then it is."""
    (tmp_path / "torch_musa.py").write_text(
        "import torch\ntorch.utils.rename_privateuse1_backend('musa')\nimport torch._dynamo, fxpatch, types\n"
        "print('inside', fxpatch.status().installed)\n"
        "torch._register_device_module('musa', types.ModuleType('torch.musa'))\n"
    )
    code = "import torch, torch_musa, fxpatch; print(fxpatch.status().installed)"
    done = with_entry_points(tmp_path, code, a="fxpatch.autoload:autoload")
    assert (done.returncode, done.stdout) == (0, "inside False\nTrue\n"), done.stderr


@pytest.mark.parametrize("named", [True, False])
def test_it_imports_no_compiler(tmp_path: Path, named: bool) -> None:
    (tmp_path / "vendor.py").write_text((NAMED if named else "") + "def load(): pass\n")
    code = "import torch, sys; print([m for m in ('torch._dynamo', 'torch._inductor', 'rich') if m in sys.modules])"
    done = with_entry_points(tmp_path, code, a="vendor:load", b="fxpatch.autoload:autoload")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_without_a_device_nothing_is_installed(tmp_path: Path) -> None:
    done = with_entry_points(tmp_path, IMPORT + "; import torch._dynamo; print(fxpatch.status().installed)",
                             a="fxpatch.autoload:autoload")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "OK False\nFalse\n"), done.stderr


def test_what_somebody_asks_for_takes_its_place(tmp_path: Path) -> None:
    """The entry point chose a profile; `install(profile=...)` by hand is no error, and is what holds then."""
    (tmp_path / "vendor.py").write_text(NAMED + "def load(): pass\n")
    code = """
    import torch, torch._dynamo, fxpatch, dataclasses, compile_configs
    assert fxpatch.status().installed
    automatic = fxpatch.install()  # the same: nothing changes
    other = dataclasses.replace(compile_configs.load_profile("musa"), title="another")
    try:
        fxpatch.install("musa", profile=other)
        raise SystemExit("somebody had asked for the first by then")
    except fxpatch.FxPatchError as error:
        assert "installed for something else" in str(error)
    automatic.uninstall()
    from fxpatch.installer import install_automatically
    first = install_automatically("musa")
    second = fxpatch.install("musa", profile=other)
    assert second.profile.title == "another" and second.active and not first.active
    print("OK")
    """
    done = with_entry_points(tmp_path, code, a="vendor:load", b="fxpatch.autoload:autoload")
    assert done.stdout.strip() == "OK", done.stderr


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPATCH_AUTOLOAD", "0")
    monkeypatch.setattr("fxpatch.arrival.when_imported", lambda *_: pytest.fail("it ran"))
    autoload()


def test_importing_fxpatch_changes_nothing(fresh: Callable[..., str]) -> None:
    """Not even with every public name fetched, but for those whose purpose is to change something."""
    out = fresh("""
        import sys; sys.path.insert(0, "install")
        from zygote import snapshot
        import torch
        before = snapshot()
        import fxpatch
        for name in fxpatch.__all__:
            getattr(fxpatch, name)
        after = snapshot()
        print([place for place in before if before[place] != after.get(place)])
        print([m for m in ("torch._dynamo", "torch._inductor", "rich") if m in sys.modules])
    """)
    assert out == "[]\n[]\n"


def test_a_name_that_there_is_not() -> None:
    import fxpatch

    assert set(fxpatch.__all__) <= set(dir(fxpatch))
    with pytest.raises(AttributeError, match="module 'fxpatch' has no attribute 'instal'; it has FxPatchError"):
        _ = fxpatch.instal
