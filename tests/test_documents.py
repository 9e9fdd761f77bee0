"""What the README and the examples show works as shown. README's code blocks run in `docs/test_code_blocks.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_files_to_read_first_are_there() -> None:
    section = README.split("## Read these six files first")[1]
    files = re.findall(r"^\d\. `(\S+)`", section, re.MULTILINE)
    assert len(files) == 6
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_tests_that_prove_what_the_seeds_claim_are_there() -> None:
    table = (ROOT / "docs" / "seeds.md").read_text()
    file, names = "", []
    for where, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", table):
        file = where or file
        names.append((file, name))
    assert len(names) > 40
    for file, name in names:
        source = (ROOT / "tests" / "layers" / file).read_text()
        assert f"def {name}(" in source or not name, f"{file}::{name}"


def test_every_patch_is_in_the_readme() -> None:
    from fxpatch.codegen import PATCH
    from fxpatch.repair import patches

    names = {patch.name for patch in (PATCH, *patches())} - {"settle-before-compile"}
    assert {name for name in names if f"`{name}`" not in README} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "today"),
    [((), "today:  NameError: name 'device' is not defined"), (("--no-shim",), "today:  compiles")],
)
def test_the_llama_demo(options: tuple[str, ...], today: str) -> None:
    """Broken today under a shim, fine without one; and equal to the CPU after install() in both cases."""
    done = subprocess.run(
        [sys.executable, "examples/llama_on_musa.py", "--layers", "1", "--tokens", "3", *options],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "150"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert today in done.stdout
    assert re.search(r"inductor\s.*equal", done.stdout)
    assert done.stdout.rstrip().endswith(
        "OK: logits and tokens on musa equal the CPU's with eager, aot_eager, inductor"
    )


def test_the_demo_refuses_what_it_cannot_do() -> None:
    done = subprocess.run(
        [sys.executable, "examples/llama_on_musa.py", "--tokens", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--tokens must be at least 3" in done.stderr
