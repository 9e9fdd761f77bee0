"""docs/doctor.md says what there is."""

from __future__ import annotations

import argparse
import re

import probe_list

from fxpatch.__main__ import parser as command_line
from fxpatch.doctor.probe import STAGES
from fxpatch.doctor.probes import PROBES


def test_the_list_of_probes_is_todays() -> None:
    """If not: `python tests/doctor/probe_list.py`."""
    assert probe_list.DOCUMENT.read_text(encoding="utf-8") == probe_list.written()


def test_every_probe_fits_the_table_and_has_a_stage() -> None:
    assert {probe.stage for probe in PROBES} == set(STAGES)
    assert [probe.title for probe in PROBES if len(probe.title) > 36] == []
    assert [probe.name for probe in PROBES if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", probe.name)] == []
    assert [probe.name for probe in PROBES if not (probe.why and probe.todo)] == []


def test_every_option_is_documented() -> None:
    (commands,) = (each for each in command_line()._actions if isinstance(each, argparse._SubParsersAction))
    options = {each.option_strings[-1] for each in commands.choices["doctor"]._actions} - {"--help"}
    section = probe_list.DOCUMENT.read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE)) == options
