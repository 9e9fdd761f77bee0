"""docs/fake_kernels.md says what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import coverage_table

from fake_kernels import FakeKernel
from fake_kernels.library import load


def test_the_document_is_what_make_fakes_writes() -> None:
    """If not: `make fakes`, and look at what has changed."""
    assert coverage_table.DOCUMENT.read_text() == coverage_table.written()


def test_every_operator_is_in_the_table_once() -> None:
    lines = coverage_table.tables().splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert sorted(named) == sorted(record.op for record in load())


@pytest.mark.parametrize("record", load(), ids=lambda record: record.op)
def test_the_registry_takes_all_of_them(record: FakeKernel) -> None:
    before, after = coverage_table.row(record)[2:4]
    assert (after in ("shadowed", "skipped")) == before.startswith(("hidden: ", "returns what it writes: "))
    assert not record.hidden or after == "shadowed"
    assert (after == "left alone") == (before == "own fake agrees")
    assert (after == "replaced") == before.startswith("own fake wrong: ")
