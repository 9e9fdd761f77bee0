"""Each probe is content with a healthy simulated device, and finds the fault that is planted for it.

The device is simulated in children of a process that is forked (probe_zygote.py), so this process's own has no say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from planted_faults import FAULTS, HERE, Fault

from fxpatch.doctor.probe import STAGES, Probe
from fxpatch.doctor.probes import PROBES

FOLDER = Path(__file__).resolve().parent
Ask = Callable[..., tuple[str, str]]

REPAIRED = {"fx-placeholder-device", "flex-attention", "aot-checkpoint", "cache-key"}
"""What is wrong on every device that torch does not know, and right with `fxpatch.install()`."""
NOT_ASKED = {
    "reduce-overhead": "captures nothing on musa",
    "rng-generator": "a simulated device has none",
}
"""What no out-of-tree device has, or no simulated one, and why the probe says so."""
SLOW = {"inductor-kernels", "reduce-overhead"}


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    """`ask(probe, fault=None, install=False, plain=False, **subject)` -> state and text."""
    started: dict[bool, subprocess.Popen[str]] = {}

    def process(plain: bool) -> subprocess.Popen[str]:
        if plain not in started:
            started[plain] = subprocess.Popen(
                [sys.executable, "probe_zygote.py", *(["plain"] if plain else [])],
                cwd=FOLDER,
                env={**os.environ, "FXPATCH_AUTOLOAD": "0", "PYTHONPATH": str(FOLDER)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return started[plain]

    def asked(probe: str, fault: Fault | None = None, *, install: bool = False, **subject: Any) -> tuple[str, str]:
        about = {**HERE, **(fault.subject if fault else {}), **subject}
        number = None if fault is None else FAULTS.index(fault)
        request = {"probe": probe, "subject": about, "fault": number, "install": install}
        zygote = process(fault is not None and (fault.plain or bool(fault.without)))
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        state, text = json.loads(zygote.stdout.readline())
        return state, text

    yield asked
    for each in started.values():
        assert each.stdin is not None
        each.stdin.close()
        assert each.wait(timeout=30) == 0
        assert each.stdout is not None
        each.stdout.close()


def _marked(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("name", [_marked(probe.name) for probe in PROBES])
def test_a_healthy_device_is_healthy(ask: Ask, name: str) -> None:
    model = {"model": "patient_models:healthy"} if name.startswith("model-") else {}
    state, text = ask(name, **model)
    if name in NOT_ASKED:
        assert (state, NOT_ASKED[name] in text) == ("not applicable", True), text
    elif name in REPAIRED:
        assert state == "broken", text
        assert ask(name, install=True)[0] == "ok"
    else:
        assert state == "ok", text


@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=str(f), marks=[pytest.mark.slow] if f.slow else []) for f in FAULTS]
)
def test_a_fault_is_found(ask: Ask, fault: Fault) -> None:
    state, text = ask(fault.probe, fault, install=fault.after_install)
    assert state == "broken", text
    assert fault.says in text
    if fault.repaired:
        state, text = ask(fault.probe, fault, install=True)
        assert state == "ok", text


def test_every_probe_has_a_fault_that_it_finds() -> None:
    """A probe without one is not proven: it may be content with everything."""
    assert {fault.probe for fault in FAULTS} == {probe.name for probe in PROBES}


def test_what_fxpatch_repairs_is_asked_again() -> None:
    again = {probe.name for probe in PROBES if probe.installs}
    assert {fault.probe for fault in FAULTS if fault.repaired} <= again


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_a_probe_says_what_it_is_for(probe: Probe) -> None:
    assert probe.stage in STAGES
    assert len(probe.title) <= 32
    assert len(probe.why) > 40
    assert len(probe.todo) > 10
    assert probe.name == probe.name.lower().replace(" ", "-")


def test_probes_are_in_the_order_of_the_stages() -> None:
    assert [probe.stage for probe in PROBES] == sorted((probe.stage for probe in PROBES), key=STAGES.index)
    assert {probe.stage for probe in PROBES} == set(STAGES)


@pytest.mark.parametrize("name", [p.name for p in PROBES if p.stage in ("device", "numerics", "runtime", "graphs")])
def test_what_makes_no_sense_on_the_cpu_says_why(ask: Ask, name: str) -> None:
    state, text = ask(name, device="cpu", simulated=False)
    assert state == ("ok" if name.startswith("autocast") else "not applicable"), text
    assert name.startswith("autocast") or "CPU" in text or "torch.cpu" in text


@pytest.mark.parametrize("name", ["tensors", "casts", "graph-capture", "fork", "saving", "model-fakes", "autocast"])
def test_without_a_device_nothing_is_computed(ask: Ask, name: str) -> None:
    gone = next(fault for fault in FAULTS if fault.says == "is_available() is False")
    state, text = ask(name, gone, model="patient_models:healthy")
    assert (state, "torch.musa.is_available() is False" in text) == ("not applicable", True), text
