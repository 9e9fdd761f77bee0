"""The interpreter that has the real torch_npu.

`make npu` makes one in `.venv-npu`, and then it is found; `FXPATCH_NPU_PYTHON` names another one (a missing one is an
error, not a skip). torch_npu wants CANN's libraries: `FXPATCH_NPU_STUBS` is the folder with their stubs, or
`stubs` beside the interpreter's `bin`. Only the processes started with this environment look there.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / ".venv-npu"


def interpreter() -> Path | None:
    """It, or None where there is none."""
    named = os.environ.get("FXPATCH_NPU_PYTHON")
    if named is not None:
        return Path(named)
    return MADE / "bin" / "python" if (MADE / "ready").exists() else None


def environment(python: Path) -> dict[str, str]:
    """The environment variables of its processes: this checkout is imported, and nothing is installed by itself."""
    stubs = os.environ.get("FXPATCH_NPU_STUBS") or str(python.parent.parent / "stubs")
    libraries = [stubs, os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONPATH": str(ROOT),
        "FXPATCH_AUTOLOAD": "0",
    }
