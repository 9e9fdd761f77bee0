"""A replaced `torch.device` is repaired wherever torch remembers the class, whichever came first, and exactly.

Each case is a process of its own: the order of imports is the point. What is tried is in `shim_probes.py`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

ORDERS = ["shim dynamo settle", "shim settle dynamo", "dynamo shim settle", "settle shim dynamo", "settle dynamo shim"]


def failures(fresh: Callable[..., str], form: str, order: str) -> dict[str, Any]:
    code = (
        f"import sys; sys.path.insert(0, 'repair'); import shim_probes; shim_probes.main({form!r}, *{order.split()!r})"
    )
    results = json.loads(fresh(code).split("RESULT ", 1)[1].splitlines()[0])
    return {name: result for name, result in results.items() if result is not True}


@pytest.mark.parametrize("order", ["shim dynamo", "dynamo shim"])
def test_without_repair_it_is_broken(fresh: Callable[..., str], order: str) -> None:
    """The checks below can fail."""
    assert set(failures(fresh, "factory", order)) >= {
        "fx literal of another device is exact",
        "fx literal of the device",
        "fx pickle is exact",
        "x.device in a graph",
        "schema of an operator",
        "pickle is torch's own",
        "weights_only",
    }


def test_isinstance_is_silently_wrong_without_repair(fresh: Callable[..., str]) -> None:
    """Nothing raises under a shim that equals the real class: compiled code just takes the other branch."""
    assert failures(fresh, "equal", "dynamo shim")["isinstance in a graph as in eager"] is False


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["factory", "local", "equal", "torchada"])
def test_repaired_in_every_order(fresh: Callable[..., str], form: str, order: str) -> None:
    if form == "torchada" and importlib.util.find_spec("torchada") is None:  # not imported: it would patch this process
        pytest.skip("torchada, the vendor's package from PyPI, is not installed")
    assert failures(fresh, form, order) == {}
