"""The private torch names that fake kernels need, in one place, checked before use.

Seen in torch 2.11, 2.13 and 2.15: `torch._library.simple_registry` (where fake kernels registered from Python are
kept), `torch._library.utils.can_generate_trivial_fake_impl`, `torch._C._dispatch_has_kernel_for_dispatch_key`, and
`torch.library.Library._destroy` (the only way to take a registration back at a certain time).
"""

from __future__ import annotations

from typing import Any

import torch

_DISPATCH_KEYS = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
_NAMES = (
    "_library.simple_registry.singleton.find",
    "_library.utils.can_generate_trivial_fake_impl",
    "_C._dispatch_has_kernel_for_dispatch_key",
    "library.Library._destroy",
)


def check_torch() -> None:
    """`RuntimeError` where this torch no longer has a name that is needed; before anything is changed."""
    for path in _NAMES:
        found: Any = torch
        for part in path.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise RuntimeError(
                f"torch {torch.__version__} has moved a private name that fake_kernels needs.\n"
                f"  seen: no torch.{path}\n"
                "  expected: it, as in torch 2.11 to 2.15\n  to do: use such a torch, or report this one"
            )


def how_traced(overload: Any) -> str | None:
    """Why an operator needs no fake kernel, in words; None if it needs one."""
    name = overload.name()
    kernel = torch._library.simple_registry.singleton.find(name).fake_impl.kernel
    if kernel is not None:
        return f"{name} has a fake kernel from {kernel.source}"
    for key in _DISPATCH_KEYS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            return f"{name} has a kernel for {key}"
    if torch._library.utils.can_generate_trivial_fake_impl(overload):
        return f"{name} returns nothing and declares what it mutates: torch makes its fake kernel"
    return None


def destroy(library: torch.library.Library) -> None:
    """Takes back everything registered through `library`."""
    library._destroy()
