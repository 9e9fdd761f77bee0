"""The example `examples/vlm_masks.py`: on both simulated devices, on the CPU, and that it notices what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--layers", "2", "--sequences", "4", "--repeats", "1")


def example(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/vlm_masks.py", *SMALL, *options],
        cwd=ROOT,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=250,
    )


def rows(text: str) -> dict[str, list[str]]:
    """Of the table: by way, the cells behind it."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {way: rest for way, *rest in cells}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "device", "mask"),
    [
        ((), "npu", "none"),
        (("--simulate", "musa"), "musa", r"bool \[4, \d+\]"),
    ],
    ids=["npu", "musa"],
)
def test_the_example(options: tuple[str, ...], device: str, mask: str) -> None:
    done = example(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Qwen2-VL's language model on {device}: 4 sequences" in done.stdout
    assert "OK: hidden states within 2e-04 of the CPU's, one by one" in done.stdout
    table = rows(done.stdout)
    assert len(table) == 8
    assert all(cells[-1] == "ok" for cells in table.values())
    wrong = table.pop("packed, not kept apart (wrong)")
    assert float(wrong[3]) > 0.01
    assert all(float(cells[3]) <= 2e-4 for cells in table.values())
    assert re.fullmatch(mask, table["padded, the device's mask"][0])
    assert re.fullmatch(r"bool \[4, 1, \d+, \d+\]", table["padded to 4, [B, 1, S, S]"][0])
    assert table["packed, positions"][0] == "none"
    tokens = {way: int(cells[1]) for way, cells in table.items()}
    assert tokens["one by one"] == tokens["packed, positions"] < tokens["padded, the device's mask"]
    assert tokens["packed, each to 4, positions"] % 4 == tokens["padded to 4, the device's mask"] % 16 == 0


@pytest.mark.slow
def test_it_notices_tokens_at_the_wrong_place(fresh: Callable[..., str]) -> None:
    """On the CPU: right, then with rows of the output exchanged; then options that make no sense."""
    right, wrong, refused = fresh(
        """
        import sys
        sys.path.insert(0, "../examples")
        import vlm_masks as example
        options = ["--layers", "1", "--sequences", "3", "--repeats", "1", "--device", "cpu"]
        print("status", example.main(options), "\\f")
        postprocess = example.postprocess
        example.postprocess = lambda output, batch: postprocess(output.roll(1, 1), batch)
        print("status", example.main(options), "\\f")
        try:
            example.main(["--sequences", "1"])
        except SystemExit as error:
            print("status", error.code)
        """,
        COLUMNS="120",
    ).split("\f")
    assert "Qwen2-VL's language model on cpu: 3 sequences" in right
    assert right.rstrip().endswith("status 0")
    assert wrong.rstrip().endswith("status 1")
    assert "WRONG: hidden states" in wrong
    assert sum(cells[-1] == "NOT AS EXPECTED" for cells in rows(wrong).values()) == 6  # all but two
    assert refused.strip() == "status 2"
