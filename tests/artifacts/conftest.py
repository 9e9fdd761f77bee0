"""A key of their own for the tests of artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's key is, once something is saved."""
    path = tmp_path / "keys" / "artifacts.key"
    monkeypatch.setenv("FXPATCH_KEY_FILE", str(path))
    return path
