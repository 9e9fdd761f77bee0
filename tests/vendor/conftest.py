"""Processes with the real torch_npu, for the tests that are skipped without it (npu_python.py says how to get it)."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from npu_python import ROOT, environment, interpreter

Npu = Callable[..., Any]


@pytest.fixture(scope="session")
def npu_python() -> Callable[..., str]:
    """`npu_python(*arguments, **env)`: runs that interpreter in `tests`; returns its stdout."""
    python = interpreter()
    if python is None:
        pytest.skip("no Python with torch_npu: neither .venv-npu (make npu) nor FXPATCH_NPU_PYTHON")

    def run(*arguments: str, timeout: float = 300, **env: str) -> str:
        done = subprocess.run(
            [str(python), *arguments],
            cwd=ROOT / "tests",
            env={**environment(python), **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-10000:]}"
        return done.stdout

    return run


@pytest.fixture
def npu(npu_python: Callable[..., str]) -> Npu:
    """`npu(code, **env)`: runs Python source with that interpreter; returns `result`, which the source sets to JSON."""

    def run(code: str, **env: str) -> Any:
        source = f"{textwrap.dedent(code)}\nimport json\nprint('RESULT', json.dumps(result))"
        return json.loads(npu_python("-c", source, **env).split("RESULT ", 1)[1].splitlines()[0])

    return run
