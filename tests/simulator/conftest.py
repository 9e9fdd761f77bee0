"""What the simulator's tests share: quick garbage collections, and a device that is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from garbage import collect


@pytest.fixture(autouse=True, scope="session")
def quick_collections(musa: str) -> Iterator[None]:
    """Many of these tests collect garbage. None of it is in what was imported before, and that takes long to search."""
    collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def simulate(musa: str) -> Iterator[Callable[..., None]]:
    """`simulate(strict=True)`: a setting for the length of a test."""
    import fxpatch

    def change(**settings: Any) -> None:
        fxpatch.simulate(musa, **settings)

    yield change
    change(memory=None, max_live_graphs=None, strict=False)


@pytest.fixture
def room(simulate: Callable[..., None]) -> Callable[[int], None]:
    """`room(nbytes)`: the device has this much left, and nothing cached."""

    def leave(nbytes: int) -> None:
        collect()
        torch.musa.empty_cache()
        simulate(memory=torch.musa.memory_reserved() + nbytes)

    return leave
