"""Repairs for a replaced `torch.device`, wherever torch remembers the class.

A vendor shim (`torch.device = Wrapper`) hands out real devices, but torch compares classes, in tables filled at import
time. Whichever came first, the tables then know only one of the two. The rule kept here: every table gets to know
both, a literal keeps exactly the device it says (`cuda:1` stays `cuda:1` although the shim maps it), and the real
class stays reachable as `torch._C.device`, which no shim replaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.graph
from torch._library import infer_schema

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Target

REAL: type = torch._C.device
SEEN_IN = ("2.11.0", "2.13.0", "2.15.0")
UPSTREAM = "https://github.com/sgl-project/sglang/pull/23633"
UNTIL = "torch compares devices by instance instead of remembering the class"


class device:
    """What generated FX code calls `device`: builds exactly the device named, whatever `torch.device` has become.

    A class of ours because FX adds nothing to a graph's globals that it believes importable from torch
    (`torch.fx.graph.add_global`), which is how the name gets lost under a shim.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return REAL(*args, **kwargs)


_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def name_of(current: Any) -> str:
    """The full name of a class as its vendor gave it, also after `portable-pickles` has given it torch's."""
    if current is REAL:
        return "torch.device"
    return _names.setdefault(current, f"{getattr(current, '__module__', '?')}.{getattr(current, '__qualname__', '?')}")


@dataclass(frozen=True)
class Shim:
    """What is in the place of `torch.device`, and what the table in question knows of it."""

    current: Any
    known: bool

    @property
    def replaced(self) -> bool:
        return self.current is not REAL


def decide_on(what: str) -> Callable[[Shim], Needed | NotNeeded]:
    """The decision all tables share. `what`: who has made the shim known there already, where somebody can have."""

    def decide(shim: Shim) -> Needed | NotNeeded:
        if not shim.replaced:
            return NotNeeded("torch.device is torch's own class")
        if shim.known:
            return NotNeeded(f"{what} already")
        return Needed(f"torch.device is replaced by {name_of(shim.current)}", version=id(shim.current))

    return decide


# -- FX: the name `device` in generated code -------------------------------------------------------------------------


def _probe_fx(_: str) -> Shim:
    return Shim(torch.device, known=False)


def _apply_fx(_device: str, _shim: Shim, edits: Edits) -> str:
    builtin = torch.fx.graph._CustomBuiltin("from torch._C import device", device)
    edits.set_item(torch.fx.graph._custom_builtins, "device", builtin, "torch.fx.graph._custom_builtins")
    edits.set_item(torch.fx.graph._illegal_names, "device", device, "torch.fx.graph._illegal_names")
    return "generated code binds `device` to the exact class; pickles import it from torch._C"


FX = Patch[Shim](
    name="fx-device-builtin",
    why="generated FX code calls `device(...)`, and under a replaced torch.device that name is not bound (NameError), "
    "or is bound to the shim, which maps cuda:1 to another device",
    upstream=UPSTREAM,
    until=UNTIL,
    seen_in=SEEN_IN,
    targets=(
        Target("torch.fx.graph", "_custom_builtins"),
        Target("torch.fx.graph", "_illegal_names"),
        Target("torch.fx.graph", "_CustomBuiltin", "import_str, obj"),
    ),
    probe=_probe_fx,
    decide=decide_on(""),
    apply=_apply_fx,
)

# -- torch.library: schemas inferred from annotations ----------------------------------------------------------------


def _missing_annotations(current: Any) -> dict[Any, str]:
    """Annotations of the schema table that hold a device class, spelt with the class that is missing there."""
    table = infer_schema.SUPPORTED_PARAM_TYPES
    wanted: dict[Any, str] = {}
    for annotation, schema in table.items():
        for known in (REAL, current):
            for other in (REAL, current):
                swapped = _swap(annotation, known, other)
                if swapped is not None and swapped not in table:
                    wanted[swapped] = schema
    return wanted


def _swap(annotation: Any, known: Any, other: Any) -> Any:
    """`annotation` with the class `known` exchanged for `other`; None where `known` does not occur in it."""
    if annotation is known:
        return other
    args = getattr(annotation, "__args__", ())
    if not any(a is known for a in args):
        return None
    return annotation.copy_with(tuple(other if a is known else a for a in args))


def _probe_schema(_: str) -> Shim:
    current = torch.device
    return Shim(current, known=current is not REAL and not _missing_annotations(current))


def _apply_schema(_device: str, shim: Shim, edits: Edits) -> str:
    missing = _missing_annotations(shim.current)
    for annotation, schema in missing.items():
        edits.set_item(infer_schema.SUPPORTED_PARAM_TYPES, annotation, schema, "SUPPORTED_PARAM_TYPES")
    return f"{len(missing)} annotations added to the schema table"


SCHEMA = Patch[Shim](
    name="infer-schema-types",
    why="torch.library infers a schema from annotations through a table keyed by the class: 'Parameter has unsupported "
    "type <class device>'",
    upstream=UPSTREAM,
    until=UNTIL,
    seen_in=SEEN_IN,
    targets=(Target("torch._library.infer_schema", "SUPPORTED_PARAM_TYPES"),),
    probe=_probe_schema,
    decide=decide_on("the shim has registered itself with torch.library"),
    apply=_apply_schema,
)

# -- pickling --------------------------------------------------------------------------------------------------------

_TORCH_NAME = {"__module__": "torch", "__name__": "device", "__qualname__": "device"}


def _probe_pickle(_: str) -> Shim:
    current = torch.device
    return Shim(current, known=all(getattr(current, key, None) == name for key, name in _TORCH_NAME.items()))


def _apply_pickle(_device: str, shim: Shim, edits: Edits) -> str:
    for key, name in _TORCH_NAME.items():
        edits.set_attr(shim.current, key, name)
    return "devices pickle as `torch.device`, as they do without the shim"


PICKLE = Patch[Shim](
    name="portable-pickles",
    why="a device pickles as a reference to whatever torch.device is: under a shim, to the vendor's class, and the "
    "file does not load where that package is absent, nor with torch.load(weights_only=True)",
    upstream=UPSTREAM,
    until="vendors name their class torch.device themselves",
    seen_in=SEEN_IN,
    targets=(),
    probe=_probe_pickle,
    decide=decide_on("the shim calls itself torch.device"),
    apply=_apply_pickle,
)

PATCHES: tuple[Patch[Any], ...] = (FX, SCHEMA, PICKLE)
