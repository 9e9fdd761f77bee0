"""Serving engines' plug-in loaders bring fxpatch into their processes, once, and no worker dies of it.

Everything holds for the published contract of each loader (`published_loaders`); and for the loaders of the engines
themselves where `FXPATCH_ENGINES_PYTHON` names a Python that has vLLM, SGLang and torch.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
ENGINES_PYTHON = os.environ.get("FXPATCH_ENGINES_PYTHON")
ENTRY_POINTS = {
    "torch.backends": "fxpatch.autoload:autoload",
    "vllm.general_plugins": "fxpatch.engines.workers:install_in_worker",
    "sglang.srt.plugins": "fxpatch.engines.workers:install_in_worker",
    "sglang.multimodal_gen.plugins": "fxpatch.engines.workers:install_in_worker",
}
VENDOR = """
import os, torch, fxpatch
fxpatch.simulate("musa")
inside = torch._fxpatch_test_engine() if os.environ.get("TORCH_MUSA_CALLS") else None
"""
WORD = {"vllm": "vllm", "sglang": "sglang", "diffusion": "sglang"}


def workplace(folder: Path) -> dict[str, str]:
    """A folder with fxpatch's metadata and a vendor's package, and the environment in which they are found. Metadata of
    an installed fxpatch is shadowed: a distribution's name counts once."""
    info = folder / "fxpatch-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxpatch\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\nfxpatch = {target}\n\n" for group, target in ENTRY_POINTS.items())
    )
    (folder / "torch_musa.py").write_text(VENDOR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "SGLANG_"))}
    path = os.pathsep.join(map(str, (folder, ROOT, HERE)))
    return {**kept, "PYTHONPATH": path, "FXPATCH_AUTOLOAD": "1", "PYTHONWARNINGS": "default"}


def run(python: str, *arguments: str, folder: Path, timeout: float = 240, **env: str) -> str:
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**workplace(folder), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@functools.cache
def played(kind: str, engine: str) -> dict[str, dict[str, Any]]:
    """All scenarios of one engine, played in one process and its children."""
    python = sys.executable if kind == "published" else ENGINES_PYTHON
    if python is None:
        pytest.skip(f"FXPATCH_ENGINES_PYTHON names no Python that has {WORD[engine]}")
    with tempfile.TemporaryDirectory() as folder:
        told = run(
            *(python, str(HERE / "engine_process.py"), kind, engine),
            folder=Path(folder) / "work",
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",  # what is installed, the plug-in has installed
        )
    answers = [json.loads(line.removeprefix("SCENARIO ")) for line in told.splitlines() if line.startswith("SCENARIO ")]
    assert len(answers) == 14
    return {answer["scenario"]: answer for answer in answers}


@pytest.fixture(
    params=[
        "published-vllm",
        pytest.param("published-sglang", marks=pytest.mark.slow),
        *(pytest.param(f"real-{each}", marks=pytest.mark.slow) for each in WORD),
    ],
)
def worker(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return played(*request.param.split("-"))


def test_no_worker_dies_of_it(worker: dict[str, dict[str, Any]]) -> None:
    assert {name: answer["died"] for name, answer in worker.items() if answer.get("died")} == {}


def test_a_process_with_a_device(worker: dict[str, dict[str, Any]]) -> None:
    """However often the engine loads its plug-ins, it is one installation, and only the first time does anything."""
    there = worker["device_there"]
    assert (there["installed"], there["automatic"], there["installs"]) == ("musa", True, 1)
    assert there["unchanged"]
    assert there["applied"]
    assert there["log"] == ""


def test_a_process_without_a_device(worker: dict[str, dict[str, Any]]) -> None:
    """As on a CUDA machine: not even what installs is imported, and nothing is said."""
    nothing = worker["no_device"]
    assert (nothing["installed"], nothing["installer imported"], nothing["log"]) == (None, False, "")


def test_a_vendor_that_comes_later(worker: dict[str, dict[str, Any]]) -> None:
    later = worker["vendor_comes_later"]
    assert (later["before"], later["installed"], later["installs"], later["log"]) == (None, "musa", 1, "")


def test_an_engine_that_the_vendor_imports(worker: dict[str, dict[str, Any]]) -> None:
    """Nothing is patched before the vendor's import has ended."""
    within = worker["loaded_within_the_vendors_import"]
    assert (within["inside"], within["installed"]) == (None, "musa")


def test_a_refusal_is_told(worker: dict[str, dict[str, Any]]) -> None:
    unknown, half = worker["device_without_a_profile"], worker["device_without_a_module"]
    assert unknown["installed"] is half["installed"] is None
    assert "fxpatch leaves zzz alone: No compile profile matches device 'zzz'." in unknown["log"]
    assert "fxpatch leaves musa alone: torch.musa is not there yet; call fxpatch.install() when it is" in half["log"]


def test_what_goes_wrong_is_told(worker: dict[str, dict[str, Any]]) -> None:
    failed, strict = worker["install_fails"], worker["warnings_are_errors"]
    assert failed["installed"] is strict["installed"] is None
    for log, why in ((failed["log"], "RuntimeError: sabotage"), (strict["log"], "a patch was refused")):
        assert "fxpatch could not install itself; torch works as it does without it" in log
        assert why in log


def test_it_is_turned_off(worker: dict[str, dict[str, Any]]) -> None:
    """By our variable, and by the engine's own."""
    assert worker["turned_off"]["installed"] is None
    assert worker["not_allowed"]["installed"] is None


def test_it_gives_way_to_what_somebody_asks_for(worker: dict[str, dict[str, Any]]) -> None:
    before, later = worker["asked_for_before"], worker["asked_for_later"]
    assert (before["same"], before["installs"], before["automatic"], before["after"]) == (True, 1, False, None)
    assert (later["installed"], later["automatic"]) == ("musa", False)


def test_workers_that_fork_and_workers_that_start_anew(worker: dict[str, dict[str, Any]]) -> None:
    forked, spawned = worker["forked_afterwards"], worker["in_spawned_worker"]
    assert (forked["installed"], forked["installs"], forked["died"]) == ("musa", 1, None)
    assert (spawned["before"], spawned["installed"], spawned["exit"]) == (None, "musa", 0)


def test_the_entry_points_are_these() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert {group: found.get(group, {}).get("fxpatch") for group in ENTRY_POINTS} == ENTRY_POINTS


PAIR = """
import os, torch
if os.environ["RANK"] == "1":
    import torch._dynamo  # before there is a device
import torch_musa, torch._dynamo
from fxpatch.installer import current
with open(os.environ["FXPATCH_TOLD"] + os.environ["RANK"], "w") as told:
    told.write(f"{current().facts.device} {current().automatic}")
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """Processes that torchrun starts need no plug-in: torch's entry point is there, whether the vendor's package comes
    before Dynamo (rank 0) or after it."""
    script = tmp_path / "program.py"
    script.write_text(PAIR)
    arguments = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script))
    run(sys.executable, *arguments, folder=tmp_path / "work", FXPATCH_TOLD=str(tmp_path / "told"))
    assert [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)] == ["musa True"] * 2


RAY = """
import os
if __name__ == "__main__":
    import ray
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ["RAY_FOLDER"])

    @ray.remote
    def worker():
        import sys
        fresh = "torch" not in sys.modules
        import torch_musa, torch._dynamo
        from fxpatch.installer import current
        return fresh, os.getpid(), current().facts.device, current().automatic

    fresh, process, device, automatic = ray.get(worker.remote())
    print("RAY", fresh, process != os.getpid(), device, automatic)
    ray.shutdown()
"""


@pytest.mark.slow
def test_ray(tmp_path: Path) -> None:
    """A Ray worker needs no plug-in either."""
    if ENGINES_PYTHON is None:
        pytest.skip("FXPATCH_ENGINES_PYTHON names no Python that has ray")
    script = tmp_path / "program.py"
    script.write_text(RAY)
    with tempfile.TemporaryDirectory(prefix="fxp") as short:  # sockets have short names
        told = run(ENGINES_PYTHON, str(script), folder=tmp_path / "work", RAY_FOLDER=short, RAY_AUTH_MODE="disabled")
    assert "RAY True True musa True" in told
