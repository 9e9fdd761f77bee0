"""Writes the list of probes in docs/doctor.md: `python tests/doctor/probe_list.py`."""

from __future__ import annotations

from pathlib import Path

from fxpatch.doctor.probe import STAGES
from fxpatch.doctor.probes import PROBES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "doctor.md"
MARKER = "<!-- Below this line `python tests/doctor/probe_list.py` writes. -->\n"


def written() -> str:
    """The document, with the list of today."""
    return DOCUMENT.read_text(encoding="utf-8").split(MARKER)[0] + MARKER + tables()


def tables() -> str:
    """A table for each stage."""
    parts = []
    for stage in STAGES:
        parts.append(f"\n### {stage}\n\n| probe | what it asks | what goes wrong otherwise |\n|---|---|---|\n")
        for probe in PROBES:
            if probe.stage == stage:
                why = " ".join(probe.why.split()).replace("|", "\\|")
                parts.append(f"| `{probe.name}` | {probe.title} | {why} |\n")
    return "".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(written(), encoding="utf-8")
