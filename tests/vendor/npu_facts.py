"""What is on record about torch_npu and its own fake kernels, and how a measurement is held against it.

`torch_npu_fakes.json` has what `measure_npu_fakes.py` found, short; `torch_npu_disagreements.toml` says of each place
where our fake kernel and torch_npu's differ who is right, and by which source. Both are checked by the tests here.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FACTS = HERE / "torch_npu_fakes.json"
DISAGREEMENTS = HERE / "torch_npu_disagreements.toml"
CALLS = 40


@dataclass(frozen=True)
class Disagreement:
    """One entry: `right` is `ours`, `theirs`, or `open` where neither source says."""

    operators: tuple[str, ...]
    what: tuple[str, ...]
    right: str
    why: str
    source: str


def disagreements() -> tuple[Disagreement, ...]:
    entries = tomllib.loads(DISAGREEMENTS.read_text())["disagreement"]
    return tuple(
        Disagreement(tuple(e["operators"]), tuple(e["what"]), e["right"], e["why"], e["source"]) for e in entries
    )


def listed(operator: str, right: str = "") -> set[str]:
    """What is listed for an operator; with `right`, only where that one is right."""
    return {
        what
        for entry in disagreements()
        if operator in entry.operators and right in ("", entry.right)
        for what in entry.what
    }


def facts() -> dict[str, Any]:
    """`{"version": "2.13.0", "operators": {operator: short(...)}}`."""
    found: dict[str, Any] = json.loads(FACTS.read_text())
    return found


def short(measured: dict[str, Any]) -> dict[str, Any]:
    """The part of an operator's measurement that is kept."""
    return {key: measured[key] for key in ("has", "outcome", "replaced")} | {"differs": sorted(measured["differs"])}


def read(printed: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `measure_npu_fakes.py` prints: by operator, and of the whole run."""
    found: dict[str, Any] = {}
    for line in printed.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, found.pop("")


def write(printed: str) -> None:
    """Keeps a measurement."""
    operators, run = read(printed)
    kept = {"version": run["version"], "operators": {op: short(operators[op]) for op in sorted(operators)}}
    FACTS.write_text(json.dumps(kept, indent=1) + "\n")
