"""Edits to objects we do not own, each remembered with what it replaced, so that all can be taken back exactly.

Undo runs last edit first and touches only what is still ours: where somebody has since put another value in the
same place, that value stays and `undo()` says so (restoring blindly would throw their patch away, and often ours is
still underneath theirs; a wrapper of ours therefore has to pass through once `active` is false).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, MutableSet
from typing import Any

_ABSENT = object()


class Edits:
    """A stack of undoable changes made by one patch. `active` is true until `undo()`."""

    def __init__(self) -> None:
        self.active = True
        self._undo: list[Callable[[], str | None]] = []

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        """`setattr(owner, name, value)`; an inherited or absent attribute is deleted again on undo."""
        before = _own(owner, name)

        def undo() -> str | None:
            now = _own(owner, name)
            if now is not value and not (type(now) is type(value) and now == value):
                return f"{_label(owner)}.{name} was changed by somebody else since: left as it is"
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
            return None

        setattr(owner, name, value)
        self._undo.append(undo)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Hashable, value: Any, label: str) -> None:
        """`mapping[key] = value`; a new key is deleted on undo, an old one keeps its place in the order."""
        before = mapping.get(key, _ABSENT)

        def undo() -> str | None:
            if mapping.get(key, _ABSENT) is not value:
                return f"{label}[{key!r}] was changed by somebody else since: left as it is"
            if before is _ABSENT:
                del mapping[key]
            else:
                mapping[key] = before
            return None

        mapping[key] = value
        self._undo.append(undo)

    def add(self, members: MutableSet[Any], element: Hashable) -> None:
        """Adds `element` to a set it may already be in; then undo leaves it there."""
        if element in members:
            return
        members.add(element)
        self._undo.append(lambda: members.discard(element))

    def on_undo(self, action: Callable[[], None]) -> None:
        """For what has its own way back (a `torch.library.Library`, a callback): run `action` on undo."""
        self._undo.append(action)

    def undo(self) -> list[str]:
        """Takes everything back, last edit first; returns what had to be left in place, in words.

        One failing step does not keep the others from being undone; the first failure is raised at the end.
        """
        self.active = False
        left: list[str] = []
        failure: Exception | None = None
        while self._undo:
            try:
                note = self._undo.pop()()
            except Exception as error:
                failure = failure or error
            else:
                if note:
                    left.append(note)
        if failure is not None:
            raise failure
        return left


def _own(owner: Any, name: str) -> Any:
    """The attribute as `owner` itself has it. What it merely inherits (from a base class, or a method of its class)
    counts as absent; what a descriptor or `__getattr__` answers for it (`__qualname__`, a config entry) does not."""
    own = getattr(owner, "__dict__", {})
    on_type = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), _ABSENT)
    if hasattr(type(on_type), "__set__"):
        return getattr(owner, name, _ABSENT)
    if name in own:
        return own[name]
    return _ABSENT if isinstance(owner, type) or on_type is not _ABSENT else getattr(owner, name, _ABSENT)


def _label(owner: Any) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__
