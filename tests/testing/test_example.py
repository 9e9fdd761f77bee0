"""The vendor's repository in examples/ works, as its README says it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ci_without_hardware"


@pytest.mark.slow
def test_its_tests_pass_on_the_simulated_device() -> None:
    """In an environment with that package on the path and fxpatch installed: as `pip install -e .[test]` makes it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA"],
        cwd=EXAMPLE,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE), "HYPOTHESIS_STORAGE_DIRECTORY": os.devnull},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    passed = set(re.findall(r"^PASSED tests/(\S+?)(?:\[|$| )", done.stdout, re.MULTILINE))
    for name in (
        "test_swiglu.py::test_the_module_compiled",
        "test_swiglu.py::test_a_decode_step_replays",
        "test_conformance.py::TestCodegen::test_random_graphs",
        "test_conformance.py::TestGraphs::test_refused_in_a_capture",
        "test_conformance.py::TestOperators::test_opcheck",
    ):
        assert name in passed


def test_its_readme_names_what_is_there() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    named = re.findall(r"^\| `(\S+)` \|", readme, re.MULTILINE)
    assert len(named) == 6
    assert [name for name in named if not (EXAMPLE / name).exists()] == []


def test_its_workflow_runs_the_commands_of_the_readme() -> None:
    """Both kinds of run, and what is installed for them exists here."""
    workflow = (EXAMPLE / ".github" / "workflows" / "test.yml").read_text()
    readme = (EXAMPLE / "README.md").read_text()
    for command in ("pip install -e '.[test]'", "pytest", "pytest --real-device=acme"):
        assert f"- run: {command}\n" in workflow
        assert f"    {command}\n" in readme
    wanted = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert wanted == ["fxpatch[testing]"]
    ours = tomllib.loads((EXAMPLE.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert ours["testing"] == ["pytest", "hypothesis"]
