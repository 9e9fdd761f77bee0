"""A patch is a record: what is wrong, where, since when, until when, and the signature it expects.

Probing and deciding are apart: `Patch.probe` reads, `Patch.decide` is a pure function of what was read, so every device
can be tested on a laptop. `Patch.apply` changes things only through the `Edits` it is handed: that makes it undoable.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from fxpatch.errors import FxPatchError, TargetMovedError
from fxpatch.patching.edits import Edits

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Needed:
    """The probe found it wrong. `version` says in what state: if it changes later, the patch is applied anew."""

    reason: str
    version: object = None


@dataclass(frozen=True)
class NotNeeded:
    """Nothing is wrong here, or torch has a public way: the patch steps aside."""

    reason: str


@dataclass(frozen=True)
class Applied:
    """The edits are in place; `detail` says what they do."""

    reason: str
    detail: str
    version: object = None


@dataclass(frozen=True)
class Deferred:
    """Waits until `module` is imported: nothing is wrong before that, and importing it early would cost seconds."""

    module: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """Needed, and not done: nothing was changed, and `reason` says what stood in the way.

    `error` says more where somebody has to act: a private torch name was gone or had another signature, a profile
    names a setting that torch does not have.
    """

    reason: str
    error: FxPatchError | None = None


Outcome = Applied | NotNeeded | Deferred | Refused


@dataclass(frozen=True)
class Target:
    """One private name: `Target("torch.fx.graph", "CodeGen._gen_python_code", "self, nodes, ...")`.

    Args:
        module: the module that defines it; `resolve` imports it.
        path: attribute path inside the module.
        parameters: the parameter names expected, comma separated; a closing `...` admits further ones that a
            caller may leave out; None where the target is not called.
    """

    module: str
    path: str
    parameters: str | None = None

    def resolve(self) -> Any:
        """The object at this target; `TargetMovedError` where it is gone or its parameters differ."""
        # not through the import lock where it is there: another thread may hold that lock and wait for our ledger's
        found: Any = sys.modules.get(self.module) or importlib.import_module(self.module)
        for part in self.path.split("."):
            if not hasattr(found, part):
                raise self._moved(f"no attribute {part!r} on {found!r}")
            found = getattr(found, part)
        if self.parameters is not None:
            self._check_parameters(found)
        return found

    def _check_parameters(self, found: Any) -> None:
        expected = [name.strip() for name in (self.parameters or "").split(",") if name.strip()]
        seen = list(inspect.signature(found).parameters.values())
        open_ended = expected[-1:] == ["..."]
        named = expected[:-1] if open_ended else expected
        rest_ok = all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) or p.default is not p.empty for p in seen[len(named) :])
        if [p.name for p in seen[: len(named)]] != named or (len(seen) > len(named) and not (open_ended and rest_ok)):
            raise self._moved(f"{self.path}{inspect.signature(found)}")

    def _moved(self, seen: str) -> TargetMovedError:
        wanted = self.path if self.parameters is None else f"{self.path}({self.parameters})"
        return TargetMovedError(
            f"torch {torch.__version__} has moved a private name that fxpatch needs.",
            seen=f"{self.module}: {seen}",
            expected=f"{self.module}: {wanted}",
            hint="use a torch version named in the patch's `seen_in`, or report this torch version to fxpatch",
        )


@dataclass(frozen=True)
class Patch(Generic[Facts]):
    """One repair.

    Args:
        name: short and stable; the key in `status()`.
        why: what is wrong without it.
        upstream: where it is discussed or decided upstream.
        until: when it can go.
        seen_in: the torch versions in which the targets were seen with these signatures.
        targets: every private name it touches, checked before anything is changed.
        probe: device type -> facts; reads, changes nothing, imports neither Dynamo nor Inductor.
        decide: facts -> is it needed. Pure.
        apply: (device type, facts, edits) -> one sentence for the report.
        waits_for: modules that must have been imported by somebody else first.
        refresh: for a patch whose work grows while it is applied: called at every later settling. What it adds, the
            edits of `apply` take back.
        per_context: the edits live in context variables, as torch's settings do (see `ledger.py`).
    """

    name: str
    why: str
    upstream: str
    until: str
    seen_in: tuple[str, ...]
    targets: tuple[Target, ...]
    probe: Callable[[str], Facts]
    decide: Callable[[Facts], Needed | NotNeeded | Refused]
    apply: Callable[[str, Facts, Edits], str]
    waits_for: tuple[str, ...] = ()
    per_context: bool = False
    refresh: Callable[[], None] | None = None
