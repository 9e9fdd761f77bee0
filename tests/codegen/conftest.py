"""The patch by itself, without an installation around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxpatch.codegen import PATCH
from fxpatch.patching import Edits


@pytest.fixture
def active(musa: str) -> Iterator[Edits]:
    """The patch in force for the length of a test."""
    edits = Edits()
    PATCH.apply(musa, False, edits)
    yield edits
    edits.undo()
