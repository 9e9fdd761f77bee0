"""The driver in the cache key: from the vendor's version files, and from the device where it is in use."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

import fxpatch
from fxpatch import drivers
from fxpatch.repair import cache_key


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this test's vendor has its version files."""
    monkeypatch.setenv("VENDOR_HOME", str(tmp_path))
    files = (("driver", "$VENDOR_HOME", "driver/version.info"), ("toolkit", "$VENDOR_HOME", "*/install.json"))
    monkeypatch.setitem(drivers.VERSION_FILES, "musa", files)
    (tmp_path / "driver").mkdir()
    return tmp_path


def test_versions_are_read_from_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drivers.driver_versions("musa") == ()
    (place / "driver" / "version.info").write_text("# a comment\nVersion=23.0.rc3\nother=1\n")
    (place / "driver" / "install.json").write_text('{"version": "4.1"}')
    driver, toolkit = drivers.driver_versions("musa")
    assert driver == "driver=23.0.rc3"
    assert toolkit.startswith("toolkit=")
    (place / "driver" / "install.json").write_text('{"version": "4.2"}')
    assert drivers.driver_versions("musa") != (driver, toolkit)
    monkeypatch.delenv("VENDOR_HOME")
    assert drivers.driver_versions("musa") == ()


def test_a_device_in_use_is_asked_and_one_that_is_not_is_not(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    (place / "driver" / "version.info").write_text("version=1\n")
    torch.ones(1, device="musa")
    monkeypatch.setattr(torch.musa, "get_driver_version", lambda: "2.7", raising=False)
    assert drivers.driver_versions("musa") == ("driver=2.7",)
    monkeypatch.setattr(torch.musa, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.musa, "get_driver_version", lambda: pytest.fail("it was asked"))
    assert drivers.driver_versions("musa") == ("driver=1",)


def test_as_torch_npu_is_asked(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    torch.ones(1, device="musa")
    utils = types.SimpleNamespace(get_cann_version=lambda module: f"{module}-8.0")
    monkeypatch.setattr(torch.musa, "utils", utils, raising=False)
    assert drivers.driver_versions("musa") == ("driver=DRIVER-8.0",)

    def fail(module: str) -> str:
        raise RuntimeError(module)

    utils.get_cann_version = fail
    assert drivers.driver_versions("musa") == ("driver=unknown (RuntimeError)",)


@pytest.mark.parametrize("told", ["a|b", "a/b", "x" * 100, "two words"])
def test_a_version_does_not_part_the_key(told: str, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    torch.ones(1, device="musa")
    monkeypatch.setattr(torch.musa, "get_driver_version", lambda: told, raising=False)
    (found,) = drivers.driver_versions("musa")
    assert set(found) <= set("driver=0123456789abcdef")
    assert len(found) == len("driver=") + 16


def test_another_driver_is_another_key(place: Path) -> None:
    version = place / "driver" / "version.info"
    version.write_text("version=1\n")
    with fxpatch.install("musa") as installation:
        __import__("torch._inductor.codecache")
        installation.settle()
        one = torch.compiler.config.cache_key_tag
        assert "/driver=1/" in one
        assert f"/fxpatch={fxpatch.__version__}" in one
        version.write_text("version=2\n")
        installation.settle()
        assert torch.compiler.config.cache_key_tag == one.replace("/driver=1/", "/driver=2/")
    assert "driver" not in torch.compiler.config.cache_key_tag


def test_fxpatch_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cache_key._probe("musa").part
    monkeypatch.setattr(fxpatch, "__version__", "99.0")
    assert cache_key._probe("musa").part == one.replace(one.split("/fxpatch=")[1].split("/")[0], "99.0")
