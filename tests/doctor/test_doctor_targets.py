"""The doctor on real targets: a simulated device under a vendor's shim, and the real torch_npu on stub libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fxpatch.doctor.probe import Subject
from fxpatch.doctor.run import examine

VENDOR = Path(__file__).resolve().parents[1] / "vendor"
sys.path.insert(0, str(VENDOR))
from npu_python import environment, interpreter  # noqa: E402


@pytest.mark.slow
def test_what_a_shim_breaks_is_found_and_told_as_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpatch.doctor.run.JOBS", 1)
    report = examine(Subject("musa", simulated=True, imports=("doctor_shim",)), only="fx-literals")
    (line,) = report.lines
    assert line.state == "repaired by fxpatch"
    assert "NameError" in line.error
    assert "codegen" in line.applied
    assert report.versions["doctor_shim"] == "unknown"


def _npu(*arguments: str, stubs: bool = True) -> subprocess.CompletedProcess[str]:
    python = interpreter()
    if python is None:
        pytest.skip("no Python with torch_npu: neither .venv-npu (make npu) nor FXPATCH_NPU_PYTHON")
    variables = environment(python)
    if not stubs:
        del variables["LD_LIBRARY_PATH"]
    command = [str(python), "-m", "fxpatch", "doctor", "--device", "npu", "--import", "torch_npu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)


@pytest.mark.slow
def test_the_real_torch_npu_without_hardware() -> None:
    done = _npu("--only", "[rd]e[gv]i*", "--json")
    report = json.loads(done.stdout)
    lines = {line["name"]: line for line in report["lines"]}
    assert done.returncode == 1, done.stderr
    assert set(lines) >= {"registration", "device-module"}
    assert lines["registration"]["error"].startswith("torch.npu.is_available() is False")
    assert lines["device-module"]["state"] == "ok"
    assert report["versions"]["torch_npu"]


@pytest.mark.slow
def test_the_real_torch_npu_without_its_libraries_is_a_request_that_cannot_be_met() -> None:
    done = _npu(stubs=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "fxpatch: 'torch_npu' cannot be imported." in done.stderr
    assert "cannot open shared object file" in done.stderr
