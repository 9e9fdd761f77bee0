"""Repairs for a replaced `torch.device` inside Dynamo: what is a constant, what is folded, what `isinstance` answers.

Dynamo fills its tables at import or at first use, with whatever `torch.device` is then. The rule is that of
`device_class.py`: the tables get to know both classes. These wait until somebody imports Dynamo.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Refused, Target
from fxpatch.repair.device_class import REAL, SEEN_IN, UNTIL, UPSTREAM, Shim, decide_on

# -- Dynamo: types of constants, and classes whose calls are folded --------------------------------------------------


def _probe_constants(_: str) -> Shim:
    types = sys.modules["torch._dynamo.utils"].common_constant_types
    return Shim(torch.device, known=any(t is REAL for t in types))


def _decide_constants(shim: Shim) -> Needed | NotNeeded:
    """By the table alone: a shim that was there when Dynamo was imported may be gone since."""
    if shim.known:
        return NotNeeded("Dynamo has the real class already")
    return Needed("Dynamo was imported under a shim, and does not know the real class", version=id(shim.current))


def _apply_constants(_device: str, _shim: Shim, edits: Edits) -> str:
    edits.add(sys.modules["torch._dynamo.utils"].common_constant_types, REAL)
    return "Dynamo takes the real class for a constant"


CONSTANTS = Patch[Shim](
    name="dynamo-constant-types",
    why="Dynamo recorded the replaced torch.device as the type of device constants: every `x.device` in compiled code "
    "breaks the graph ('does not know how to wrap <class torch.device>')",
    upstream=UPSTREAM,
    until=UNTIL,
    seen_in=SEEN_IN,
    targets=(Target("torch._dynamo.utils", "common_constant_types"),),
    probe=_probe_constants,
    decide=_decide_constants,
    apply=_apply_constants,
    waits_for=("torch._dynamo.utils",),
)


def _fold_classes() -> Any:
    return sys.modules["torch._dynamo.variables.user_defined"].UserDefinedClassVariable._constant_fold_classes


def _probe_fold(_: str) -> Shim:
    return Shim(torch.device, known=False)


def _apply_fold(_device: str, shim: Shim, edits: Edits) -> str:
    classes = _fold_classes()
    if classes.cache_info().currsize == 0:  # our call fills it: empty again afterwards is "as found"
        edits.on_undo(classes.cache_clear)
    for each in (REAL, shim.current):
        edits.add(classes(), each)
    return "Dynamo folds calls of both the real class and the shim"


FOLD = Patch[Shim](
    name="dynamo-fold-classes",
    why="Dynamo folds `torch.device(...)` into a constant only for the class it recorded at its first use: "
    "'Attempted to call function marked as skipped: device.__new__'",
    upstream=UPSTREAM,
    until=UNTIL,
    seen_in=SEEN_IN,
    targets=(
        Target("torch._dynamo.variables.user_defined", "UserDefinedClassVariable._constant_fold_classes", ""),
        Target("torch._dynamo.variables.user_defined", "UserDefinedClassVariable._constant_fold_classes.cache_clear"),
    ),
    probe=_probe_fold,
    decide=decide_on(""),
    apply=_apply_fold,
    waits_for=("torch._dynamo.variables.user_defined",),
)

# -- isinstance in compiled code -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubclassCheck:
    """Whether `isinstance(d, torch.device)`, and `issubclass`, which Dynamo asks instead, hold for real devices."""

    current: Any
    by_instance: bool
    by_class: bool


def _probe_subclass(_: str) -> SubclassCheck:
    current = torch.device
    if not isinstance(current, type):
        return SubclassCheck(current, by_instance=False, by_class=False)
    return SubclassCheck(current, isinstance(REAL("cpu"), current), issubclass(REAL, current))


def _decide_subclass(check: SubclassCheck) -> Needed | NotNeeded | Refused:
    if check.by_instance == check.by_class:
        return NotNeeded("isinstance and issubclass agree on torch.device")
    if not check.by_instance:
        return Refused("issubclass holds for the real class and isinstance does not: that is the shim's to mend")
    return Needed("isinstance(d, torch.device) holds and issubclass(type(d), torch.device) does not", id(check.current))


def _apply_subclass(_device: str, check: SubclassCheck, edits: Edits) -> str:
    metaclass, shim = type(check.current), check.current
    inherited: Any = metaclass.__subclasscheck__

    def __subclasscheck__(cls: type, subclass: type) -> bool:
        return (cls is shim and issubclass(subclass, REAL)) or inherited(cls, subclass)

    edits.set_attr(metaclass, "__subclasscheck__", __subclasscheck__)
    return "the shim's metaclass answers issubclass as it answers isinstance"


SUBCLASS = Patch[SubclassCheck](
    name="isinstance-in-compiled-code",
    why="Dynamo evaluates isinstance(x.device, torch.device) by issubclass; a shim that defines only __instancecheck__ "
    "takes the other branch in compiled code than in eager, silently",
    upstream=UPSTREAM,
    until=UNTIL,
    seen_in=SEEN_IN,
    targets=(),
    probe=_probe_subclass,
    decide=_decide_subclass,
    apply=_apply_subclass,
)

PATCHES: tuple[Patch[Any], ...] = (CONSTANTS, FOLD, SUBCLASS)
