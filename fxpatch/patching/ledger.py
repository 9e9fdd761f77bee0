"""The ledger applies a list of patches, now or when the modules they wait for arrive, and takes them all back.

`settle()` may be called any number of times: it decides anew on fresh facts, so a vendor shim that comes after
`install()` is repaired at the next call. It is called on every import that a patch waits for, when FX generates code
under another `torch.device` than before, and around every Dynamo compilation. A patch is applied whole or not at all.

Since torch 2.12 its settings live in context variables: what one thread sets, another does not see, and autograd
compiles backward graphs in threads of its own. So a patch may be marked `per_context`: its edits then hold in the
context that installed it, and in every other one for the length of each compilation.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from fxpatch.arrival import imported, when_imported
from fxpatch.errors import FxPatchError, FxPatchWarning, TargetMovedError
from fxpatch.patching.edits import Edits
from fxpatch.patching.record import Applied, Deferred, NotNeeded, Outcome, Patch, Refused

_LATE = "torch._dynamo.callback"  # what brings every thread here before it compiles
_watched: set[str] = set()
_live: weakref.WeakSet[Ledger] = weakref.WeakSet()


class _Layer:
    """Edits that are taken back together, and the outcomes that go with them: by patch name."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.edits: dict[str, Edits] = {}

    def undo(self) -> list[str]:
        """Last patch first; one that fails does not keep the others, and is raised at the end."""
        left: list[str] = []
        failure: Exception | None = None
        while self.edits:
            try:
                left += self.edits.popitem()[1].undo()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return left


class Ledger:
    """Patches of one installation; it belongs to the context (the thread) that makes it.

    Args:
        patches: in the order in which they are to be applied; undone in the opposite order.
        device: device type for which they are decided, e.g. `"musa"`.
    """

    def __init__(self, patches: Iterable[Patch[Any]], device: str) -> None:
        self.patches = tuple(patches)
        self.device = device
        self._kept = _Layer()
        self._at_home: ContextVar[bool] = ContextVar("fxpatch_at_home", default=False)
        self._at_home.set(True)
        self._held_here: ContextVar[frozenset[str]] = ContextVar("fxpatch_held_here", default=frozenset())
        self._compilation: ContextVar[_Layer | None] = ContextVar("fxpatch_compilation", default=None)
        self._lock = threading.RLock()
        self._closed = False
        self._told: set[str] = set()
        _live.add(self)

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """What became of each patch, by name."""
        return self._kept.outcomes

    def settle(self) -> dict[str, Outcome]:
        """Decides on every patch with facts read now, applies what is needed, and returns all outcomes by name.

        Raises what a patch's own code raised, after taking that patch back; the ledger can still be undone.
        """
        with self._lock:
            for patch in () if self._closed else self.patches:
                layer = self._layer_for(patch)
                if layer is not None:
                    layer.outcomes[patch.name] = self._settle_one(patch, layer)
                if patch.per_context and layer is self._kept and patch.name in layer.edits:
                    self._held_here.set(self._held_here.get() | {patch.name})
                self.outcomes.setdefault(patch.name, Deferred(_LATE, "waits for the thread that installed it"))
            return self.outcomes

    def new_errors(self) -> list[FxPatchError]:
        """What refused patches say that somebody has to act on; each patch says it once."""
        with self._lock:
            refused = {name: o.error for name, o in self.outcomes.items() if isinstance(o, Refused) and o.error}
            told, self._told = self._told, self._told | set(refused)
            return [error for name, error in refused.items() if name not in told]

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Settles; and for the length of the block, `per_context` patches hold in this context too."""
        layer = _Layer()
        token = self._compilation.set(layer)
        try:
            self.settle()
            yield
        finally:
            self._compilation.reset(token)
            layer.undo()

    def _layer_for(self, patch: Patch[Any]) -> _Layer | None:
        """Where an edit in this context belongs. A task's context is a copy of the installer's, made before or after
        the edit, and changes in it do not come back: so what counts is whether the edit was made here."""
        if not patch.per_context or self._is_held_here(patch):
            return self._kept
        if self._at_home.get() and patch.name not in self._kept.edits:
            return self._kept
        return self._compilation.get()

    def _is_held_here(self, patch: Patch[Any]) -> bool:
        return patch.name in self._held_here.get()

    @property
    def holds(self) -> bool:
        """Whether anything is still to be taken back."""
        return bool(self._kept.edits)

    def undo(self) -> list[str]:
        """Takes every patch back; returns, in words, what was left: what somebody else has changed since, and what
        lives in the context that settled first, out of reach from here. There, `undo()` takes that back, too."""
        with self._lock:
            self._closed = True
            _live.discard(self)
            edits = self._kept.edits
            far = [p.name for p in self.patches if p.per_context and p.name in edits and not self._is_held_here(p)]
            out_of_reach = {name: edits.pop(name) for name in far}
            try:
                left = self._kept.undo()
            finally:
                edits.update(out_of_reach)
            return left + [
                f"{name} still holds in the thread or task where it was applied: uninstall() there, too" for name in far
            ]

    def _settle_one(self, patch: Patch[Any], layer: _Layer) -> Outcome:
        missing = next((m for m in patch.waits_for if not imported(m)), None)
        if missing is not None:
            watch(missing)
            return Deferred(missing, f"waits until {missing} is imported")
        facts = patch.probe(self.device)
        decision = patch.decide(facts)
        before = layer.outcomes.get(patch.name)
        if isinstance(before, Applied):
            if isinstance(decision, (NotNeeded, Refused)) or decision.version == before.version:
                if patch.refresh is not None:
                    patch.refresh()
                return before
            del layer.outcomes[patch.name]
            layer.edits.pop(patch.name).undo()
        if isinstance(decision, (NotNeeded, Refused)):
            return decision
        try:
            for target in patch.targets:
                target.resolve()
        except TargetMovedError as error:
            return Refused(f"{decision.reason}; but {error}", error=error)
        edits = Edits()
        try:
            detail = patch.apply(self.device, facts, edits)
        except BaseException:
            edits.undo()
            raise
        layer.edits[patch.name] = edits
        return Applied(decision.reason, detail, decision.version)


def settle_all(when: str) -> None:
    """Settles every live ledger. For callers inside somebody else's import or compilation, which must not fail
    because of us: what goes wrong becomes an `FxPatchWarning` that says `when`."""
    for ledger in list(_live):
        with _warning_instead(when):
            ledger.settle()
        _warn_of_errors(ledger)


@contextmanager
def compiling() -> Iterator[None]:
    """Around one compilation: `Ledger.compiling` of every live ledger, and as careful as `settle_all`."""
    with ExitStack() as stack:
        for ledger in list(_live):
            with _warning_instead("at the start of a compilation"):
                stack.enter_context(ledger.compiling())
            _warn_of_errors(ledger)
        yield


@contextmanager
def _warning_instead(when: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        warnings.warn(f"fxpatch could not settle {when}: {error!r}", FxPatchWarning, stacklevel=3)


def _warn_of_errors(ledger: Ledger) -> None:
    for error in ledger.new_errors():
        warnings.warn(str(error), FxPatchWarning, stacklevel=4)


def _hold_locks() -> None:
    """Before a fork: no ledger is half settled in the child. One that takes longer is left to the child as it is."""
    _held.extend(ledger for ledger in list(_live) if ledger._lock.acquire(timeout=_FORK_WAITS))


def _let_go() -> None:
    while _held:
        _held.pop()._lock.release()


def _let_go_in_child() -> None:
    _held.clear()
    for ledger in list(_live):  # a lock belongs to a thread, and the child's has another number
        ledger._lock = threading.RLock()


_FORK_WAITS = 5.0  # seconds
_held: list[Ledger] = []
os.register_at_fork(before=_hold_locks, after_in_parent=_let_go, after_in_child=_let_go_in_child)


def watch(module: str) -> None:
    """Settles every live ledger once `module` has been imported. A hook cannot be taken back, so there is one per
    module and process, and it does nothing where no ledger is live."""
    if module in _watched:
        return
    _watched.add(module)

    when_imported(module, lambda: settle_all(f"after the import of {module}"))
