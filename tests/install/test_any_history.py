"""Uninstall leaves torch exactly as found, and what is installed works, in every order of events.

Hypothesis plays histories of install, uninstall, shims loaded early or late, Dynamo imported early or late, FX codegen
and compilation; each in a process of its own (tests/install/zygote.py). "Exactly" is judged by a snapshot of every
attribute of every torch module and class, taken just before each `install()`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

HERE = Path(__file__).parent


class Zygote:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "FXPATCH_AUTOLOAD": "0", "PYTHONWARNINGS": "ignore"},
        )

    def send(self, *request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process died"
        return json.loads(line)

    def ask(self, *request: Any) -> Any:
        self.send(*request)
        return self.receive()


_zygote: list[Zygote] = []
by_torch: set[str] = set()


OURS = {
    "torch.fx.graph.CodeGen._gen_python_code",
    "torch.fx.graph._custom_builtins",
    "torch._library.infer_schema.SUPPORTED_PARAM_TYPES",
    "torch.nn.attention.flex_attention._validate_device",
    "torch._dynamo.utils.common_constant_types",
    "autocast",
    "config",
    "fold",
    "run_and_save_rng_state",
    "shim",
}


def changes(*events: tuple[str, ...]) -> set[str]:
    """The places in torch that differ from the event `snapshot` on, in a process of its own."""
    assert _zygote[0].ask("fork") == {"ok": "forked"}
    for event in events:
        reply = _zygote[0].ask(*event)
        assert "ok" in reply, (event, reply)
    changed = set(_zygote[0].ask("changed")["ok"])
    assert _zygote[0].ask("end") == {"ended": 0}
    return changed


@pytest.fixture(scope="module", autouse=True)
def _one_zygote() -> Any:
    _zygote.append(Zygote())
    # What torch changes by itself when Dynamo is imported and used: measured without fxpatch.
    late, early = (("snapshot",), ("dynamo",), ("inductor",)), (("dynamo",), ("inductor",), ("snapshot",))
    by_torch.update(*(changes(*imports, ("compile",), ("compile",)) for imports in (late, early)))
    yield
    with _zygote.pop().process as process:
        process.terminate()


class History(RuleBasedStateMachine):
    """The model: whether fxpatch is installed, and whether anything has replaced `torch.device`."""

    @initialize()
    def begin(self) -> None:
        self.zygote = _zygote[0]
        assert self.zygote.ask("fork") == {"ok": "forked"}
        self.installed = False
        self.shimmed_since_install = False

    def ok(self, *request: Any) -> Any:
        reply = self.zygote.ask(*request)
        assert "ok" in reply, (request, reply)
        return reply["ok"]

    @rule()
    def install(self) -> None:
        if not self.installed:
            self.ok("snapshot")
            self.shimmed_since_install = False
        self.ok("install")
        self.installed = True

    @precondition(lambda self: self.installed)
    @rule()
    def uninstall(self) -> None:
        assert self.ok("uninstall") == []
        self.installed = False
        changed = set(self.ok("changed")) - by_torch
        if self.shimmed_since_install:  # what the shim itself replaced
            changed = {place for place in changed - {"shim", "fold"} if not place.startswith("torch.device")}
        assert changed == set()
        assert self.ok("uninstall") == [], "a second uninstall does nothing"

    @rule(form=st.sampled_from(["factory", "local", "equal"]))
    def shim(self, form: str) -> None:
        self.ok("shim", form)
        self.shimmed_since_install = True

    @rule()
    def import_dynamo(self) -> None:
        self.ok("dynamo")

    @rule()
    def import_inductor(self) -> None:
        self.ok("inductor")

    @rule()
    def fx(self) -> None:
        reply = self.zygote.ask("fx")
        if self.installed:
            assert reply == {"ok": ["musa:0", "cuda:1", "cpu"]}

    @precondition(lambda self: self.installed)
    @rule()
    def compile(self) -> None:
        assert self.ok("compile") == [[3.0, 3.0], True]

    @invariant()
    def alive(self) -> None:
        assert self.zygote.process.poll() is None

    def teardown(self) -> None:
        try:
            if self.installed:
                self.uninstall()
        finally:
            assert self.zygote.ask("end") == {"ended": 0}


@pytest.mark.slow
def test_the_snapshot_sees_what_is_installed() -> None:
    """The property above can fail: while installed, the same snapshot differs in the places we patch, and torch itself
    changes none of them."""
    assert not OURS & by_torch
    assert changes(("shim", "factory"), ("inductor",), ("snapshot",), ("install",)) - by_torch >= OURS


TestAnyHistory = pytest.mark.slow(History.TestCase)
TestAnyHistory.settings = settings(
    max_examples={"fast": 10, "nightly": 1000}.get(os.environ.get("HYPOTHESIS_PROFILE", "ci"), 20),
    stateful_step_count=12,
    deadline=None,
)
