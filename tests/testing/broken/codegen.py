"""Repairs that are missing or wrong, in front of the same suite. Collected by test_suites_can_fail.py only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

from fxpatch.codegen import Rewritten
from fxpatch.simulator.shim import replaced_torch_device

# before the suite takes its settings from it: the first failure will do, nobody reads the smallest one
settings.register_profile("first failure", phases=[Phase.generate])
settings.load_profile("first failure")

from fxpatch.testing import CodegenTests, codegen_suite  # noqa: E402
from fxpatch.testing.codegen_suite import Shim  # noqa: E402


class Broken(CodegenTests):
    """In one order only."""

    @pytest.fixture
    def repaired(self, device: str, vendor_shim: Shim) -> Iterator[None]:
        with vendor_shim(), codegen_suite.install(device):
            yield


class TestNotRepaired(Broken):
    @pytest.fixture(autouse=True)
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codegen_suite, "install", lambda *_, **__: contextlib.nullcontext())


class TestShimThatClaimsToBeEqual(TestNotRepaired):
    """The one that makes `isinstance` answer no in compiled code, without a word."""

    @pytest.fixture
    def vendor_shim(self, device: str) -> Shim:
        return lambda: replaced_torch_device(device, "equal")


class TestRewritesEverything(Broken):
    """One substitution over all of the source: strings and other devices included."""

    @pytest.fixture(autouse=True)
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        literal = re.compile(r"\bdevice\(type='([^']+)'(?:,\s*index=(\d+))?\)")

        def rewrite(src: str, _globals: Any, _custom: str) -> Rewritten:
            one = lambda m: f"torch.device('{m[1]}')" if m[2] is None else f"torch.device('{m[1]}:{m[2]}')"  # noqa: E731
            return Rewritten(literal.sub(one, src), "torch")

        monkeypatch.setattr("fxpatch.codegen.rewrite", rewrite)
