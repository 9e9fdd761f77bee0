"""`fxpatch audit`: exit statuses, text, JSON, SARIF, and the progress."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fxpatch.commands.audit as command
from fake_kernels.audit import RULES, Finding, Report, UnknownNamespaceError, as_json, as_sarif, as_text
from fake_kernels.audit.findings import make_report
from fxpatch.__main__ import main

WARNING = Finding(
    "v::a", "float-size", "size 0 is FloorToInt(...)", evidence="torch.ops.v.a()", file="v/meta.py", line=12
)
NOTE = Finding("v::b", "permuted-strides", "result 0 keeps those of `x`", confidence="only the kernel can tell")
ERROR = Finding("v::a", "reads-data", "reads x", file="v/meta.py", line=14)


def _report(*findings: Finding) -> Report:
    return make_report("v", findings, {"v::b": "probed", "v::a": "probed"}, {"torch": "2.13.0"})


@pytest.mark.parametrize(
    ("findings", "fail_on", "status"),
    [
        ((), "note", 0),
        ((NOTE,), "error", 0),
        ((NOTE,), "warning", 0),
        ((NOTE,), "note", 1),
        ((NOTE, WARNING), "error", 0),
        ((NOTE, WARNING), "warning", 1),
        ((ERROR,), "error", 1),
        ((ERROR,), "never", 0),
    ],
)
def test_exit_status(
    findings: tuple[Finding, ...],
    fail_on: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "audit", lambda *_, **__: _report(*findings))
    assert main(["audit", "v", "--fail-on", fail_on]) == status
    assert capsys.readouterr().out == as_text(_report(*findings)) + "\n"


def test_errors_are_the_default_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "audit", lambda *_, **__: _report(WARNING))
    assert main(["audit", "v"]) == 0
    monkeypatch.setattr(command, "audit", lambda *_, **__: _report(ERROR))
    assert main(["audit", "v"]) == 1


def test_options_reach_the_audit_and_progress_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def audit(namespace: str, **options: object) -> Report:
        seen.update(options, namespace=namespace)
        for done in range(1, 8):
            options["progress"](done, 7, "v::a")  # type: ignore[operator]
        return _report()

    monkeypatch.setattr(command, "audit", audit)
    assert main(["audit", "v", "--import", "a", "--import", "b", "--operators", "x*", "--limit", "3"]) == 0
    del seen["progress"]
    assert seen == {"namespace": "v", "imports": ["a", "b"], "operators": "x*", "limit_s": 3.0}
    streams = capsys.readouterr()
    assert streams.err == "fxpatch audit v: 1/7 operators, now v::a\nfxpatch audit v: 7/7 operators\n"
    assert streams.out == as_text(_report()) + "\n"


def test_usage_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def audit(*_: object, **__: object) -> Report:
        raise UnknownNamespaceError("nobody", ["aten", "prims"])

    monkeypatch.setattr(command, "audit", audit)
    assert main(["audit", "nobody"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert (
        "fxpatch: there is no operator namespace 'nobody'\n  seen: the namespaces aten, prims\n"
        "  expected: one of them\n"
        "  to do: a vendor's operators exist once its package is imported: add --import PACKAGE (imports=['PACKAGE'])"
    ) in streams.err
    for arguments in (
        [],
        ["audit"],
        ["audit", "v", "--fail-on", "sometimes"],
        ["audit", "v", "--json", "--sarif"],
        ["audit", "v", "--limit", "0"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2, arguments


def test_a_file_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "audit", lambda *_, **__: _report())
    assert main(["audit", "v", "--json", str(tmp_path / "missing" / "report.json")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_json_to_stdout_and_sarif_to_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "audit", lambda *_, **__: _report(NOTE, WARNING, ERROR))
    file = tmp_path / "audit.sarif"
    assert main(["audit", "v", "--json", "--sarif", str(file)]) == 1
    assert json.loads(capsys.readouterr().out)["counts"] == {"float-size": 1, "permuted-strides": 1, "reads-data": 1}
    assert json.loads(file.read_text())["version"] == "2.1.0"


def test_json_has_all_there_is_in_a_stable_order() -> None:
    content = json.loads(as_json(_report(NOTE, WARNING, ERROR)))
    assert as_json(_report(NOTE, WARNING, ERROR)) == as_json(_report(ERROR, NOTE, WARNING, NOTE))
    assert list(content) == ["namespace", "versions", "counts", "states", "findings"]
    assert content["states"] == {"v::a": "probed", "v::b": "probed"}
    assert [(f["operator"], f["rule"], f["level"]) for f in content["findings"]] == [
        ("v::a", "float-size", "warning"),
        ("v::a", "reads-data", "error"),
        ("v::b", "permuted-strides", "note"),
    ]
    assert content["findings"][0]["evidence"] == "torch.ops.v.a()"


def test_sarif_is_as_the_standard_wants_it() -> None:
    log = json.loads(as_sarif(_report(NOTE, WARNING, ERROR), "1.2.3"))
    assert log["$schema"].endswith("/sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("fxpatch", "1.2.3")
    ids = [rule["id"] for rule in driver["rules"]]
    assert sorted(ids) == ["float-size", "permuted-strides", "reads-data"]
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"] == RULES[rule["id"]].title
        assert rule["defaultConfiguration"]["level"] in ("note", "warning", "error")
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("note", "warning", "error")
        assert result["message"]["text"]
    located, _, bare = run["results"]
    assert located["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "v/meta.py"},
        "region": {"startLine": 12},
    }
    assert located["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "v::a", "kind": "function"}]
    assert "physicalLocation" not in bare["locations"][0]


def test_text_names_rules_confidence_and_places() -> None:
    text = as_text(_report(NOTE, WARNING))
    assert text.startswith("v: 2 operators (torch 2.13.0): 2 probed\n")
    assert "warning float-size (1): a size computed in floating point" in text
    assert "  v::a: size 0 is FloorToInt(...)  [v/meta.py:12]\n      torch.ops.v.a()" in text
    assert "(only the kernel can tell)" in text
    assert text.endswith("2 findings: 0 errors, 1 warnings, 1 notes")


def test_the_command_imports_rich_only_where_it_prints() -> None:
    code = "import sys, fxpatch.__main__; print(sorted(m for m in sys.modules if m.split('.')[0] == 'rich'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_end_to_end_on_the_operators_of_torch_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxpatch", "audit", "aten", "--operators", "relu*", "--json", "--fail-on", "never"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "operators" in done.stderr
    content = json.loads(done.stdout)
    assert "aten::relu" in content["states"]
    assert not [finding for finding in content["findings"] if finding["level"] == "error"]
