"""Which of some packages this process has imported, and in which versions. Imports none of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def imported_versions(packages: Iterable[str]) -> dict[str, str]:
    """Version by name, for those of `packages` that are imported; `"unknown"` where neither metadata nor the module
    tells."""
    return {name: _version(name) for name in packages if name in sys.modules}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules[package], "__version__", "unknown"))
