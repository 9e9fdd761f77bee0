"""Registers a fake kernel only where its operator exists and needs one.

`torch.compile` stops at an operator without a fake kernel. Three ways of registering one make things worse, silently,
and are refused here: for an operator that does not exist (nothing happens, and nobody is told), over a vendor's own
(torch 2.13 replaces it by default), and for an operator that returns nothing and declares no mutation (torch refuses to
invent a fake for it on purpose, because its only possible effect is hidden: with a fake, the call is dead code and is
deleted). The outcome says which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fake_kernels.adapter import check_torch, destroy, how_traced


@dataclass(frozen=True)
class Registered:
    """The fake kernel is in place until `unregister` is given this."""

    operator: str
    library: torch.library.Library


@dataclass(frozen=True)
class AlreadyHad:
    """The operator has a fake kernel, or decomposes into operators that do; it was left alone."""

    operator: str
    reason: str


@dataclass(frozen=True)
class Absent:
    """No such operator is registered: the library that brings it has not been imported."""

    operator: str
    reason: str


@dataclass(frozen=True)
class RefusedHidden:
    """The operator hides a mutation: a fake kernel would make compiled code drop the call."""

    operator: str
    reason: str


_libraries: list[torch.library.Library] = []  # a library that is dropped takes its registrations with it

Outcome = Registered | AlreadyHad | Absent | RefusedHidden


def register_fake_if_exists(operator: str) -> Callable[[Callable[..., Any]], Outcome]:
    """Decorator: registers the function as the fake kernel of `operator` where that is right; gives back the outcome.

        @register_fake_if_exists("aten::_fused_swiglu_forward")
        def outcome(input):
            return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))

    Args:
        operator: `"namespace::name"`, or `"namespace::name.overload"`.

    Raises:
        ValueError: `operator` is not of that form.
    """
    overload = _find(operator)
    check_torch()

    def register(fake: Callable[..., Any]) -> Outcome:
        if overload is None:
            return Absent(operator, "not registered: import the library that brings it first, then register again")
        if _hides_a_mutation(overload):
            return RefusedHidden(
                operator,
                f"{overload._schema} returns nothing and declares no mutation, so whatever it does is hidden: with a "
                "fake kernel compiled code would drop the call. Declare what it mutates in its schema",
            )
        had = how_traced(overload)
        if had is not None:
            return AlreadyHad(operator, had)
        library = torch.library.Library(overload.namespace, "FRAGMENT")
        torch.library.register_fake(overload.name(), fake, lib=library, allow_override=False)
        _libraries.append(library)
        return Registered(operator, library)

    return register


def unregister(outcome: Registered) -> None:
    """Takes a fake kernel back; the operator is as it was. Calling it again does nothing."""
    if outcome.library in _libraries:
        _libraries.remove(outcome.library)
        destroy(outcome.library)


def _find(operator: str) -> Any:
    namespace, colons, name = operator.partition("::")
    name, _, overload = name.partition(".")
    if not (colons and namespace.isidentifier() and name.isidentifier()):
        raise ValueError(
            f"no operator can be called {operator!r}\n  expected: 'namespace::name' or 'namespace::name.overload'\n"
            "  to do: write it as torch.ops.namespace.name._schemas does"
        )
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return None
    wanted = overload or "default"
    return getattr(packet, wanted) if wanted in packet.overloads() else None


def _hides_a_mutation(overload: Any) -> bool:
    return not overload._schema.returns and not overload._schema.is_mutable
