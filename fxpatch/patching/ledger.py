"""The ledger applies a list of patches, now or when the modules they wait for arrive, and takes them all back.

`settle()` may be called any number of times: it decides anew on fresh facts, so a vendor shim that comes after
`install()` is repaired at the next call. `settle_all()` is called on every import that a patch waits for, when FX
generates code under another `torch.device` than before, and at the start of every Dynamo compilation. A patch is
applied whole or not at all.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from fxpatch.arrival import imported, when_imported
from fxpatch.errors import FxPatchWarning, TargetMovedError
from fxpatch.patching.edits import Edits
from fxpatch.patching.record import Applied, Deferred, NotNeeded, Outcome, Patch, Refused

_watched: set[str] = set()
_live: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """Patches of one installation.

    Args:
        patches: in the order in which they are to be applied; undone in the opposite order.
        device: device type for which they are decided, e.g. `"musa"`.
    """

    def __init__(self, patches: Iterable[Patch[Any]], device: str) -> None:
        self.patches = tuple(patches)
        self.device = device
        self.outcomes: dict[str, Outcome] = {}
        self._edits: dict[str, Edits] = {}
        self._lock = threading.RLock()
        self._closed = False
        _live.add(self)

    def settle(self) -> dict[str, Outcome]:
        """Decides on every patch with facts read now, applies what is needed, and returns all outcomes by name.

        Raises what a patch's own code raised, after taking that patch back; the ledger can still be undone.
        """
        with self._lock:
            if self._closed:
                return self.outcomes
            for patch in self.patches:
                self.outcomes[patch.name] = self._settle_one(patch)
            return self.outcomes

    def undo(self) -> list[str]:
        """Takes every patch back; returns, in words, what somebody else has changed since and was left."""
        with self._lock:
            self._closed = True
            _live.discard(self)
            left: list[str] = []
            failure: Exception | None = None
            for name in reversed([p.name for p in self.patches if p.name in self._edits]):
                try:
                    left += self._edits.pop(name).undo()
                except Exception as error:
                    failure = failure or error
            if failure is not None:
                raise failure
            return left

    def _settle_one(self, patch: Patch[Any]) -> Outcome:
        before = self.outcomes.get(patch.name)
        missing = next((m for m in patch.waits_for if not imported(m)), None)
        if missing is not None:
            _watch(missing)
            return Deferred(missing, f"waits until {missing} is imported")
        facts = patch.probe(self.device)
        decision = patch.decide(facts)
        if isinstance(before, Applied):
            if isinstance(decision, (NotNeeded, Refused)) or decision.version == before.version:
                return before
            self._edits.pop(patch.name).undo()
        if isinstance(decision, (NotNeeded, Refused)):
            return decision
        try:
            for target in patch.targets:
                target.resolve()
        except TargetMovedError as error:
            return Refused(f"{decision.reason}; but {error}", moved=error)
        edits = Edits()
        try:
            detail = patch.apply(self.device, facts, edits)
        except BaseException:
            edits.undo()
            raise
        self._edits[patch.name] = edits
        return Applied(decision.reason, detail, decision.version)


def settle_all(when: str) -> None:
    """Settles every live ledger. For callers inside somebody else's import or compilation, which must not fail
    because of us: what goes wrong becomes an `FxPatchWarning` that says `when`."""
    for ledger in list(_live):
        try:
            ledger.settle()
        except Exception as error:
            warnings.warn(f"fxpatch could not settle {when}: {error!r}", FxPatchWarning, stacklevel=2)


def _watch(module: str) -> None:
    """Settles every live ledger once `module` has been imported. A hook cannot be taken back, so there is one per
    module and process, and it does nothing where no ledger is live."""
    if module in _watched:
        return
    _watched.add(module)

    when_imported(module, lambda: settle_all(f"after the import of {module}"))
