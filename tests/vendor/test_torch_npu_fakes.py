"""The library's fake kernels in a process with the real torch_npu: its schemas, its own fakes, and tracing before,
during and after `install()`. `measure_npu_fakes.py` measures everything in one process; the tests read the result."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compile_configs import load_profile
from fake_kernels.honest import declared_aliases
from fake_kernels.kernel import parse
from fake_kernels.library import load

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import npu_facts  # noqa: E402

RECORDS = {record.op: record for record in load() if record.library == "torch_npu"}
KNOWN = npu_facts.facts()["operators"]
SHADOWED = [op for op, known in KNOWN.items() if known["outcome"] == "Shadowed"]
WITHOUT = [op for op, known in KNOWN.items() if known["has"] == "nothing" and op not in SHADOWED]
WRONG = [op for wrong in load_profile("npu").wrong_fakes for op in wrong.operators]

Measured = dict[str, Any]


@pytest.fixture(scope="session")
def measurement(npu_python: Callable[..., str]) -> tuple[Measured, Measured]:
    return npu_facts.read(npu_python(str(HERE / "measure_npu_fakes.py"), str(npu_facts.CALLS), timeout=900))


@pytest.fixture
def measured(measurement: tuple[Measured, Measured]) -> Measured:
    return measurement[0]


# -- what is on record -----------------------------------------------------------------------------------------------


def test_every_disagreement_has_a_verdict_and_its_source() -> None:
    for entry in npu_facts.disagreements():
        assert entry.right in ("ours", "theirs", "open"), entry
        assert len(entry.why.split()) >= 4, entry
        assert "/" in entry.source, entry
        assert set(entry.operators) <= set(RECORDS), entry


def test_no_disagreement_is_listed_twice() -> None:
    pairs = [(op, what) for entry in npu_facts.disagreements() for op in entry.operators for what in entry.what]
    assert len(set(pairs)) == len(pairs)


def test_the_profile_replaces_exactly_the_fakes_that_are_wrong() -> None:
    """What gets a shadow has a schema that is wrong, and its fake does not matter."""
    wrong = {op for op in RECORDS if npu_facts.listed(op, "ours") and op not in SHADOWED}
    assert set(WRONG) == wrong
    assert len(set(WRONG)) == len(WRONG)


def test_what_hides_something_gets_a_shadow() -> None:
    """And what says that it returns what it writes, where it has no derivative."""
    hidden = {op for op, record in RECORDS.items() if record.hidden}
    returning = {op for op, record in RECORDS.items() if declared_aliases(parse(record.schema))[1]}
    skipped = {op for op, known in KNOWN.items() if known["outcome"] == "Skipped"}
    assert set(SHADOWED) | skipped == hidden | returning
    assert skipped == {"npu::npu_silu_"}  # its derivative would be gone


# -- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_on_record_is_what_is_measured(measurement: tuple[Measured, Measured]) -> None:
    """If this alone fails, `make fakes` writes the record again; look at what has changed, and why."""
    measured, run = measurement
    assert run["version"] == npu_facts.facts()["version"]
    assert {op: npu_facts.short(one) for op, one in measured.items()} == KNOWN


@pytest.mark.slow
@pytest.mark.parametrize("op", RECORDS)
def test_it_has_the_vendors_schema(op: str, measured: Measured) -> None:
    assert measured[op]["same_schema"], measured[op]["schema"]


@pytest.mark.slow
@pytest.mark.parametrize("op", RECORDS)
def test_where_both_have_a_fake_they_agree_or_it_is_written_down_who_is_right(op: str, measured: Measured) -> None:
    assert set(measured[op]["differs"]) == npu_facts.listed(op), measured[op]["differs"]


@pytest.mark.slow
@pytest.mark.parametrize("op", WITHOUT)
def test_without_a_fake_it_traces_only_while_installed(op: str, measured: Measured) -> None:
    one = measured[op]
    name = op.replace("::", ".")
    assert one["traced"].startswith(f"UnsupportedOperatorException: {name}")
    assert one["outcome"] == "Registered"
    assert one["traced_installed"][0].startswith(name)
    assert one["traced_after"] == one["traced"]


@pytest.mark.slow
@pytest.mark.parametrize("op", WITHOUT)
def test_without_a_fake_it_compiles_only_while_installed(op: str, measured: Measured) -> None:
    """In one graph, by Dynamo and AOTAutograd."""
    before, installed = measured[op]["compiled"], measured[op]["compiled_installed"]
    if before == "not tried":
        assert "!" in RECORDS[op].schema  # AOTAutograd copies what was written, and `copy_` wants a device
        return
    assert before.startswith("Unsupported: Operator does not support running with fake tensors")
    assert installed == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("op", SHADOWED)
def test_what_needs_a_shadow_has_it_only_while_installed(op: str, measured: Measured) -> None:
    """torch_npu registers autograd kernels in C++ for some, which the shadow takes the place of: they come back."""
    one = measured[op]
    name = op.replace("::", ".")
    assert one["outcome"] == "Shadowed"
    assert one["traced_installed"][0].startswith("shadow." + re.sub(r"\W+", "__", op))
    assert not any(target.startswith(name) for target in one["traced_installed"])
    assert one["traced_after"] == one["traced"]
    assert "shadow." not in str(one["traced"])
    assert one["same_dispatch"]


@pytest.mark.slow
@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_fake_is_ours_only_while_installed(op: str, measured: Measured) -> None:
    one = measured[op]
    assert one["differs"]
    assert (one["outcome"], one["replaced"], one["differs_installed"]) == ("Registered", True, {})
    assert one["differs_after"] == one["differs"]


@pytest.mark.slow
def test_a_fake_that_is_not_wrong_is_left_alone(measured: Measured) -> None:
    own = {op for op, one in measured.items() if one["has"] in ("Meta", "register_fake", "CompositeExplicitAutograd")}
    left = {op for op, one in measured.items() if one["outcome"] == "AlreadyHad"}
    assert left == own - set(WRONG) - set(SHADOWED)
    assert all(measured[op]["differs_installed"] == measured[op]["differs"] for op in left)


@pytest.mark.slow
def test_uninstall_leaves_every_operator_as_found(measurement: tuple[Measured, Measured]) -> None:
    """Each kernel at each dispatch key, with the place it was registered at, and what traces it."""
    measured, run = measurement
    assert run["left"] == []
    assert [op for op, one in measured.items() if not one["same_dispatch"] or one["has_after"] != one["has"]] == []
    assert [op for op, one in measured.items() if one["differs_after"] != one["differs"]] == []
