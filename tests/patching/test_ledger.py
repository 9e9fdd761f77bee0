"""A ledger applies each patch whole or not at all, in any order of arrival, and takes everything back."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import pytest

import fxpatch.patching.ledger as ledger_module
from fxpatch.errors import FxPatchWarning, ProfileError, TargetMovedError
from fxpatch.patching import (
    Applied,
    Deferred,
    Edits,
    Ledger,
    Needed,
    NotNeeded,
    Patch,
    Refused,
    Target,
    compiling,
    settle_all,
)
from fxpatch.settings import settings_patch


@pytest.fixture
def library() -> Iterator[types.ModuleType]:
    module = types.ModuleType("library_under_patch")
    exec("def call(a, b, *, c=1): return (a, b, c)\nvalue = 1", vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(autouse=True)
def every_ledger_is_undone() -> Iterator[None]:
    """A ledger that a cycle keeps alive would be settled by whatever compiles next."""
    before = set(ledger_module._live)
    yield
    for ledger in set(ledger_module._live) - before:
        ledger.undo()


def record(
    module: Any,
    *,
    decide: Callable[[Any], Any] = lambda _: Needed("broken"),
    probe: Callable[[str], Any] = lambda _: None,
    apply: Callable[..., str] | None = None,
    parameters: str | None = "a, b, ...",
    path: str = "call",
    waits_for: tuple[str, ...] = (),
    per_context: bool = False,
) -> Patch[Any]:
    def set_value(_device: str, _facts: Any, edits: Edits) -> str:
        edits.set_attr(module, "value", module.value + 1)
        return "value is one more"

    return Patch(
        name="record",
        why="",
        upstream="",
        until="",
        seen_in=("2.13.0",),
        targets=(Target("library_under_patch", path, parameters),),
        probe=probe,
        decide=decide,
        apply=apply or set_value,
        waits_for=waits_for,
        per_context=per_context,
    )


def test_applied_once_however_often_settled_and_taken_back(library: Any) -> None:
    ledger = Ledger([record(library)], "musa")
    for _ in range(3):
        assert ledger.settle()["record"] == Applied("broken", "value is one more")
    assert library.value == 2
    assert ledger.undo() == []
    assert library.value == 1


def test_a_ledger_that_was_undone_stays_undone(library: Any) -> None:
    answer = {"decision": NotNeeded("fine")}
    ledger = Ledger([record(library, decide=lambda _: answer["decision"])], "musa")
    ledger.settle()
    ledger.undo()
    answer["decision"] = Needed("broken")
    ledger.settle()
    assert library.value == 1


def test_not_needed_changes_nothing(library: Any) -> None:
    ledger = Ledger([record(library, decide=lambda _: NotNeeded("fine"))], "musa")
    assert ledger.settle() == {"record": NotNeeded("fine")}
    assert library.value == 1


def test_a_new_version_of_what_is_wrong_is_applied_anew(library: Any) -> None:
    """A second shim over the first: the edits made for the first are taken back before those for the second."""
    state = {"shim": "first"}
    patch = record(library, probe=lambda _: state["shim"], decide=lambda shim: Needed(shim, version=shim))
    ledger = Ledger([patch], "musa")
    ledger.settle()
    state["shim"] = "second"
    assert ledger.settle()["record"] == Applied("second", "value is one more", "second")
    assert library.value == 2


@pytest.mark.parametrize(
    ("change", "path", "seen"),
    [
        ({"parameters": "a, b"}, "call", r"call\(a, b, \*, c=1\)"),
        ({"parameters": "a, renamed, ..."}, "call", r"call\(a, b, \*, c=1\)"),
        ({"parameters": "a, b, c, d"}, "call", r"call\(a, b, \*, c=1\)"),
        ({"parameters": "a, ..."}, "call", r"call\(a, b, \*, c=1\)"),
        ({"parameters": None}, "gone.away", "no attribute 'gone'"),
    ],
)
def test_a_moved_target_is_refused_with_version_and_signature(
    library: Any, change: dict[str, Any], path: str, seen: str
) -> None:
    import torch

    ledger = Ledger([record(library, path=path, **change)], "musa")
    outcome = ledger.settle()["record"]
    assert isinstance(outcome, Refused)
    assert isinstance(outcome.error, TargetMovedError)
    assert torch.__version__ in outcome.reason
    with pytest.raises(TargetMovedError, match=seen):
        raise outcome.error
    assert library.value == 1


def test_what_is_refused_after_install_is_said_once(library: Any) -> None:
    """A target that has moved in a module imported later has nobody to raise to: it warns, at the next settling."""
    ledger = Ledger([record(library, path="vanished")], "musa")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settle_all("in a test")
        settle_all("in a test")
    ours = [w for w in said if "no attribute 'vanished'" in str(w.message)]
    assert [w.category for w in ours] == [FxPatchWarning]
    ledger.undo()


def test_a_setting_torch_does_not_have_is_an_error_to_act_on() -> None:
    import torch._dynamo.config  # noqa: F401

    ledger = Ledger([settings_patch("dynamo", {"recompile_limits": 3})], "musa")
    ledger.settle()
    (error,) = ledger.new_errors()
    assert isinstance(error, ProfileError)
    assert "has no setting 'recompile_limits'" in str(error)
    assert "none of its settings in this table is in force" in str(error)
    ledger.undo()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_a_ledger_that_is_settling(library: Any) -> None:
    """The child of a process in which another thread is settling gets no lock that nobody will release."""
    settling, go_on = threading.Event(), threading.Event()

    def slow(_device: str) -> int:
        settling.set()
        go_on.wait(1)
        return library.value

    ledger = Ledger([dataclasses.replace(record(library), probe=slow)], "musa")
    thread = threading.Thread(target=ledger.settle)
    thread.start()
    settling.wait()
    threading.Timer(0.2, go_on.set).start()
    child = os.fork()
    if child == 0:
        ledger.settle()
        os._exit(0 if isinstance(ledger.outcomes["record"], Applied) else 1)
    thread.join()
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)
    ledger.undo()


def test_a_patch_that_fails_half_way_is_taken_back_whole(library: Any) -> None:
    def half(_device: str, _facts: Any, edits: Edits) -> str:
        edits.set_attr(library, "value", 99)
        raise ZeroDivisionError

    ledger = Ledger([record(library, apply=half)], "musa")
    with pytest.raises(ZeroDivisionError):
        ledger.settle()
    assert library.value == 1
    assert ledger.undo() == []


def test_an_import_that_comes_later_is_waited_for(library: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """And a ledger that was undone before the module came does nothing when it comes."""
    for name in ("arrives_later", "arrives_too_late"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    ledger = Ledger([record(library, waits_for=("arrives_later",))], "musa")
    assert isinstance(ledger.settle()["record"], Deferred)
    assert library.value == 1
    __import__("arrives_later")
    assert isinstance(ledger.outcomes["record"], Applied)
    assert library.value == 2
    ledger.undo()
    other = Ledger([record(library, waits_for=("arrives_too_late",))], "musa")
    other.settle()
    other.undo()
    __import__("arrives_too_late")
    assert library.value == 1


@pytest.mark.parametrize("settled", ["before the import", "in the middle of it"])
@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_a_module_that_is_half_imported_is_waited_for(
    library: Any, tmp_path: Path, monkeypatch: Any, settled: str, ends: str
) -> None:
    """It is in sys.modules from the beginning of its import, and patching it then would be overwritten."""
    name = f"half_way_{settled.split()[0]}_{ends.split()[0]}"
    ledger = Ledger([record(library, waits_for=(name,))], "musa")
    library.settle = ledger.settle
    (tmp_path / f"{name}.py").write_text(
        "import library_under_patch\nlibrary_under_patch.settle()\n"
        "assert library_under_patch.value == 1, 'patched too early'\n" + ("" if ends == "well" else "1 / 0\n")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    if settled == "before the import":
        ledger.settle()
    if ends == "well":
        __import__(name)
    else:
        with pytest.raises(ZeroDivisionError):
            __import__(name)
    assert library.value == (2 if ends == "well" else 1)
    assert isinstance(ledger.outcomes["record"], Applied if ends == "well" else Deferred)
    ledger.undo()
    assert library.value == 1


def test_settling_inside_somebody_elses_code_warns_and_does_not_raise(library: Any) -> None:
    def fail(_device: str) -> Any:
        raise ZeroDivisionError("probe")

    ledger = Ledger([record(library, probe=fail)], "musa")
    with pytest.warns(match=r"could not settle while testing: ZeroDivisionError\('probe'\)"):
        settle_all("while testing")
    ledger.undo()


def test_in_another_thread_what_lives_in_its_context_holds_while_it_compiles(library: Any) -> None:
    setting: ContextVar[int] = ContextVar("setting", default=1)

    def set_it(_device: str, _facts: Any, edits: Edits) -> str:
        token = setting.set(2)
        edits.on_undo(lambda: setting.reset(token))
        return "2"

    seen: list[int] = []

    def elsewhere() -> None:
        seen.append(setting.get())
        with compiling():
            seen.append(setting.get())
            ledger.settle()
            with compiling():
                seen.append(setting.get())
        seen.append(setting.get())

    ledger = Ledger([record(library, apply=set_it, per_context=True)], "musa")
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [1, 2, 2, 1]
    assert isinstance(ledger.outcomes["record"], Deferred)
    assert setting.get() == 1, "nothing has settled here yet"
    ledger.settle()
    assert setting.get() == 2
    ledger.undo()
    assert setting.get() == 1


def test_a_compilation_goes_on_when_settling_fails(library: Any) -> None:
    def fail(_device: str) -> Any:
        raise ZeroDivisionError("probe")

    ledger = Ledger([record(library, probe=fail)], "musa")
    with pytest.warns(match="could not settle at the start of a compilation: ZeroDivisionError"), compiling():
        library.compiled = True
    assert library.compiled
    ledger.undo()


def test_a_task_that_copies_the_context_does_not_keep_it_from_the_others(library: Any) -> None:
    """What is applied in a copy of the installing context is not applied in the original, nor in another copy."""
    setting: ContextVar[int] = ContextVar("setting", default=1)

    def set_it(_device: str, _facts: Any, edits: Edits) -> str:
        token = setting.set(2)
        edits.on_undo(lambda: setting.reset(token) if setting.get() == 2 else None)
        return "2"

    def decide(now: int) -> Any:
        return NotNeeded("2 already") if now == 2 else Needed("1")

    def compiled() -> int:
        with compiling():
            return setting.get()

    patch = record(library, probe=lambda _: setting.get(), decide=decide, apply=set_it, per_context=True)
    ledger = Ledger([patch], "musa")
    assert [copy_context().run(compiled), copy_context().run(compiled), compiled()] == [2, 2, 2]
    assert ledger.undo() == ["record still holds in the thread or task where it was applied: uninstall() there, too"]
