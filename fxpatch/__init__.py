"""Makes `torch.compile` work, and stay right, on accelerators PyTorch does not know.

Importing fxpatch changes nothing and costs next to nothing: the names below are fetched at first use.

    import fxpatch
    fxpatch.install()          # before torch.compile; hands back the undo
    print(fxpatch.status())    # each patch and setting: applied, not needed, waiting or refused, and why
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxpatch.artifacts.files import load, save
    from fxpatch.errors import FxPatchError, FxPatchWarning
    from fxpatch.installer import Installation, install
    from fxpatch.piecewise.breaks import eager_on_graph
    from fxpatch.piecewise.runner import PiecewiseRunner
    from fxpatch.repair.inductor import register_inductor
    from fxpatch.report import Report, status
    from fxpatch.simulator.registration import simulate
    from fxpatch.verification.report import Verification
    from fxpatch.verification.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "FxPatchError",
    "FxPatchWarning",
    "Installation",
    "PiecewiseRunner",
    "Report",
    "Verification",
    "eager_on_graph",
    "install",
    "load",
    "register_inductor",
    "save",
    "simulate",
    "status",
    "verify",
]

_DEFINED_IN = {
    "FxPatchError": "fxpatch.errors",
    "FxPatchWarning": "fxpatch.errors",
    "Installation": "fxpatch.installer",
    "Report": "fxpatch.report",
    "Verification": "fxpatch.verification.report",
    "PiecewiseRunner": "fxpatch.piecewise.runner",
    "eager_on_graph": "fxpatch.piecewise.breaks",
    "install": "fxpatch.installer",
    "load": "fxpatch.artifacts.files",
    "register_inductor": "fxpatch.repair.inductor",
    "save": "fxpatch.artifacts.files",
    "simulate": "fxpatch.simulator.registration",
    "status": "fxpatch.report",
    "verify": "fxpatch.verification.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'fxpatch' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    found = getattr(import_module(_DEFINED_IN[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
