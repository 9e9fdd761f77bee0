"""What a vendor or an engine tests its device with, with hardware and without: `pip install fxpatch[testing]`.

The fixtures come by themselves, as a pytest plugin (`fxpatch.testing.plugin`). The suites are classes to subclass:

    from fxpatch.testing import GraphCaptureTests

    class TestGraphs(GraphCaptureTests):
        pass

and `fxpatch.testing.strategies` draws tensors and FX graphs for Hypothesis. Importing this package imports neither
torch nor pytest; the names below are fetched at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxpatch.testing.codegen_suite import CodegenTests
    from fxpatch.testing.compiled import Compiled
    from fxpatch.testing.fake_kernel_suite import FakeKernelTests
    from fxpatch.testing.graph_capture_suite import GraphCaptureTests

__all__ = ["CodegenTests", "Compiled", "FakeKernelTests", "GraphCaptureTests"]

_DEFINED_IN = {
    "CodegenTests": "fxpatch.testing.codegen_suite",
    "Compiled": "fxpatch.testing.compiled",
    "FakeKernelTests": "fxpatch.testing.fake_kernel_suite",
    "GraphCaptureTests": "fxpatch.testing.graph_capture_suite",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'fxpatch.testing' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    found = getattr(import_module(_DEFINED_IN[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
