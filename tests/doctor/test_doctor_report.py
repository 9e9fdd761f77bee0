"""The doctor's report: what attempts come to, the JSON schema as a literal, and the table."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxpatch.doctor.probe import STAGES, State
from fxpatch.doctor.processes import Ended
from fxpatch.doctor.report import Attempt, Line, Report, attempt, first_line, line, plain
from fxpatch.doctor.table import piped, show

DOCS = Path(__file__).resolve().parents[2] / "docs" / "doctor.md"
PROBE = {"name": "p", "stage": "fx", "title": "a title", "why": "its why", "todo": "its advice"}
OK: dict[str, Any] = {"state": "ok", "found": "all of it", "applied": ["codegen"]}
BROKEN: dict[str, Any] = {"state": "broken", "error": "ValueError: no\nmore", "traceback": ["  File 1", "    x"]}
ABSENT: dict[str, Any] = {"state": "not applicable", "found": "there is none"}


def judged(*said: dict[str, Any]) -> Line:
    return line(PROBE, [attempt(bool(n), Ended(each)) for n, each in enumerate(said)], said[-1])


def sample() -> Report:
    return Report(
        device="musa",
        simulated=True,
        imports=("torchada",),
        model="zoo:llama",
        versions={"python": "3.11.7", "torch": "2.13.0"},
        notes=("a note",),
        lines=(judged(BROKEN, {**BROKEN, "error": "ValueError: still no", "why": "known", "todo": "this"}), judged(OK)),
        seconds=1.5,
    )


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ((OK,), "ok"),
        ((ABSENT,), "not applicable"),
        ((BROKEN,), "broken"),
        ((BROKEN, BROKEN), "broken"),
        ((BROKEN, OK), "repaired by fxpatch"),
        ((BROKEN, ABSENT), "broken"),
    ],
)
def test_what_attempts_come_to(said: tuple[dict[str, Any], ...], state: str) -> None:
    assert judged(*said).state == state


def test_a_repaired_line_says_by_what() -> None:
    found = judged(BROKEN, OK)
    assert (found.found, found.error, found.applied) == ("all of it", "ValueError: no\nmore", ("codegen",))
    assert found.todo == "call fxpatch.install() before torch.compile"
    assert judged(OK).applied == ()  # nothing needed repair
    assert judged(OK).todo == ""


def test_advice_is_the_diagnosis_own_or_the_probes() -> None:
    own = judged({**BROKEN, "why": "a better why", "todo": "better advice"})
    assert (own.why, own.todo) == ("a better why", "better advice")
    assert (judged(BROKEN).why, judged(BROKEN).todo) == ("its why", "its advice")


@pytest.mark.parametrize(
    ("ended", "error"),
    [
        (Ended(None, "killed by signal SIGSEGV"), "Killed by signal SIGSEGV"),
        (Ended(OK, "killed by signal SIGABRT"), "Killed by signal SIGABRT"),
        (Ended(BROKEN, "no answer within 3 s"), "No answer within 3 s, after: ValueError: no\nmore"),
        (Ended(None), "It ended without an answer"),
    ],
)
def test_a_process_that_does_not_end_well_is_broken_whatever_it_said(ended: Ended, error: str) -> None:
    found = attempt(False, ended)
    assert (found.state, found.error, found.found) == ("broken", error, "")


def test_texts_are_made_plain() -> None:
    hostile = "\x1b[31mred\x1b[0m\x1b]0;title\x07 \x00a\tb\r\nc\x9bd\re \ud800 \u4e2d"
    assert plain(hostile) == "red a\tb\ncde ? \u4e2d"
    assert attempt(True, Ended({**OK, "found": "\x1b[1mx"})).found == "x"
    assert attempt(True, Ended(BROKEN, output="\x1b[2Ka\n\nb")).output == ("a", "", "b")
    assert first_line("\n  \n one \ntwo") == "one"
    assert first_line("") == ""


def test_counts_have_all_states_and_stages_their_order() -> None:
    assert sample().counts == {"ok": 1, "repaired by fxpatch": 0, "broken": 1, "not applicable": 0}
    assert [state.value for state in State] == ["ok", "repaired by fxpatch", "broken", "not applicable"]
    assert list(sample().stages) == ["fx"]
    assert (
        *("device", "torch.device", "fx", "dynamo", "aot", "inductor", "numerics", "runtime", "graphs", "fakes"),
        *("artifacts", "processes", "versions"),
    ) == STAGES


def test_the_schema_is_frozen() -> None:
    tried = {"installed": False, "state": "broken", "found": "", "error": "ValueError: no\nmore"}
    tried |= {"traceback": ["  File 1", "    x"], "output": [], "applied": [], "seconds": 0.0}
    assert json.loads(sample().json()) == {
        "schema": 1,
        "device": "musa",
        "counts": {"ok": 1, "repaired by fxpatch": 0, "broken": 1, "not applicable": 0},
        "simulated": True,
        "imports": ["torchada"],
        "model": "zoo:llama",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "notes": ["a note"],
        "lines": [
            {
                "name": "p",
                "stage": "fx",
                "title": "a title",
                "state": "broken",
                "found": "",
                "error": "ValueError: still no",
                "why": "known",
                "todo": "this",
                "applied": [],
                "attempts": [tried, {**tried, "installed": True, "error": "ValueError: still no"}],
            },
            {
                "name": "p",
                "stage": "fx",
                "title": "a title",
                "state": "ok",
                "found": "all of it",
                "error": "",
                "why": "its why",
                "todo": "",
                "applied": [],
                "attempts": [
                    {
                        "installed": False,
                        "state": "ok",
                        "found": "all of it",
                        "error": "",
                        "traceback": [],
                        "output": [],
                        "applied": ["codegen"],
                        "seconds": 0.0,
                    }
                ],
            },
        ],
        "seconds": 1.5,
        "pictures": None,
    }
    assert list(json.loads(sample().json()))[:3] == ["schema", "device", "counts"]
    assert sample().json().isascii()


def test_every_field_is_documented_and_nothing_else_is() -> None:
    section = DOCS.read_text(encoding="utf-8").split("## The JSON")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z_.]+)` \|", section, re.MULTILINE))
    content = json.loads(sample().json())
    fields = {*content, *(f"lines.{key}" for key in content["lines"][0])}
    fields |= {f"lines.attempts.{key}" for key in content["lines"][0]["attempts"][0]}
    assert documented - {name for name in documented if name.startswith("pictures.")} == fields


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_tells_what_why_and_what_to_do() -> None:
    assert piped(sample()) == (
        "fxpatch doctor: musa (simulated): python 3.11.7, torch 2.13.0\n"
        "note: a note\n"
        "\n"
        "fx\n"
        " broken   a title\n"
        "          without: ValueError: no\n"
        "          with fxpatch: ValueError: still no\n"
        "          why: known\n"
        "          to do: this\n"
        "          |   File 1\n"
        "          |     x\n"
        " ok       a title                      all of it\n"
        "\n"
        "2 probes in 2 s: 1 ok, 0 repaired by fxpatch, 1 broken, 0 not applicable\n"
    )


def test_a_repaired_line_in_the_table() -> None:
    text = piped(Report("musa", False, (), "", {}, (), (judged(BROKEN, OK),), 1.0))
    assert " repaired a title                      all of it\n" in text
    assert "          without: ValueError: no\n          applied: codegen\n" in text
    assert "(simulated)" not in text


def test_piped_tables_are_narrow_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    long = {"state": "broken", "error": "E" * 200 + " [red]not markup[/red] :warning:", "traceback": ["t" * 200]}
    text = piped(Report("musa", True, (), "", {"torch": "1" * 100}, ("n" * 100,), (judged(long, long),), 1.0))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "[red]notmarkup[/red]:warning:" in re.sub(r"\s", "", text)


def test_a_stream_gets_the_characters_that_it_has() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        show(Report("musa", True, (), "", {}, ("caf\u00e9 \u4e2d",), (), 1.0), file)
        file.flush()
        assert b"note: caf? ?\n" in raw.getvalue()


def test_attempts_are_plain_data() -> None:
    assert Attempt(True, "ok") == Attempt(True, "ok", "", "", (), (), (), 0.0)
