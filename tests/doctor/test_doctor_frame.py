"""Probes that crash, hang, exit, leave children behind: each is told as what it is, and nothing is left of it."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxpatch.doctor.probe import Subject
from fxpatch.doctor.processes import Zygote
from fxpatch.doctor.report import Line, Report
from fxpatch.doctor.run import chosen_of, examine, facts_of
from fxpatch.errors import (
    DoctorError,
    FxPatchError,
    OptionError,
    UnknownDeviceError,
    VendorModuleError,
)

MUSA = Subject("musa", simulated=True)
HERE = Path(__file__).parent


def descendants() -> set[int]:
    """The processes that this one has started, and those they have."""
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        for file in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            children = {int(pid) for pid in file.read_text().split()} - found
            found |= children
            todo += children
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def before() -> set[int]:
    return descendants()


@pytest.fixture(scope="module")
def report(before: set[int]) -> Report:
    return examine(MUSA, probes="doctor_patients")


@pytest.fixture(scope="module")
def lines(report: Report) -> dict[str, Line]:
    return {line.name: line for line in report.lines}


@pytest.mark.slow
def test_each_ends_in_its_own_state(report: Report, lines: dict[str, Line]) -> None:
    assert {name: line.state for name, line in lines.items()} == {
        "fine": "ok",
        "clean": "ok",
        "repaired": "repaired by fxpatch",
        "broken": "broken",
        "diagnosed": "broken",
        "absent": "not applicable",
        "crashes": "broken",
        "hangs": "broken",
        "exits": "broken",
        "leaves": "ok",
        "talks": "broken",
        "drops": "broken",
        "kills-its-starter": "broken",
        "deep": "broken",
    }
    assert report.counts == {"ok": 3, "repaired by fxpatch": 1, "broken": 9, "not applicable": 1}
    assert lines["fine"].found == "2 on musa"
    assert set(report.versions) == {"python", "torch", "fxpatch"}


@pytest.mark.slow
def test_how_a_process_ended_is_told(lines: dict[str, Line]) -> None:
    assert lines["crashes"].error == "Killed by signal SIGSEGV"
    assert re.fullmatch(r"No answer within [\d.]+ s", lines["hangs"].error)
    assert lines["exits"].error == "Exit status 7"
    assert lines["talks"].error == "SystemExit: 3"
    assert lines["kills-its-starter"].error.startswith("The process that starts the probes was killed by SIGKILL")


@pytest.mark.slow
def test_what_a_process_wrote_is_told_and_kept_short(lines: dict[str, Line]) -> None:
    crash = lines["crashes"].attempts[0].output
    assert crash[0] == "last words"
    assert re.fullmatch(r'  File ".*doctor_patients\.py", line \d+ in crashes', crash[-1])  # faulthandler's
    assert lines["hangs"].attempts[0].output == ("hanging",)
    assert lines["talks"].attempts[0].output[-1] == "the end"
    assert sum(map(len, lines["talks"].attempts[0].output)) < 20_000


@pytest.mark.slow
def test_where_an_error_was_raised_is_told_without_our_own_frames(lines: dict[str, Line]) -> None:
    where = lines["deep"].attempts[0].traceback
    assert re.fullmatch(r'  File ".*doctor_patients\.py", line \d+, in deep', where[0])
    assert "    return 1 // 0" in where
    assert lines["deep"].error == "ZeroDivisionError: integer division or modulo by zero"
    assert lines["diagnosed"].attempts[0].traceback == ()  # a diagnosis says it all


@pytest.mark.slow
def test_what_is_broken_is_tried_again_with_fxpatch(lines: dict[str, Line]) -> None:
    repaired = lines["repaired"]
    assert [(each.installed, each.state) for each in repaired.attempts] == [(False, "broken"), (True, "ok")]
    assert (repaired.found, repaired.error) == ("well now", "ValueError: first line\nsecond line")
    assert "codegen" in repaired.applied
    assert repaired.todo == "call fxpatch.install() before torch.compile"
    assert [each.installed for each in lines["broken"].attempts] == [False, True]
    assert [each.installed for each in lines["fine"].attempts] == [False]
    assert [each.installed for each in lines["crashes"].attempts] == [False]  # installs=False
    assert lines["drops"].error == "ValueError: broken"  # not applicable any more, and still not answered


@pytest.mark.slow
def test_a_diagnosis_brings_its_own_advice(lines: dict[str, Line]) -> None:
    known, unknown = lines["diagnosed"], lines["broken"]
    assert (known.error, known.why, known.todo) == ("seen: a wheel is missing", "it falls over", "put it back")
    assert (unknown.why, unknown.todo) == ("why of broken", "what to do about broken")
    assert (lines["absent"].found, lines["absent"].error) == ("there is no wheel to be missing", "")


@pytest.mark.slow
def test_nothing_is_left(before: set[int], report: Report, lines: dict[str, Line]) -> None:
    assert descendants() <= before
    assert [pid for pid in map(int, lines["leaves"].found.split()) if alive(pid)] == []
    folder = re.search(r"cache (\S+)/inductor", lines["clean"].found)
    assert folder is not None
    assert not Path(folder[1]).exists()


@pytest.mark.slow
def test_a_probe_finds_a_process_where_nothing_was_initialised(lines: dict[str, Line]) -> None:
    assert lines["clean"].found.startswith("loaded [], ")
    assert lines["clean"].found.endswith(f"autoload {os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD')}")


@pytest.mark.slow
def test_an_interrupt_ends_everything(before: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpatch.doctor.run.JOBS", 1)

    def interrupt(done: int, total: int, name: str) -> None:
        assert descendants() - before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(MUSA, only="hangs", progress=interrupt, probes="doctor_patients")
    assert descendants() <= before


@pytest.mark.slow
def test_a_killed_doctor_leaves_nothing_running(tmp_path: Path) -> None:
    code = (
        "import fxpatch.doctor.run; fxpatch.doctor.run.JOBS = 1; from test_doctor_frame import *; "
        "examine(MUSA, only='hangs', limit_s=600, probes='doctor_patients')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as doctor:
        deadline = time.monotonic() + 120
        while not (hanging := [pid for pid in descendants() if _session(pid) == pid and _above(pid, doctor.pid) == 2]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        doctor.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, hanging)):
        assert time.monotonic() < deadline, hanging
        time.sleep(0.05)


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return ["", "0", "0", "0"]


def _session(pid: int) -> int:
    return int(_stat(pid)[3])


def _above(pid: int, ancestor: int) -> int:
    """How many generations `ancestor` is above `pid`; -1 if it is not."""
    for generation in range(10):
        if pid == ancestor:
            return generation
        pid = int(_stat(pid)[1])
    return -1


# -- what cannot be examined -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    modules = tmp_path_factory.mktemp("modules")
    (modules / "doctor_import_raises.py").write_text("raise OSError('libwheel.so: cannot open shared object file')")
    (modules / "doctor_import_crashes.py").write_text("import os; os.abort()")
    (modules / "doctor_import_hangs.py").write_text("import time; time.sleep(600)")
    (modules / "doctor_import_prints.py").write_text("print('{}', flush=True)")
    sys.path.insert(0, str(modules))
    made = Zygote("doctor_patients", str(modules))
    yield made
    made.close()
    sys.path.remove(str(modules))


def facts(zygote: Zygote, subject: Subject, **options: Any) -> dict[str, Any]:
    asked = {"kind": "facts", "subject": dataclasses.asdict(subject), "autoload": None, "ready_s": 60.0, "limit_s": 60}
    asked["patient"] = False
    return facts_of(zygote.ask({**asked, **options}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "kind", "words"),
    [
        (Subject("musa"), UnknownDeviceError, "here: --import MODULE, or --simulate"),
        (Subject("cpu", simulated=True), UnknownDeviceError, "cpu"),
        (Subject("cpu", imports=("no_such_module",)), VendorModuleError, "No module named 'no_such_module'"),
        (Subject("cpu", imports=("doctor_import_raises",)), VendorModuleError, "OSError: libwheel.so: cannot open"),
        (Subject("cpu", imports=("doctor_import_crashes",)), DoctorError, "killed by signal SIGABRT"),
        (Subject("cpu", model="doctor_patients"), OptionError, "no module and function with a colon"),
        (Subject("cpu", model="no_such_module:f"), OptionError, "No module named 'no_such_module'"),
        (Subject("cpu", model="doctor_patients:f"), OptionError, "doctor_patients has no f"),
        (Subject("cpu", model="doctor_patients:HOSTILE"), OptionError, "HOSTILE is a str"),
    ],
)
def test_a_request_that_cannot_be_met_is_a_typed_error(
    zygote: Zygote, subject: Subject, kind: type[FxPatchError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        facts(zygote, subject)
    assert type(caught.value) is kind
    assert words in str(caught.value)


@pytest.mark.slow
def test_an_import_that_hangs_has_a_limit_of_its_own(zygote: Zygote) -> None:
    with pytest.raises(DoctorError, match=r"no answer within 0\.3 s while it was made ready"):
        facts(zygote, Subject("cpu", imports=("doctor_import_hangs",)), ready_s=0.3)


@pytest.mark.slow
def test_what_an_import_prints_is_no_answer(zygote: Zygote) -> None:
    found = facts(zygote, Subject("", imports=("doctor_import_prints",)))
    assert found["device"] == "cpu"
    assert found["versions"]["doctor_import_prints"] == "unknown"


@pytest.mark.slow
def test_the_device_of_the_process_is_found_there(zygote: Zygote) -> None:
    assert facts(zygote, Subject("", simulated=False))["device"] == "cpu"
    assert facts(zygote, MUSA)["device"] == "musa"


@pytest.mark.slow
def test_a_doctor_that_cannot_start_says_so(tmp_path: Path) -> None:
    starting = Zygote("no_such_probes", str(tmp_path))
    try:
        with pytest.raises(DoctorError, match=r"(?s)it ended with status 1: .*No module named 'no_such_probes'"):
            starting.ask({"ready_s": 1, "limit_s": 1, "patient": False})
    finally:
        starting.close()


def test_probes_are_chosen_by_name_or_stage() -> None:
    known = [{"name": name, "stage": stage} for name, stage in (("fx-copies", "fx"), ("rng", "runtime"))]
    assert chosen_of(known, "*") == known
    assert chosen_of(known, "fx*") == chosen_of(known, "fx") == known[:1]
    assert chosen_of(known, "runtime") == known[1:]
    with pytest.raises(OptionError, match=r"the pattern 'nothing'\n  expected: .*: fx-copies, rng"):
        chosen_of(known, "nothing")
