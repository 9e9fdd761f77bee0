"""What names a device's model, driver and vendor: the same for every card and process, compared where it is known."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from fxpatch import drivers
from fxpatch.artifacts import compiled
from fxpatch.errors import MissingHereError
from fxpatch.repair import cache_key


@pytest.fixture(autouse=True)
def in_use() -> None:
    torch.ones(1, device="musa")


def properties(monkeypatch: pytest.MonkeyPatch, text: str | None, **fields: Any) -> None:
    kind = type("Properties", (), fields if text is None else {**fields, "__repr__": lambda self: text})
    monkeypatch.setattr(torch.musa, "get_device_properties", lambda _device=None: kind())


@pytest.mark.parametrize(
    "text",
    [
        "_Properties(name='S4000', major=2, uuid={0}, pci_bus_id={0}, pci_device_id={0}, L2_cache_size=50MB)",
        "_Properties(uuid={0}, name='S4000', serial_number='{0}')",
    ],
)
def test_two_cards_of_one_model_are_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for card in ("17d0a5d3-0001", "17d0a5d3-0002"):
        properties(monkeypatch, text.format(card))
        found.add((cache_key._probe("musa").part, compiled.system("musa")["model"]))
    assert len(found) == 1
    assert "S4000" in found.pop()[1]
    properties(monkeypatch, text.format("1").replace("S4000", "S5000"))
    assert "S5000" in str(drivers.model("musa"))


def test_a_model_without_a_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's text has the object's address: a key that no other process would have."""
    properties(monkeypatch, None, name="S4000", total_memory=7)
    assert drivers.model("musa") == "name=S4000, total_memory=7"
    properties(monkeypatch, None)
    assert drivers.model("musa") == "unknown"


def test_a_driver_that_only_a_device_in_use_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that loads compiled code before it has used the device cannot know it, and is not refused."""
    monkeypatch.setattr(torch.musa, "get_driver_version", lambda: "2.7", raising=False)
    saved = compiled.system("musa")
    monkeypatch.setattr(torch.musa, "get_driver_version", lambda: "2.8")
    with pytest.raises(MissingHereError, match=r"driver in use: 2.7 there, 2.8 here"):
        compiled.check(saved)
    with monkeypatch.context() as unused:
        unused.setattr(torch.musa, "is_initialized", lambda: False)
        compiled.check(saved)
        early = compiled.system("musa")
    assert early["driver"] == saved["driver"]
    compiled.check(early)
    with pytest.raises(MissingHereError, match=r"driver: \['driver=1'\] there"):
        compiled.check({**saved, "driver": ["driver=1"], "driver in use": "not in use"})


def test_the_vendors_package_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = types.ModuleType("acme_backend")
    vendor.__version__ = "1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme_backend", vendor)
    assert drivers.vendor_packages("musa") == ("torch_musa", "torchada")
    monkeypatch.setattr(torch.musa, "device_count", type("_", (), {"__module__": "acme_backend.core"}))
    assert drivers.vendor_packages("musa") == ("acme_backend", "torch_musa", "torchada")
    one = cache_key._probe("musa").part
    assert "/acme_backend=1.0/" in one
    assert compiled.system("musa")["vendor"] == ["acme_backend=1.0"]
    vendor.__version__ = "2.0"  # type: ignore[attr-defined]
    assert cache_key._probe("musa").part == one.replace("=1.0/", "=2.0/")


def test_a_variable_that_names_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Empty, it is not the directory that this process happens to run in."""
    monkeypatch.setitem(drivers.VERSION_FILES, "musa", (("toolkit", "$VENDOR_HOME", "version.json"),))
    (tmp_path / "version.json").write_text("version=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VENDOR_HOME", "")
    assert drivers.driver_versions("musa") == ()
    monkeypatch.setenv("VENDOR_HOME", str(tmp_path))
    assert drivers.driver_versions("musa") == ("toolkit=1",)
