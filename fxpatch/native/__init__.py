"""Native fallbacks, removed once tracing has succeeded: see `promote` for what and why, `forwards` for how a forward is
replaced and restored, `absence` for the proof on the graph.
"""

from fxpatch.native.absence import NativePathError, assert_native_absent
from fxpatch.native.agreement import TOLERANCES, Deviation, Tolerance
from fxpatch.native.bisection import Bisection
from fxpatch.native.decisions import Decision, Decisions
from fxpatch.native.forwards import native
from fxpatch.native.operators import NativeOperator, find_operators
from fxpatch.native.promote import SLOWER, promote
from fxpatch.native.trial import Capture, Captured

__all__ = [
    "SLOWER",
    "TOLERANCES",
    "Bisection",
    "Capture",
    "Captured",
    "Decision",
    "Decisions",
    "Deviation",
    "NativeOperator",
    "NativePathError",
    "Tolerance",
    "assert_native_absent",
    "find_operators",
    "native",
    "promote",
]
