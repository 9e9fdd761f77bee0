"""Fork. The problem: a real device that was used before a fork cannot be used in the child, and programs that try fail
on hardware; host memory survives a fork, so here they would pass. The rule: the child of a process that has used the
device gets the error that it gets on hardware, from every operator and from every question to the device module.

A child costs what exchanging the kernels costs, once; the parent, and operators in general, nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator import pinned
from fxpatch.simulator.memory import ledger
from fxpatch.simulator.untraced import untraced

_initialized = False
_bad = False
_libraries: list[torch.library.Library] = []  # a library's kernels go when it does


def guard(kernels: Callable[[], Iterable[torch.library.Library]]) -> None:
    """Watches for forks from now on; `kernels` names the libraries that hold the device's kernels."""

    def in_child() -> None:
        global _bad
        if not _bad and used():
            _bad = True
            _exchange(kernels())

    os.register_at_fork(after_in_child=untraced(in_child))


def used() -> bool:
    """Whether this process, or one it was forked from, has used the device."""
    return _initialized or ledger.used


def bad() -> bool:
    """Whether the device was used before this process was forked."""
    return _bad


def check() -> None:
    """Refuses the device in such a process, in a real device's words."""
    if _bad:
        name = private_type().upper()
        raise RuntimeError(
            f"Cannot re-initialize {name} in forked subprocess. To use {name} with multiprocessing, you must use the "
            "'spawn' start method"
        )


def initialize() -> None:
    """Uses the device without allocating."""
    global _initialized
    check()
    _initialized = True


def _exchange(kernels: Iterable[torch.library.Library]) -> None:
    for library in kernels:
        library._destroy()  # torch 2.11, 2.13, 2.15
    refusing = torch.library.Library("_", "IMPL")
    refusing.fallback(untraced(_refuse), "PrivateUse1")
    _libraries.extend((refusing, pinned.register()))


def _refuse(_op: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
    check()
    raise AssertionError("these kernels are in place only where check() raises")
