"""What is counted as a mutant, what as killed, and that the lists that are checked in fit the sources."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mutation.mutants import HERE, ROOT, equivalents, mutants


def test_the_modules_and_their_tests_exist() -> None:
    config = tomllib.loads((HERE / "modules.toml").read_text())
    assert 0.85 <= config["least"] < 1
    for entry in config["module"]:
        assert (ROOT / entry["path"]).is_file()
        assert entry["tests"]
        assert all((ROOT / test.partition("::")[0]).is_file() for test in entry["tests"])


def test_the_mutants_that_are_excluded_are_changes_of_lines_that_are_there() -> None:
    modules = {entry["path"] for entry in tomllib.loads((HERE / "modules.toml").read_text())["module"]}
    for entry in equivalents():
        assert entry.module in modules
        assert len(entry.reason) > 20
        source = (ROOT / entry.module).read_text()
        lines = [line for line in source.splitlines() if line.strip() == entry.before]
        assert lines, f"{entry.module} no longer has the line {entry.before!r}: take it off equivalent.toml"
        changed = source.replace(lines[0], lines[0].replace(entry.before, entry.after), 1)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    listed = [(entry.module, entry.before, entry.after) for entry in equivalents()]
    assert len(set(listed)) == len(listed)


def test_annotations_and_what_is_no_python_are_not_counted() -> None:
    pytest.importorskip("cosmic_ray")
    source = "def f(a: int | None, b: int = 1) -> int | None:\n    c: int | None = b\n    return a\n"
    assert [(m.line, m.before, m.after) for m in mutants(source)] == [
        (1, "def f(a: int | None, b: int = 1) -> int | None:", f"def f(a: int | None, b: int = {n}) -> int | None:")
        for n in (2, 0)
    ]
    found = [m.source for m in mutants("def f(a, b):\n    return a < b\n")]
    assert "def f(a, b):\n    return a >= b\n" in found
    assert found == [m.source for m in mutants("def f(a, b):\n    return a < b\n")]


def test_how_trials_end(fresh: Callable[..., str], tmp_path: Path) -> None:
    """In a process of its own, which does not import what it tries."""
    (tmp_path / "test_planted.py").write_text(
        "from hypothesis import given, strategies as st\nfrom planted import double\n\n\n"
        "@given(st.integers(0, 1000))\ndef test_double(n):\n    assert double(n) == 2 * n\n"
    )
    sources = {
        "passed": "def double(n): return n + n",
        "failed": "def double(n): return n + n if n < 500 else n",
        "failed at its import": "double = 1 / 0",
        "took too long": "def double(n):\n    while True: pass",
        "took too much memory": "def double(n):\n    return bytearray(6 << 30)",
    }
    out = fresh(f"""
        from mutation.trial import run
        for how, source in {sources!r}.items():
            trial = run("planted", source, [{str(tmp_path / "test_planted.py")!r}], seconds=2)
            print(how, trial.how, trial.passed, sep=": ")
        print(run("planted", "", [{str(tmp_path / "none.py")!r}], seconds=2).how)
        try:
            run("os", "", [], seconds=2)
        except RuntimeError as error:
            print(error)
    """)
    assert out.splitlines() == [
        "passed: passed: True",
        "failed: failed: False",
        "failed at its import: failed: False",
        "took too long: took too long: False",
        "took too much memory: failed: False",
        "failed",
        "os is imported already: a mutant would not be the one that is tested",
    ]
