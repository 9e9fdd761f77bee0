"""Knowing when a module has been imported to its end, without importing it.

`sys.modules` holds a module from the beginning of its import; patching one that is half executed is patching what will
be overwritten. Post-import hooks are wrapt's, because an import system has more corners than it is worth owning. At the
time a hook runs, the module's spec still says that it is being initialized; hence `_finished`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import wrapt

_finished: set[str] = set()


def imported(module: str) -> bool:
    """Whether `module` has been executed to its end in this process."""
    return module in sys.modules and not under_way(module)


def under_way(module: str) -> bool:
    """Whether the import of `module` has begun and not ended."""
    if module in _finished:
        return False
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Runs `action` at the end of the import of `module`; at once where that has passed. A hook cannot be taken back,
    so `action` must check whether it is still wanted. What it raises, the import statement raises."""
    if under_way(module):
        _at_the_end(sys.modules[module].__spec__, action)
        return

    def arrived(_: object) -> None:
        _finished.add(module)
        action()

    wrapt.register_post_import_hook(arrived, module)


def _at_the_end(spec: Any, action: Callable[[], None]) -> None:
    """For an import that has begun: a hook comes too late, but importlib says on the spec when it is done, and removes
    the module first if it failed (`importlib._bootstrap._load_unlocked`)."""
    plain = type(spec)

    class Told(plain):  # type: ignore[misc,valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "_initializing" and not value:
                self.__class__ = plain
                if self.name in sys.modules:
                    action()

    spec.__class__ = Told
