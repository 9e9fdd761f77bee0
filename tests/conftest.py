"""What all tests share: Hypothesis profiles, the simulated device of this process, and fresh processes.

PrivateUse1 can be named once per process. This process calls it `musa`; a test that needs another name, an import in
another order or a crash runs in a process of its own through `fresh`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["FXPATCH_AUTOLOAD"] = "0"  # before anything imports torch: the tests install fxpatch themselves

ROOT = Path(__file__).resolve().parent.parent

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("fast", max_examples=50, **_common)
settings.register_profile("ci", max_examples=500, derandomize=True, **_common)  # the same answer for the same commit
settings.register_profile("nightly", max_examples=10_000, **_common)  # new examples every night
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def musa() -> str:
    """The name of this process's simulated accelerator. It is there before the first test, whichever that is: torch's
    autograd engine knows the devices that there were at the first backward."""
    import torch._dynamo  # here, and not under some test's shim, which its tables would remember  # noqa: F401

    from fxpatch.simulator import simulate

    simulate("musa")
    return "musa"


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    """`make coverage` goes on counting after a test in which something has taken the trace function away."""
    before = sys.gettrace()
    yield
    if sys.gettrace() is not before:
        sys.settrace(before)


@pytest.fixture
def fresh() -> Callable[..., str]:
    """`fresh(code, **env)`: runs Python source in a new process and returns its stdout; fails the test if it fails."""

    def run(code: str, *, status: int = 0, timeout: float = 300, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT / "tests",
            env={**os.environ, "FXPATCH_AUTOLOAD": "0", **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
