"""`install()` repairs what is wrong, says so, and takes it back; bad input changes nothing and says what to do."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpatch
from compile_configs import load_profile
from fxpatch.errors import (
    AlreadyInstalledError,
    FxPatchError,
    NoProfileError,
    ProfileError,
    TargetMovedError,
    TorchTooOldError,
    UnknownDeviceError,
)
from fxpatch.simulator.shim import replaced_torch_device

CODEGEN = torch.fx.graph.CodeGen


@pytest.fixture(autouse=True)
def _nothing_left(musa: str) -> Iterator[None]:
    before = vars(CODEGEN)["_gen_python_code"]
    yield
    assert not fxpatch.status().installed
    assert vars(CODEGEN)["_gen_python_code"] is before


def module_with(literal: torch.device) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), literal))
    return torch.fx.GraphModule({}, graph)


# -- what it does --------------------------------------------------------------------------------------------------


def test_under_a_shim_literals_are_exact_and_afterwards_everything_is_as_found(musa: str) -> None:
    literal = torch._C.device("cuda", 1)
    with replaced_torch_device("musa"):
        with fxpatch.install():
            assert module_with(literal)(0)[1] == literal
        with pytest.raises(NameError, match="name 'device' is not defined"):
            module_with(literal)(0)


def test_the_device_is_found_when_none_is_named(musa: str) -> None:
    with fxpatch.install() as installation:
        assert installation.facts.device == "musa"
        assert installation.profile == load_profile("musa")


def test_a_second_install_is_a_no_op_that_says_so(musa: str) -> None:
    first = fxpatch.install("musa")
    wrapper = vars(CODEGEN)["_gen_python_code"]
    assert fxpatch.install() is first
    assert vars(CODEGEN)["_gen_python_code"] is wrapper
    assert "install() was called 1 more time: already installed, nothing to do" in str(fxpatch.status())
    first.uninstall()
    first.uninstall()


def test_a_second_install_repairs_what_has_come_since(musa: str) -> None:
    with fxpatch.install("musa") as installation, replaced_torch_device("musa"):
        assert fxpatch.install("musa") is installation
        assert type(installation.outcomes["fx-device-builtin"]).__name__ == "Applied"
        installation.uninstall()


def test_an_inner_with_block_does_not_undo_the_outer_one(musa: str) -> None:
    with fxpatch.install("musa"):
        with fxpatch.install("musa"):
            pass
        assert fxpatch.status().installed
    kept = fxpatch.install("musa")
    with fxpatch.install("musa"):
        pass
    assert kept.active
    kept.uninstall()


def test_it_is_undone_when_the_block_raises(musa: str) -> None:
    with pytest.raises(ZeroDivisionError), fxpatch.install("musa"):
        raise ZeroDivisionError


def test_status_says_what_was_done_and_why(musa: str) -> None:
    with replaced_torch_device("musa"), fxpatch.install("musa"):
        report = fxpatch.status()
        rows = {row.name: row for row in report.rows}
        assert rows["fx-device-builtin"].state == "applied"
        assert "DeviceFactoryWrapper" in rows["fx-device-builtin"].reason
        assert all(row.reason and row.why and row.upstream.startswith("https://") for row in report.rows)
        assert {row.state for row in report.rows} <= {"applied", "not needed", "waiting", "refused"}
        assert json.loads(report.json())["rows"][0]["name"] == report.rows[0].name
        assert all(row.name in str(report) for row in report.rows)
    assert str(fxpatch.status()) == "fxpatch is not installed in this process: call fxpatch.install()"


def test_nothing_is_repaired_that_is_not_wrong(musa: str) -> None:
    with fxpatch.install("musa") as installation:
        states = {row.name: row.state for row in fxpatch.status().rows}
        assert states["fx-device-builtin"] == states["portable-pickles"] == "not needed"
        assert installation.left == ()


@pytest.mark.parametrize("device", ["cpu"])
def test_on_torchs_own_device_only_codegen_is_needed(musa: str, device: str) -> None:
    """A placeholder called `device` fails on plain CPU torch too; everything else torch does by itself."""
    with fxpatch.install(device):
        states = {row.name: row.state for row in fxpatch.status().rows}
    applied = {name for name, state in states.items() if state == "applied"} - {"settle-before-compile"}
    assert applied == {"codegen"}


def test_the_settings_of_a_profile_are_applied_and_restored(musa: str, tmp_path: Path) -> None:
    import torch._inductor.config as config

    before = config.get_config_copy()
    with fxpatch.install("musa"):
        assert config.compile_threads == 1, "what compile_configs/musa.toml asks for"
    assert config.get_config_copy() == before


def test_settings_belong_to_the_thread_that_installed(musa: str, caplog: pytest.LogCaptureFixture) -> None:
    """Since torch 2.12: another thread takes back everything else, says what it cannot reach, and blames nobody."""
    import torch._inductor.config as config

    before = config.get_config_copy()
    installation = fxpatch.install("musa")
    elsewhere = threading.Thread(target=installation.uninstall)
    elsewhere.start()
    elsewhere.join()
    assert not fxpatch.status().installed
    told = "inductor-settings still holds in the thread or task where it was applied: uninstall() there, too"
    assert [note for note in installation.left if "changed by somebody else" in note] == []
    assert told in installation.left
    assert told in caplog.text
    assert config.get_config_copy() != before
    installation.uninstall()
    assert installation.left == ()
    assert config.get_config_copy() == before


def test_a_setting_torch_does_not_have_is_refused_with_its_name(musa: str, tmp_path: Path) -> None:
    import torch._inductor.config

    path = tmp_path / "mine.toml"
    setting = '\n[[inductor]]\nname = "no_such_setting"\nvalue = 1\nreason = "r"\nsource = "s"\n'
    text = (Path(fxpatch.__file__).parent.parent / "compile_configs" / "musa.toml").read_text()
    path.write_text(text + setting)
    with pytest.warns(fxpatch.FxPatchWarning, match="has no setting 'no_such_setting'"):
        installation = fxpatch.install("musa", profile=path)
    with installation:
        rows = {row.name: row for row in fxpatch.status().rows}
        assert rows["inductor-settings"].state == "refused"
        assert f"torch {torch.__version__} has no setting 'no_such_setting'" in rows["inductor-settings"].reason
    with pytest.raises(fxpatch.FxPatchError, match="correct the profile"):
        fxpatch.install("musa", profile=path, strict=True)
    assert not fxpatch.status().installed


# -- bad input -----------------------------------------------------------------------------------------------------


def refused(error: type[FxPatchError], **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        fxpatch.install(**arguments)
    assert caught.value.seen
    assert caught.value.expected
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize(
    ("device", "seen", "hint"),
    [
        ("mussa", "'mussa'; PrivateUse1 is named 'musa'", "did you mean 'musa'? otherwise import the vendor's package"),
        ("npu", "'npu'; PrivateUse1 is named 'musa'", "call fxpatch.simulate() for a device without hardware"),
        ("musa:0", "'musa:0', which names an index", "pass the device type alone: 'musa'"),
        ("", "''; PrivateUse1", "import the vendor's package first"),
        (3, "3, a int", "pass the device type as a string"),
        (torch._C.device("cpu"), "device(type='cpu'), a device", "pass the device type as a string"),
    ],
)
def test_unknown_device(device: Any, seen: str, hint: str) -> None:
    message = refused(UnknownDeviceError, device=device)
    assert message.startswith("torch knows no such device.\n  seen: ")
    assert seen in message
    assert "expected: one of cpu, cuda," in message
    assert hint in message


def test_no_profile() -> None:
    message = refused(NoProfileError, device="hpu")
    assert message.startswith("No compile profile matches device 'hpu'.\n  seen: ")
    assert "compile_configs/musa.toml: not taken, it is for device 'musa', and this is 'hpu'" in message
    assert "expected: a profile whose device is 'hpu'" in message
    assert "to do: write one (compile_configs/example.toml shows how)" in message


def test_a_profile_for_another_device() -> None:
    message = refused(NoProfileError, device="musa", profile="npu")
    assert "it is for device 'npu', and this is 'musa'" in message


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('device = "musa"', 'devise = "musa"', ["devise", "device"]),
        ("budget = 1900", 'budget = "many"', ["capture.budget", "'many'"]),
        ("budget = 1900", "budget = -1", ["capture.budget", "-1"]),
        ('compiler = "aot_eager"', 'compiler = "nvcc"', ["compiler", "nvcc", "aot_eager"]),
        ("[capture]", "[capture", ["not valid TOML"]),
    ],
)
def test_a_wrong_profile(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    """The messages themselves are tested in tests/profiles; here, that they arrive as fxpatch's own error."""
    text = (Path(fxpatch.__file__).parent.parent / "compile_configs" / "musa.toml").read_text()
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new, 1))
    message = refused(ProfileError, device="musa", profile=path)
    assert str(path) in message
    for part in parts:
        assert part in message


def test_something_else_is_installed(musa: str) -> None:
    with fxpatch.install("musa"):
        message = refused(AlreadyInstalledError, device="cpu")
        assert (
            "seen: installed: <fxpatch.Installation device='musa' profile='compile_configs/musa.toml' active>"
            in message
        )
        assert "to do: uninstall() the first one before installing another" in message


def test_torch_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    message = refused(TorchTooOldError)
    assert "seen: torch 2.10.1+cpu\n  expected: torch 2.11 or newer\n  to do: upgrade torch" in message


def test_a_vendor_package_that_is_being_imported(tmp_path: Path, fresh: Callable[..., str]) -> None:
    (tmp_path / "torch_musa.py").write_text(
        "import fxpatch\ntry:\n    fxpatch.install()\nexcept Exception as e:\n    print(type(e).__name__, e)\n"
    )
    out = fresh(f"""
        import sys, fxpatch
        fxpatch.simulate("musa")
        sys.path.insert(0, {str(tmp_path)!r})
        import torch_musa
        print(fxpatch.status().installed)
    """)
    assert out.startswith("VendorModuleError The package of device 'musa' is only half imported.")
    assert "seen: torch_musa is being imported right now" in out
    assert "to do: call fxpatch.install() after `import torch_musa`, not from within it" in out
    assert out.endswith("False\n")


def test_a_vendor_package_that_failed_half_way(fresh: Callable[..., str]) -> None:
    """It named PrivateUse1, and died before it registered its module."""
    out = fresh("""
        import torch, fxpatch
        torch.utils.rename_privateuse1_backend("npu")
        try:
            fxpatch.install()
        except fxpatch.FxPatchError as error:
            print(type(error).__name__, error, fxpatch.status().installed)
    """)
    assert out.startswith("VendorModuleError Device 'npu' has a name and no module.")
    assert "seen: PrivateUse1 is named 'npu', and torch.npu does not exist" in out
    assert "run `import torch_npu` by itself and mend what it reports False" in out


# -- a torch that has moved ----------------------------------------------------------------------------------------


def moved(self: Any, graph_nodes: Any, *, verbose: bool = False) -> None:
    """`CodeGen._gen_python_code` in a torch to come."""


@pytest.fixture
def moved_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as context:
        context.setattr(CODEGEN, "_gen_python_code", moved)
        context.setattr("fxpatch.codegen.probe_codegen", lambda: False)
        yield


@pytest.mark.usefixtures("moved_torch")
def test_a_moved_target_leaves_one_patch_out_and_warns() -> None:
    with pytest.warns(fxpatch.FxPatchWarning, match="has moved a private name that fxpatch needs"):
        installation = fxpatch.install("musa")
    rows = {row.name: row for row in fxpatch.status().rows}
    installation.uninstall()
    assert rows["codegen"].state == "refused"
    assert f"torch {torch.__version__} has moved" in rows["codegen"].reason
    assert "CodeGen._gen_python_code(self: 'Any', graph_nodes: 'Any', *, verbose" in rows["codegen"].reason
    assert rows["settle-before-compile"].state in ("applied", "waiting")
    assert vars(CODEGEN)["_gen_python_code"] is moved


@pytest.mark.usefixtures("moved_torch")
def test_a_warning_that_is_an_error_leaves_nothing_half_applied() -> None:
    from torch._dynamo.callback import callback_handler

    before = callback_handler.install_callbacks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(fxpatch.FxPatchWarning):
            fxpatch.install("musa")
    assert not fxpatch.status().installed
    assert callback_handler.install_callbacks == before  # which another patch, not refused, had replaced


@pytest.mark.usefixtures("moved_torch")
def test_a_moved_target_with_strict_installs_nothing() -> None:
    with pytest.raises(TargetMovedError, match="report this torch version to fxpatch"):
        fxpatch.install("musa", strict=True)
