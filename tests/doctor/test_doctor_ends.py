"""How the command ends when something else does: its streams, its process, torch itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fxpatch.__main__ import main
from fxpatch.commands.arguments import seconds
from fxpatch.doctor.probe import Subject
from fxpatch.doctor.run import examine

HERE = Path(__file__).parent
COMMAND = """
import os, signal, sys, tempfile
import fxpatch.commands.doctor as command
from fxpatch.__main__ import main
from fxpatch.doctor.report import Line, Report

def examine(subject, *, progress, **_):
    progress(0, 1, "fine")
    with tempfile.TemporaryDirectory():
        for number in {signals}:
            os.kill(os.getpid(), number)
    {then}
    line = Line("p", "fx", "t", "ok", "x" * 100_000, "", "", "", (), ())
    return Report("musa", True, (), "", {{"torch": "2"}}, (), (line,), 1.0)

command.examine = examine
sys.exit(main(sys.argv[1:]))
"""


def shell(line: str, *arguments: str, signals: str = "()", then: str = "", **env: str) -> tuple[str, str]:
    """A line for bash, in which "$@" is the command; its stdout, and its stderr."""
    code = COMMAND.format(signals=signals, then=then)
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-c", code, "doctor", *arguments],
        cwd=HERE,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0", "PYTHONUNBUFFERED": "", **env},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_default_signals,
    )
    return done.stdout, done.stderr


def _default_signals() -> None:
    """As at a terminal: the tests may have been started in the background, or by nohup, and a shell inherits that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_a_reader_that_goes_is_no_error_and_files_are_written_all_the_same(tmp_path: Path) -> None:
    status = '; echo "status ${PIPESTATUS[0]}"'
    read = "| { read -r first; echo $first; }"
    page = tmp_path / "page.html"
    out, err = shell(f'"$@" {read}{status}', "--html", str(page))
    assert out.splitlines()[1:] == ["status 0"]
    assert err == "fxpatch doctor: 0/1 probes, now fine\n"
    assert page.read_text().endswith("</html>\n")
    assert shell(f'"$@" {read}{status}', "--json") == ("{\nstatus 0\n", err)
    assert shell(f'"$@" 2>&1 >/dev/null | true{status}') == ("status 0\n", "")


def test_streams_that_are_closed_leave_the_status_what_it_is() -> None:
    assert shell('"$@" >&-; echo $?')[0] == "0\n"
    assert shell('"$@" 2>&- | tail -n 1 | head -c 8; echo " ${PIPESTATUS[0]}"')[0] == "1 probes 0\n"
    assert shell('"$@" <&- >&- 2>&-; echo $?')[0] == "0\n"


def test_a_full_disk_is_told_and_files_elsewhere_are_written(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    out, err = shell('"$@" >/dev/full; echo $?', "--json", str(target))
    assert out == "2\n"
    assert err.endswith("fxpatch: [Errno 28] No space left on device\n")
    assert target.read_text().endswith("}\n")
    assert shell('"$@" 2>/dev/full >/dev/null; echo $?')[0] == "0\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_tidily(number: signal.Signals, tmp_path: Path) -> None:
    twice = str((int(number), int(number))) if number != signal.SIGINT else str((int(number),))
    out, err = shell('"$@"; echo $?', signals=twice, TMPDIR=str(tmp_path))
    assert out == f"{128 + number}\n"
    assert err.endswith(f"fxpatch: stopped by {number.name}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    out, _ = shell("trap '' HUP; \"$@\" >/dev/null; echo $?", signals=str((int(signal.SIGHUP),)))
    assert out == "0\n"


def test_an_error_of_ours_is_no_finding() -> None:
    out, err = shell('"$@"; echo $?', then="1 // 0")
    assert out == "2\n"
    assert "this is an error in fxpatch itself, please report it" in err
    assert err.endswith("ZeroDivisionError: integer division or modulo by zero\n\n")


@pytest.mark.parametrize("limit", ["inf", "nan", "1e300", "-1", "0"])
def test_no_such_time_limit(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--limit", limit])
    assert "seconds are expected, above 0, a day at most" in capsys.readouterr().err
    assert seconds("86400") == 86400.0


@pytest.mark.slow
def test_what_was_found_is_told_where_no_process_can_be_started_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCTOR_LATE", str(tmp_path / "broken"))
    monkeypatch.setattr("fxpatch.doctor.run.JOBS", 1)
    report = examine(Subject("cpu"), pictures=True, probes="doctor_late")
    told = {line.name: (line.state, line.found or line.error) for line in report.lines}
    assert told["first"] == ("ok", "found")
    assert told["forks"] == ("ok", "one of two")  # it came back twice, and answered once
    assert told["last"][0] == told["breaks-torch"][0] == "broken"
    assert told["last"][1].startswith("Not asked: The doctor cannot start a process with torch. it ended with status 1")
    assert "libtorch.so: cannot open" in told["last"][1]
    assert report.lines[-1].todo.startswith("mend this installation of torch")
    assert report.pictures is not None
    assert "Not asked" in report.pictures["pieces"]["why_not"]
