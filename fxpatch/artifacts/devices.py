"""Where what is loaded shall live: the devices of a file, each mapped to one of this process.

A file names every device that occurs in it. All of them are decided on, and checked to be there, before anything is
made. The rules:

* Without `device=`, everything stays where it was.
* `device="npu"`: the accelerator of the file becomes this one, and keeps its index; `"npu:1"`: with this index;
  `"cpu"` and `"meta"` have none. A file with several accelerators is not folded into one by this: two devices that a
  graph tells apart must not become one silently. A mapping says it for each.
* `device={"musa:0": "npu:1", "musa:1": "cpu"}`; a key without an index stands for every index of that type.
* `unpin=True`: literals lose their index, and mean the device that is current when the graph runs (`torch.export`
  writes `musa:0` for what was the current device). Tensors go to the device that is current now.

What is in no accelerator (`cpu`, `meta`) stays, unless a mapping names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fxpatch.errors import ArtifactError, MissingHereError
from fxpatch.privateuse1 import private_name

Asked = Any  # None | str | torch.device | Mapping[str, str]
_HOST = ("cpu", "meta")


class Devices:
    """The devices of this process for those of a file.

    Args:
        held: every device the file names, e.g. `["cpu", "musa:0"]`.
        asked: `device=` of `load`.
        unpin: whether literals lose their index.

    Raises:
        ArtifactError: what is asked for cannot be told apart or makes no sense.
        MissingHereError: this process has not one of the devices.
    """

    def __init__(self, held: Iterable[str], asked: Asked = None, *, unpin: bool = False) -> None:
        self.unpin = unpin
        self._to: dict[str, torch.device] = {}
        pairs = {each: _parse(each) for each in held}
        told = _told(asked)
        _check_asked(told, pairs.values(), unpin)
        for kind in [None] if isinstance(told, Mapping) else {kind for kind, _ in pairs.values() if kind not in _HOST}:
            _check_one(kind, pairs.values(), told, unpin)
        accelerators = {pair for pair in pairs.values() if pair[0] not in _HOST}
        if told is not None and not isinstance(told, Mapping) and pairs and not accelerators:
            if told[0] != "cpu":
                raise ArtifactError(
                    "It is not said which device is to become another.",
                    seen=f"device={_name(told)!r}, for a file that holds only {', '.join(sorted(pairs))}",
                    expected="a file that holds an accelerator, or a mapping",
                    hint=f"pass device={{'cpu': {_name(told)!r}}}, if all of it is to go there",
                )
            told = None
        for name, pair in pairs.items():
            target = _target(pair, told)
            if unpin and target[0] not in _HOST:
                target = (target[0], None)
            self._to[name] = _here(target, name)

    @property
    def moved(self) -> bool:
        """Whether any device becomes another one."""
        return any(name != str(device) for name, device in self._to.items())

    def __call__(self, name: str) -> torch.device:
        """The device here for one of the file's, as a literal.

        Raises:
            ArtifactError: the file did not say that it holds this device.
        """
        if name not in self._to:
            raise ArtifactError(
                "This is no artifact that can be read.",
                seen=f"a device {name[:40]!r} that the manifest does not name",
                expected=f"one of {', '.join(sorted(self._to))}",
                hint="save it anew; nothing of it was used",
            )
        return self._to[name]

    @property
    def types_moved(self) -> set[str]:
        """The types of the file of which a device becomes one of another type."""
        return {_parse(name)[0] for name, device in self._to.items() if _parse(name)[0] != device.type}

    def now(self, name: str) -> torch.device:
        """The device here for one of the file's, as that of a tensor: with an index, where its type has any."""
        found = self(name)
        if found.index is not None or found.type in _HOST:
            return found
        return torch._C.device(found.type, torch.get_device_module(found.type).current_device())

    def type_of(self, kind: str) -> str:
        """What a type of the file's is called here: `"musa"` -> `"npu"`."""
        found = {device.type for name, device in self._to.items() if _parse(name)[0] == kind}
        return found.pop() if len(found) == 1 else kind


def names_in(device: torch.device) -> str:
    """How a file names a device: `str(device)`, under a replaced `torch.device` too."""
    return str(device)


def is_device_name(text: str) -> bool:
    """Whether a string is a device, as torch reads one here."""
    try:
        torch._C.device(text)
    except RuntimeError:
        return False
    return True


Pair = tuple[str, int | None]


def _parse(name: str) -> Pair:
    """`"musa:1"` -> `("musa", 1)`, for a device that this process need not know."""
    kind, colon, index = name.partition(":")
    if not kind.isidentifier() or len(name) > 60 or (colon and not (index.isascii() and index.isdigit())):
        raise ArtifactError(
            "This is no device.",
            seen=repr(name[:60]),
            expected="a device type, with or without an index: 'musa', 'musa:1'",
            hint="pass device='npu', device='cpu', or a mapping of such names",
        )
    return kind, int(index) if colon else None


def _name(pair: Pair) -> str:
    return pair[0] if pair[1] is None else f"{pair[0]}:{pair[1]}"


def _told(asked: Asked) -> Pair | Mapping[Pair, Pair] | None:
    if asked is None:
        return None
    if isinstance(asked, Mapping):
        return {_parse(str(key)): _parse(str(value)) for key, value in asked.items()}
    return _parse(str(asked))


def _check_asked(told: Any, pairs: Iterable[Pair], unpin: bool) -> None:
    """That nothing of what was asked for is passed over."""
    wanted = list(told.values()) if isinstance(told, Mapping) else [told] if told else []
    pinned = [_name(pair) for pair in wanted if pair[1] is not None and pair[0] not in _HOST]
    if unpin and pinned:
        raise ArtifactError(
            "A device cannot have an index and be un-pinned.",
            seen=f"unpin=True, and {pinned[0]!r} in device=",
            expected="device types without an index, or no unpin=",
            hint=f"pass device='{pinned[0].partition(':')[0]}' with unpin=True, or leave unpin out",
        )
    held = {*pairs}
    known = held | {(kind, None) for kind, _ in held}
    if isinstance(told, Mapping) and told and held and not known & {*told}:
        raise ArtifactError(
            "The mapping names no device of the file.",
            seen=", ".join(map(_name, told)),
            expected=f"one of {', '.join(sorted(map(_name, held)))} at least",
            hint="correct the keys of device=; they are the file's devices, the values are this process's",
        )


def _check_one(kind: str | None, pairs: Iterable[Pair], told: Any, unpin: bool) -> None:
    """That several indices do not silently become one."""
    every = {pair for pair in pairs if pair[0] not in _HOST and pair[1] is not None}
    types = {pair[0] for pair in pairs if pair[0] not in _HOST}
    folds = unpin or (isinstance(told, tuple) and (told[1] is not None or told[0] in _HOST))
    if (folds and len(every) > 1) or (isinstance(told, tuple) and len(types) > 1):
        names = sorted({_name(pair) for pair in pairs if pair[0] not in _HOST})
        raise ArtifactError(
            "Several devices would become one.",
            seen=f"a file that holds {', '.join(names)}, "
            + ("unpin=True" if unpin else f"and device={_name(told) if told else None!r}"),
            expected="one accelerator in the file, or a mapping that names each",
            hint=f"pass device={{{', '.join(f'{name!r}: ...' for name in names)}}}",
        )


def _target(pair: Pair, told: Any) -> Pair:
    if told is None or (isinstance(told, tuple) and pair[0] in _HOST):
        return pair
    if isinstance(told, Mapping):
        found = told.get(pair) or told.get((pair[0], None))
        if found is None:
            return pair
    else:
        found = told
    if found[0] in _HOST or found[1] is not None:
        return found if found[0] != "cpu" else ("cpu", None)
    return found[0], pair[1]


def _here(target: Pair, name: str) -> torch.device:
    """The device, if this process has it. Asks its module, and touches no memory of it."""
    kind, index = target
    try:
        device = torch._C.device(kind) if index is None else torch._C.device(kind, index)
    except RuntimeError as error:
        raise _missing(target, name, _why_unknown(kind)) from error
    if kind in _HOST:
        return device
    module = getattr(torch, kind, None)
    if module is None or not hasattr(module, "device_count"):
        raise _missing(target, name, f"torch knows the type {kind!r}, and there is no torch.{kind}")
    count = int(module.device_count())
    if count == 0 or (index is not None and index >= count):
        raise _missing(target, name, f"torch.{kind}.device_count() is {count}")
    return device


def _why_unknown(kind: str) -> str:
    name = private_name()
    return f"torch has no device type {kind!r}: PrivateUse1 " + (f"is called {name!r}" if name else "has no name")


def _missing(target: Pair, name: str, seen: str) -> MissingHereError:
    private = private_name()
    other = f"device={private!r} or " if private not in (None, target[0]) else ""
    here = is_device_name(target[0]) and getattr(torch, target[0], None) is not None
    first = f"pass device='{target[0]}:0'" if here else f"import the vendor's package first (torch_{target[0]})"
    moved = "" if _name(target) == name else f", which is to become {_name(target)}"
    return MissingHereError(
        "The artifact needs a device that this process has not.",
        seen=f"the file holds {name}{moved}; {seen}",
        expected="each device of the file, or another one for it",
        hint=f"{first}, or pass {other}device='cpu'",
    )
