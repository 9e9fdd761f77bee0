"""`examples/wan_vae.py`: right on one and two processes, and an exit status of 1 where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--frames", "2", "--height", "4", "--width", "8", "--channels", "4"]
ENVIRONMENT = {**os.environ, "FXPATCH_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

pytestmark = pytest.mark.slow


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout + done.stderr


def rows(out: str) -> list[list[str]]:
    """The cells of the table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(
    ("options", "size"),
    [(["--device", "simulated"], (32, 16)), (["--device", "cpu", "--kind", "2.2"], (64, 32))],
)
def test_two_processes(options: list[str], size: tuple[int, int], tmp_path: Path) -> None:
    status, out = run("examples/wan_vae.py", "--out", str(tmp_path), *options, *TINY)
    assert status == 0, out
    names = [row[0] for row in rows(out)]
    assert names == ["plain diffusers, CPU", "1 process", "2 processes"]
    assert [row[3:] for row in rows(out)] == [["-", "right"], ["-", "right"], ["the same", "right"]]
    assert "OK: 3 frames in" in out
    assert "100%" in out  # the progress bar
    frames = sorted(each.name for each in tmp_path.iterdir())
    assert frames == [f"{name}_{i:03}.png" for name in ("frame", "plain") for i in range(3)]
    for i in range(3):
        frame, plain = (Image.open(tmp_path / f"{name}_{i:03}.png") for name in ("frame", "plain"))
        assert frame.size == plain.size == size
        assert frame.tobytes() == plain.tobytes()
        assert len(set(frame.tobytes())) > 20  # a picture, not one colour


def test_one_process(tmp_path: Path) -> None:
    status, out = run("examples/wan_vae.py", "--out", str(tmp_path), "--device", "cpu", "--processes", "1", *TINY)
    assert status == 0, out
    assert [row[0] for row in rows(out)] == ["plain diffusers, CPU", "1 process"]
    assert len(list(tmp_path.iterdir())) == 6


def test_it_notices_rows_that_do_not_come(tmp_path: Path) -> None:
    """Zeros instead of the neighbours' rows: the seam is wrong, and the example says so."""
    script = tmp_path / "no_halo.py"
    script.write_text(
        "import runpy, sys\n"
        "import fxpatch.layers.height_parallel_convs as convs\n"
        "convs.exchange_halo = lambda *_, **__: (None, None)\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        f"sys.argv[0] = {str(ROOT / 'examples/wan_vae.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    status, out = run(*torchrun, "--out", str(tmp_path / "frames"), "--device", "cpu", *TINY)
    assert status == 1, out
    assert [row[4] for row in rows(out)] == ["right", "right", "WRONG"]
    assert "WRONG: 3 frames" in out
