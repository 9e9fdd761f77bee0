"""`fxpatch doctor`: options, exit statuses, where reports go, and what it does not load."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxpatch.commands.doctor as command
from fxpatch.__main__ import main
from fxpatch.doctor.probe import Subject
from fxpatch.doctor.report import Attempt, Line, Report
from fxpatch.errors import OptionError

HERE = Path(__file__).parent


def made(*states: str) -> Report:
    tried = (Attempt(False, "ok"),)
    lines = tuple(Line(f"p{n}", "fx", "t", state, "", "", "", "", (), tried) for n, state in enumerate(states))
    return Report("musa", True, (), "", {"torch": "2"}, (), lines, 1.0)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `examine` was asked; it finds one thing that is ok."""
    asked: list[dict[str, Any]] = []

    def examine(subject: Subject, **options: Any) -> Report:
        asked.append({"subject": subject, **options})
        for done in range(3):
            options["progress"](done, 2, "fx-copies" if done < 2 else "")
        return made("ok")

    monkeypatch.setattr(command, "examine", examine)
    return asked


@pytest.mark.parametrize(
    ("states", "fail_on", "status"),
    [
        ((), "repaired", 0),
        (("ok", "not applicable"), "repaired", 0),
        (("ok", "repaired by fxpatch"), "broken", 0),
        (("ok", "repaired by fxpatch"), "repaired", 1),
        (("ok", "broken"), "repaired", 1),
        (("ok", "broken"), "broken", 1),
        (("broken",), "never", 0),
    ],
)
def test_exit_status(
    states: tuple[str, ...], fail_on: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "examine", lambda *_, **__: made(*states))
    assert main(["doctor", "--fail-on", fail_on]) == status
    assert f"{len(states)} probes in 1 s" in capsys.readouterr().out


def test_what_is_broken_fails_by_default(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "examine", lambda *_, **__: made("broken"))
    assert main(["doctor"]) == 1
    monkeypatch.setattr(command, "examine", lambda *_, **__: made("repaired by fxpatch"))
    assert main(["doctor"]) == 0


def test_options_reach_the_examination(examined: list[dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    assert main(["doctor"]) == 0
    assert main(["doctor", "--simulate"]) == 0
    arguments = ["--device", "npu", "--import", "a", "--import", "b", "--model", "m:f", "--only", "fx*", "--limit", "3"]
    assert main(["doctor", *arguments, "--html", str(tmp_path / "page.html")]) == 0
    asked = [{name: value for name, value in each.items() if name != "progress"} for each in examined]
    assert asked == [
        {"subject": Subject(""), "only": "*", "limit_s": None, "pictures": False},
        {"subject": Subject("musa", simulated=True), "only": "*", "limit_s": None, "pictures": False},
        {"subject": Subject("npu", False, ("a", "b"), "m:f"), "only": "fx*", "limit_s": 3.0, "pictures": True},
    ]


def test_json_goes_to_stdout_or_a_file(examined: list[dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["ok"] == 1
    assert main(["doctor", "--json", str(tmp_path / "report.json")]) == 0
    assert "1 probes in 1 s" in capsys.readouterr().out
    assert (tmp_path / "report.json").read_text() == made("ok").json() + "\n"
    assert main(["doctor", "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_files_that_cannot_be_written_are_told_before_anything_is_done(
    examined: list[dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    for option, target in (("--json", tmp_path / "none" / "x"), ("--html", tmp_path), ("--html", Path("/proc/x/y"))):
        assert main(["doctor", option, str(target)]) == 2
        assert f"'{target}'" in capsys.readouterr().err
    assert examined == []
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def examine(*_: object, **__: object) -> Report:
        raise OptionError("No.", seen="this", expected="that", hint="do")

    monkeypatch.setattr(command, "examine", examine)
    target = tmp_path / "report.json"
    assert main(["doctor", "--json", str(target)]) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "fxpatch: No.\n  seen: this\n  expected: that\n  to do: do\n")
    assert not target.exists()  # nothing half done


@pytest.mark.parametrize(
    "arguments", [["--limit", "0"], ["--limit", "soon"], ["--fail-on", "sometimes"], ["--html"], ["musa"]]
)
def test_usage_errors(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *arguments])
    assert exit_.value.code == 2


def test_progress_in_a_log_is_a_few_lines(examined: list[dict[str, Any]], capsys: Any) -> None:
    assert main(["doctor"]) == 0
    streams = capsys.readouterr()
    assert streams.err == "fxpatch doctor: 0/2 probes, now fx-copies\nfxpatch doctor: 2/2 probes\n"
    assert "fxpatch doctor: 0/2" not in streams.out


def test_progress_on_a_terminal_is_a_bar(examined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert main(["doctor"]) == 0
    assert "2/2" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "1 probes in 1 s" in out.getvalue()


def test_the_options_are_frozen(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    printed = capsys.readouterr().out
    names = ("--device", "--simulate", "--import", "--model", "--json", "--html", "--only", "--fail-on", "--limit")
    assert [name for name in names if name not in printed] == []
    assert printed.count("\n  --") == len(names)


@pytest.mark.slow
def test_the_doctors_own_process_loads_neither_torch_nor_the_device(fresh: Callable[..., str]) -> None:
    printed = fresh(
        """
        import functools, sys
        sys.path.insert(0, "doctor")
        import fxpatch.commands.doctor as command
        import fxpatch.doctor.run
        fxpatch.doctor.run.JOBS = 1
        command.examine = functools.partial(command.examine, probes="doctor_patients")
        from fxpatch.__main__ import main
        status = main(["doctor", "--simulate", "--device", "npu", "--only", "fine", "--json", "--html", "/dev/null"])
        print("AFTER", status, [name for name in ("torch", "fake_kernels", "fxpatch.simulator") if name in sys.modules])
        """
    )
    report, _, after = printed.partition("AFTER")
    assert after == " 0 []\n"
    content = json.loads(report)
    assert content["lines"][0]["found"] == "2 on npu"
    pieces, memory = content["pictures"]["pieces"], content["pictures"]["memory"]
    assert [row["kind"] for row in pieces["rows"]] == ["graph", "split", "graph", "split", "graph"]
    assert [row["label"] for row in pieces["rows"] if row["kind"] == "split"] == ["softmax", "softmax"]
    assert all(row["us"] > 0 for row in pieces["rows"])
    sizes = [row["size"] for row in memory["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row["alone"] > 0 for row in memory["rows"])
    assert memory["rows"][0]["added"] > 0
    assert sum(row["added"] for row in memory["rows"]) < sum(row["alone"] for row in memory["rows"])
    assert dataclasses.asdict(Attempt(False, "ok")).keys() == content["lines"][0]["attempts"][0].keys()
