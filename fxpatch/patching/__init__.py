"""Undoable patches as data: `Patch` records, the `Edits` they make, and the `Ledger` that applies and undoes them."""

from fxpatch.patching.edits import Edits
from fxpatch.patching.ledger import Ledger, compiling, settle_all, watch
from fxpatch.patching.record import (
    Applied,
    Deferred,
    Needed,
    NotNeeded,
    Outcome,
    Patch,
    Refused,
    Target,
)

__all__ = [
    "Applied",
    "Deferred",
    "Edits",
    "Ledger",
    "Needed",
    "NotNeeded",
    "Outcome",
    "Patch",
    "Refused",
    "Target",
    "compiling",
    "settle_all",
    "watch",
]
