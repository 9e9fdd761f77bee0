"""What a probe's process does, played in this one: making ready, one probe, its diagnosis, and the model's door."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import doctor_patients
import pytest
import torch

import fake_kernels.audit.adapter as adapter
import fxpatch
from fxpatch.doctor import child, model, pictures
from fxpatch.doctor.probe import Broken, NotApplicable, Probe, Subject
from fxpatch.errors import OptionError
from fxpatch.installer import current
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.progress import Step

PROBES = {probe.name: probe for probe in doctor_patients.PROBES}
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment and the installation of this process; a probe's process keeps both."""
    monkeypatch.setenv(AUTOLOAD, "0")
    yield
    installed = current()
    if installed is not None:
        installed.uninstall()


def ask(kind: str, subject: Subject, **options: Any) -> tuple[dict[str, Any], int]:
    """The answer, and how often the process said that it was ready."""
    ready: list[None] = []
    request = {"kind": kind, "subject": dataclasses.asdict(subject), "autoload": "0", **options}
    return child.answer(request, PROBES, lambda: ready.append(None)), len(ready)


def probed(name: str, *, install: bool = False, subject: Subject | None = None) -> dict[str, Any]:
    said, ready = ask("probe", subject or Subject("musa", simulated=True), probe=name, install=install)
    assert ready == 1
    return said


def test_what_is_found_and_what_is_not_applicable() -> None:
    assert probed("fine") == {"state": "ok", "found": "2 on musa"}
    assert probed("absent") == {"state": "not applicable", "found": "there is no wheel to be missing"}


def test_with_fxpatch_it_says_what_was_applied() -> None:
    assert probed("repaired")["state"] == "broken"
    said = probed("repaired", install=True)
    assert (said["state"], said["found"]) == ("ok", "well now")
    assert said["applied"] == [row.name for row in fxpatch.status().rows if row.state == "applied"]
    assert "codegen" in said["applied"]


def test_an_error_is_told_with_where_it_was_raised() -> None:
    said = probed("deep")
    assert said["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert not [line for line in said["traceback"] if "child.py" in line]
    assert "    return 1 // 0" in said["traceback"]
    assert set(said) == {"state", "error", "traceback"}


def test_a_diagnosis_tells_where_its_cause_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probed("diagnosed") == {
        "state": "broken",
        "error": "seen: a wheel is missing",
        "why": "it falls over",
        "todo": "put it back",
        "traceback": [],
    }

    def run(subject: Subject) -> str:
        try:
            return doctor_patients.deep(subject)
        except ZeroDivisionError as error:
            raise Broken("it divides") from error

    monkeypatch.setitem(PROBES, "caused", Probe("caused", "fx", "t", run, "w", "t"))
    said = probed("caused")
    assert (said["error"], said["why"]) == ("it divides", "")
    assert "    return 1 // 0" in said["traceback"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("  "), "ValueError"),
        (KeyError(), "KeyError"),
        (RuntimeError("x" * 9000), "RuntimeError: " + "x" * 3986),
    ],
)
def test_any_error_has_a_text(error: BaseException, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(subject: Subject) -> str:
        raise error

    monkeypatch.setitem(PROBES, "raises", Probe("raises", "fx", "t", run, "w", "t"))
    assert probed("raises")["error"] == text


def test_an_error_that_cannot_say_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def run(subject: Subject) -> str:
        raise Mute

    monkeypatch.setitem(PROBES, "mute", Probe("mute", "fx", "t", run, "w", "t"))
    assert probed("mute")["error"] == "Mute: (its text cannot be had: RuntimeError)"


def test_an_install_that_fails_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> None:
        raise OptionError("No.", seen="s", expected="e", hint="this advice")

    monkeypatch.setattr("fxpatch.installer.install", refuse)
    said = probed("fine", install=True)
    assert said["error"].startswith("fxpatch.install('musa') fails: OptionError: No.")
    assert said["todo"] == "this advice"


def test_an_error_of_fxpatch_brings_its_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(subject: Subject) -> str:
        raise OptionError("No.", seen="s", expected="e", hint="this advice")

    monkeypatch.setitem(PROBES, "ours", Probe("ours", "fx", "t", run, "w", "t"))
    assert probed("ours")["todo"] == "this advice"


# -- making ready ----------------------------------------------------------------------------------------------------


def test_facts_are_read_after_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_musa", vendor := types.ModuleType("torch_musa"))
    vendor.__version__ = "9.9"  # type: ignore[attr-defined]
    said, ready = ask("facts", Subject("", imports=("torch_musa",), model="doctor_patients:fine"))
    assert (said["device"], said["versions"]["torch_musa"], ready) == ("musa", "9.9", 1)
    assert said["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("subject", "kind", "words"),
    [
        (Subject("mussa"), "UnknownDeviceError", "'mussa'; PrivateUse1 is named 'musa'"),
        (Subject("musa", imports=("no_such_module",)), "VendorModuleError", "No module named 'no_such_module'"),
        (Subject("npu", simulated=True), "DeviceNameTakenError", "musa"),
        (Subject("musa", model="doctor_patients:nothing"), "OptionError", "doctor_patients has no nothing"),
    ],
)
def test_what_cannot_be_made_ready_is_a_typed_error(subject: Subject, kind: str, words: str) -> None:
    said, _ = ask("facts", subject)
    assert said["error"]["type"] == kind
    assert words in said["error"]["seen"]


def test_torchs_own_loader_is_asked_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(adapter, "load_device_backends", lambda: loaded.append(os.environ.get(AUTOLOAD)))
    for autoload in ("0", "1", None):
        said, _ = ask("facts", Subject("musa"), autoload=autoload)
        assert said["device"] == "musa"
    assert loaded == ["1", None]  # and the variable is again what the user has
    ask("facts", Subject("musa", simulated=True), autoload=None)
    assert len(loaded) == 2


def test_a_loader_that_fails_is_told_by_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        try:
            raise OSError("libascendcl.so: cannot open shared object file")
        except OSError as error:
            raise RuntimeError("Failed to load the backend extension: torch_npu") from error

    monkeypatch.setattr(adapter, "load_device_backends", fail)
    said, ready = ask("facts", Subject("musa"), autoload=None)
    assert said["error"]["type"] == "VendorModuleError"
    assert said["error"]["seen"] == "OSError: libascendcl.so: cannot open shared object file"
    assert ready == 0
    said, _ = ask("probe", Subject("musa"), autoload=None, probe="fine", install=False)
    assert said["state"] == "broken"
    assert "libascendcl.so" in said["error"]


# -- the model's door ------------------------------------------------------------------------------------------------


def test_a_model_comes_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = types.ModuleType("zoo"), torch.ones(2)
    monkeypatch.setitem(sys.modules, "zoo", module)
    module.by_position = lambda: (torch.neg, (x,))  # type: ignore[attr-defined]
    module.by_name = lambda: (torch.neg, {"input": x})  # type: ignore[attr-defined]
    assert model.example("zoo:by_position") == (torch.neg, (x,), {})
    assert model.example("zoo:by_name") == (torch.neg, (), {"input": x})
    for made, seen in ((torch.neg, "builtin_function"), ((torch.neg,), "tuple of 1"), ((torch.neg, x), "with Tensor")):
        module.wrong = lambda made=made: made  # type: ignore[attr-defined]
        with pytest.raises(OptionError) as caught:
            model.example("zoo:wrong")
        assert seen in caught.value.seen


@pytest.mark.parametrize("where", ["", "zoo", ":f", "zoo:"])
def test_a_model_has_a_module_and_a_function(where: str) -> None:
    with pytest.raises(OptionError, match="no module and function with a colon between them"):
        model.factory(where)


# -- the pictures ----------------------------------------------------------------------------------------------------


def test_pictures_are_measured_on_the_device(musa: str) -> None:
    said, ready = ask("pictures", Subject(musa, simulated=True))
    assert (said["state"], ready) == ("ok", 1)
    pieces, memory = said["found"]["pieces"], said["found"]["memory"]
    assert (pieces["size"], pieces["graph_class"]) == (512, "torch.musa.MUSAGraph")
    assert [(row["kind"], row["label"]) for row in pieces["rows"]] == [
        *(("graph", "graph 0"), ("split", "softmax"), ("graph", "graph 2"), ("split", "softmax"), ("graph", "graph 4"))
    ]
    assert all(row["us"] > 0 for row in pieces["rows"])
    assert [row["size"] for row in memory["rows"]] == [2048, 512, 128]
    assert memory["rows"][0]["alone"] > 2048 * 256 * 4  # a float32 result of that size, at the very least
    assert memory["rows"][0]["added"] > 0
    assert sum(row["added"] for row in memory["rows"]) < sum(row["alone"] for row in memory["rows"])


def test_a_device_without_graphs_has_no_pictures() -> None:
    with pytest.raises(NotApplicable, match="cpu captures no graphs: the profile of cpu names no graph class"):
        pictures.measure(Subject("cpu"))


def test_memory_that_nobody_counts(musa: str) -> None:
    steps = [Step(done, 1, 0, 3, None) for done in range(2)]
    device = GraphDevice(torch.device(musa), "a reason")
    assert pictures._memory(None, device, torch.ones(2), steps) == {  # type: ignore[arg-type]
        "why_not": "nobody counts it: torch.musa.memory_reserved() is missing, or refuses"
    }
