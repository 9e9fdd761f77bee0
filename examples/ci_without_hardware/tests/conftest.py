"""The device that the tests see: its limits where it is simulated, its compile profile everywhere."""

from typing import Any

import pytest
from acme_kernels import COMPILE_PROFILE


@pytest.fixture(scope="session")
def simulate_options() -> dict[str, Any]:
    return {"memory": "2 GiB", "max_live_graphs": 100, "strict": True}


@pytest.fixture(scope="session")
def compile_profile() -> Any:
    return COMPILE_PROFILE


@pytest.fixture(params=["eager", "aot_eager"])
def compiled_backend(request: pytest.FixtureRequest) -> str:
    """Acme has no Inductor backend yet."""
    return str(request.param)
