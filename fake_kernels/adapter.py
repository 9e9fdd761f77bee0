"""The private torch names that fake kernels need, in one place, checked before use.

Seen in torch 2.11, 2.13 and 2.15: `torch._library.simple_registry` (where fake kernels registered from Python are
kept, the newest last, as `torch._library.utils.Kernel`s), `torch._library.utils.can_generate_trivial_fake_impl`,
`torch._C._dispatch_has_kernel_for_dispatch_key`, `torch._C._dispatch_get_all_op_names`,
`torch.library.Library._destroy` (the only way to take a registration back at a certain time), `torch.library._impls`
(which kernels were registered from Python), `FakeTensorMode.cache_clear`, `torch._C._AutoDispatchBelowAutograd`, and
`torch.fx.node._side_effectful_functions` (which `torch.fx.node.has_side_effect` adds to and nothing takes from).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from fake_kernels.kernel import split_name

_NAMES = (
    "_library.simple_registry.singleton.find",
    "_library.utils.can_generate_trivial_fake_impl",
    "_library.utils.Kernel",
    "_subclasses.fake_tensor.FakeTensorMode.cache_clear",
    "_C._dispatch_has_kernel_for_dispatch_key",
    "_C._dispatch_get_all_op_names",
    "_C._AutoDispatchBelowAutograd",
    "fx.node._side_effectful_functions.discard",
    "library._impls.add",
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


def overload_of(operator: str) -> Any:
    """The `OpOverload` of `"namespace::name[.overload]"`, or None where nothing has registered it."""
    namespace, name, overload = split_name(operator)
    packet = getattr(getattr(torch.ops, namespace), name, None)
    wanted = overload or "default"
    return getattr(packet, wanted) if packet is not None and wanted in packet.overloads() else None


def registered() -> set[str]:
    """The names of all operators of this process, overloads included. Asking for all takes 3 ms, and for one that is
    not there 0.2."""
    return set(torch._C._dispatch_get_all_op_names())


def has_kernel(overload: Any, key: str) -> bool:
    """Whether something is registered for the operator at a dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key))


def decomposes(overload: Any) -> bool:
    """Whether the operator is made of others before a fake kernel is asked for."""
    return has_kernel(overload, "CompositeImplicitAutograd")


def own_fake(overload: Any) -> str | None:
    """Which fake kernel the operator has from its vendor or from torch, in words."""
    name = overload.name()
    kernel = torch._library.simple_registry.singleton.find(name).fake_impl.kernel
    if kernel is not None:
        return f"{name} has a fake kernel from {kernel.source}"
    for key in ("Meta", "CompositeExplicitAutograd"):
        if has_kernel(overload, key):
            return f"{name} has a kernel for {key}"
    return None


def trivial_fake(overload: Any) -> bool:
    """Whether torch makes the fake kernel: the operator returns nothing and declares what it writes."""
    return bool(torch._library.utils.can_generate_trivial_fake_impl(overload))


def how_traced(overload: Any) -> str | None:
    """Why an operator can be traced without a fake kernel of ours, in words; None if it cannot."""
    if decomposes(overload):
        return f"{overload.name()} has a kernel for CompositeImplicitAutograd"
    if trivial_fake(overload):
        return f"{overload.name()} returns nothing and declares what it mutates: torch makes its fake kernel"
    return own_fake(overload)


def forget_results() -> None:
    """Drops what fake tensors remember of earlier calls: for operators of torch's own namespaces they keep results by
    the arguments, whatever the fake kernel was then."""
    torch._subclasses.fake_tensor.FakeTensorMode.cache_clear()


def put(overload: Any, fake: Callable[..., Any], source: str) -> Callable[[], None]:
    """Registers `fake` for an operator that has none; returns the way back. As `torch.library.register_fake`, without
    its search for the line that called it, which takes a millisecond."""
    library = torch.library.Library(overload.namespace, "FRAGMENT")
    holder = torch._library.simple_registry.singleton.find(overload.name()).fake_impl
    try:
        library._registration_handles.append(holder.register(fake, source, lib=library, allow_override=False))
    except BaseException:
        destroy(library)
        raise
    return lambda: destroy(library)


def put_over(overload: Any, fake: Callable[..., Any], source: str) -> Callable[[], None]:
    """Lets fake tensors take `fake` before the operator's own fake kernel; returns the way back.

    Not `register_fake(allow_override=True)`: that also replaces the operator's Meta kernel, and where this one is from
    Python, what C++ keeps of it (`python_registrations_` in torch/csrc/utils/python_dispatch.cpp) does not come back.
    """
    kernels = torch._library.simple_registry.singleton.find(overload.name()).fake_impl.kernels
    kernel = torch._library.utils.Kernel(fake, source)
    kernels.append(kernel)
    return lambda: kernels.remove(kernel)


def destroy(library: torch.library.Library) -> None:
    """Takes back everything registered through `library`."""
    library._destroy()


def is_from_python(overload: Any, key: str) -> bool:
    """Whether the operator's kernel for a dispatch key was registered from Python. One that has been overridden does
    not come back for fake tensors (`python_registrations_` in torch/csrc/utils/python_dispatch.cpp)."""
    namespace, _, name = overload.name().partition("::")
    return f"{namespace}/{name}/{key}" in torch.library._impls


def below_autograd() -> AbstractContextManager[Any]:
    """Calls in the block go past the autograd keys."""
    return torch._C._AutoDispatchBelowAutograd()


def side_effects() -> set[Any]:
    """What FX's dead-code elimination keeps although nobody uses its result."""
    return torch.fx.node._side_effectful_functions


def size_expression(size: Any) -> Any:
    """The expression behind a symbolic size (sympy), or the number."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
