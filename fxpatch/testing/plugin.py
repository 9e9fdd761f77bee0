"""The pytest plugin. The problem: a test should be written once, and run in CI without hardware and at night with it.
The rule: tests ask for `accelerator`; the command line decides what that is. The simulated device by default:

    pytest                           a simulated musa (`simulated_device = ...` in the ini file for another name)
    pytest --simulated-device=npu    a simulated npu
    pytest --real-device=npu         the hardware; nothing is simulated

pytest loads this module in every run of an environment that has fxpatch, so it imports nothing but pytest; torch comes
with the first fixture that is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fxpatch.testing.compiled import Compiled

_INDUCTOR = "inductor: compiles with Inductor, which takes seconds"

pytest.register_assert_rewrite(
    "fxpatch.testing.codegen_suite",
    "fxpatch.testing.compiled",
    "fxpatch.testing.device_literals",
    "fxpatch.testing.fake_kernel_suite",
    "fxpatch.testing.graph_capture_suite",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fxpatch", "the accelerator that tests run on")
    group.addoption("--simulated-device", metavar="NAME", help="simulate an accelerator of this name")
    group.addoption("--real-device", metavar="NAME", help="run on the hardware of this name; simulate nothing")
    parser.addini("simulated_device", "the name of the simulated accelerator", default="musa")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _INDUCTOR)


@pytest.fixture(scope="session")
def simulate_options() -> dict[str, Any]:
    """Keyword arguments for `fxpatch.simulate`; override it in conftest.py to give the device your device's limits."""
    return {}


@pytest.fixture(scope="session")
def compile_profile() -> Any:
    """The `profile` argument of `fxpatch.install`; override it in conftest.py where the device has none built in."""
    return None


@pytest.fixture(scope="session")
def simulated_device(pytestconfig: pytest.Config, simulate_options: dict[str, Any]) -> str:
    """The name of this process's simulated accelerator."""
    from fxpatch.testing.devices import simulated

    name = pytestconfig.getoption("simulated_device") or pytestconfig.getini("simulated_device")
    return simulated(name, **simulate_options)


@pytest.fixture(scope="session")
def accelerator(request: pytest.FixtureRequest) -> str:
    """The name of the device to test on: the simulated one, or with `--real-device=NAME` the real one."""
    from fxpatch.testing.devices import real

    name = request.config.getoption("real_device")
    return real(name) if name else str(request.getfixturevalue("simulated_device"))


@pytest.fixture(params=["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def compiled_backend(request: pytest.FixtureRequest) -> str:
    """The backend of `compiled`; override it in conftest.py with the backends that your device has."""
    return str(request.param)


@pytest.fixture
def compiled(accelerator: str, compiled_backend: str, compile_profile: Any) -> Iterator[Callable[..., Compiled]]:
    """`compiled(function_or_module)` compiles it for the accelerator, under `fxpatch.install()`, once per backend:
    call the result with tensors of the device, or `.check(*inputs)` it against the CPU."""
    import torch

    from fxpatch.installer import install
    from fxpatch.testing.compiled import Compiled

    torch.compiler.reset()
    try:
        with install(accelerator, profile=compile_profile):
            yield functools.partial(Compiled, device=accelerator, backend=compiled_backend)
    finally:
        torch.compiler.reset()
