"""An honest operator over one whose schema lies, and the way for all calls to go through it.

Some vendor operators write to arguments, or return them, and their schemas do not say so. Compiled code then deletes
the call, moves it, or reads the memory too early; nothing fails. No fake kernel can mend that: the schema is what
functionalization believes. Others say that they return what they write, which torch functionalizes for its own
operators and refuses for a vendor's. So the operator gets a shadow, `torch.ops.shadow.<namespace>__<name>_<device>`,
that declares what is written and returns only what is fresh, and whose kernel is the operator's own.

Calls are re-routed in the dispatcher, at the operator's autograd key on one device, so they need not be found: a packet
that somebody imported long ago, an overload, a vendor's wrapper in C++ all arrive there. (The rejected alternative,
putting another object into `torch.ops.<namespace>`, misses all three.) Rules:

- the shadow runs exactly as often as the operator would have: under `aot_eager` and Inductor as in eager;
- with an argument that needs a gradient it raises, since what is written in place by such a kernel has none;
- `remove()` takes both back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fake_kernels.adapter import (
    below_autograd,
    check_torch,
    destroy,
    has_kernel,
    is_from_python,
    overload_of,
    side_effects,
)
from fake_kernels.errors import NoDerivativeError, RegisteredTwiceError, UnknownOperatorError
from fake_kernels.honest import check_request, declared_aliases, honest_schema

NAMESPACE = "shadow"
_shadowed: dict[tuple[str, str], Shadow] = {}


class Shadow:
    """A re-routed operator, until `remove()`; also a context manager.

    Attributes:
        operator: the one whose schema lies.
        op: the honest one: an `OpOverload` that returns the fresh results only.
    """

    def __init__(self, operator: str, op: Any, libraries: Sequence[torch.library.Library], key: str) -> None:
        self.operator, self.op = operator, op
        self._libraries, self._key = tuple(libraries), key

    def remove(self) -> None:
        """The operator is called directly again. Calling this twice does nothing."""
        if _shadowed.get((self.operator, self._key)) is self:
            del _shadowed[self.operator, self._key]
            side_effects().discard(overload_of(self.operator))
            for library in self._libraries:
                destroy(library)

    def __enter__(self) -> Shadow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def shadow(
    operator: str,
    *,
    mutates_args: Sequence[str],
    returns_args: Mapping[int, str] | None = None,
    fake: Callable[..., Any] | None = None,
    device: str | None = None,
) -> Shadow:
    """Re-routes an operator through an honest one.

    Args:
        operator: `"namespace::name"` or `"namespace::name.overload"`; it has to be registered.
        mutates_args: the tensor arguments it writes to, besides those in its schema.
        returns_args: number of a result -> the argument that it is, besides those in its schema.
        fake: the operator's fake kernel, in its own arguments and with all its results; needed where there are
            results that are no arguments.
        device: device type of the calls to re-route; None for this process' PrivateUse1 device.

    Raises:
        OperatorNameError, UnknownOperatorError: no such operator is registered.
        SignatureError: it has no such tensor arguments or results, or `fake` is missing.
        SchemaError: its schema says what it writes, and it returns nothing of that.
        RegisteredTwiceError: it has a shadow, or an autograd kernel from Python, on this device.
    """
    check_torch()
    overload = overload_of(operator)
    if overload is None:
        raise UnknownOperatorError(
            f"{operator} cannot be shadowed.",
            seen="no such operator is registered",
            expected="an operator of this process",
            hint="import the library that brings it first",
        )
    declared_writes, declared_results = declared_aliases(overload._schema)
    mutates_args = [*dict.fromkeys((*mutates_args, *declared_writes))]
    returned = {**declared_results, **(returns_args or {})}
    check_request(overload, mutates_args, returned, fake)
    key = _autograd_key(device)
    name = overload.name()
    if (name, key) in _shadowed:
        raise RegisteredTwiceError(
            f"{name} cannot be shadowed.",
            seen=f"it has a shadow at {key}: {_shadowed[name, key].op._schema}",
            expected="an operator without",
            hint="remove() that one first",
        )
    if is_from_python(overload, key):
        raise RegisteredTwiceError(
            f"{name} cannot be shadowed.",
            seen=f"a kernel for {key} that was registered from Python, and would not come back",
            expected="an operator without, or with one from C++",
            hint="leave that kernel out, or have it call the shadow's `op`",
        )
    libraries = [torch.library.Library(NAMESPACE, "FRAGMENT"), torch.library.Library(overload.namespace, "IMPL")]
    try:
        op = _define(libraries[0], overload, key, mutates_args, returned, fake)
        with warnings.catch_warnings():  # a vendor's autograd kernel may be there; it comes back
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            libraries[1].impl(name, _router(overload, op, returned), key, allow_override=True)
    except BaseException:
        for library in libraries:
            destroy(library)
        raise
    side_effects().add(overload)  # a graph of FX's own that still has the operator must not lose it
    made = _shadowed[name, key] = Shadow(name, op, libraries, key)
    return made


def shadow_of(operator: str, device: str | None = None) -> Shadow | None:
    """The shadow that an operator has on a device, if any. Arguments as of `shadow`."""
    overload = overload_of(operator)
    return None if overload is None else _shadowed.get((overload.name(), _autograd_key(device)))


def differentiates(overload: Any, device: str | None = None) -> bool:
    """Whether the operator has an autograd kernel on a device, given as for `shadow`."""
    return has_kernel(overload, _autograd_key(device))


def _define(
    library: torch.library.Library,
    overload: Any,
    key: str,
    mutates_args: Sequence[str],
    returned: Mapping[int, str],
    fake: Callable[..., Any] | None,
) -> Any:
    name = re.sub(r"\W+", "__", f"{overload.name()}_{key.removeprefix('Autograd').lower()}")
    library.define(honest_schema(overload, name, mutates_args, returned))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [number for number, a in enumerate(overload._schema.arguments) if a.name in mutates_args]

    def kernel(*args: Any) -> Any:
        values = _bound(overload, args, {})
        with below_autograd():
            results = _call(overload, overload, values)
        tensors = [t for t in pytree.tree_leaves([values[i] for i in written]) if isinstance(t, torch.Tensor)]
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
        return _fresh(results, returned)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    if len(overload._schema.returns) > len(returned):
        assert fake is not None  # check_request
        whole = fake

        def fresh(*args: Any) -> Any:
            return _fresh(_call(overload, whole, _bound(overload, args, {})), returned)

        torch.library.register_fake(op.name(), fresh, lib=library)
    return op


def _router(overload: Any, op: Any, returned: Mapping[int, str]) -> Callable[..., Any]:
    places = [a.name for a in overload._schema.arguments]
    single = len(overload._schema.returns) == 1

    def route(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves((args, kwargs))
        ):
            raise NoDerivativeError(
                f"{overload.name()} has no derivative.",
                seen="an argument that requires grad, while gradients are enabled",
                expected="arguments that do not: the operator writes in place, unseen by autograd",
                hint="call it under torch.no_grad(), or use an operator that returns new tensors",
            )
        values = _bound(overload, args, kwargs)
        fresh = op(*values)
        rest = iter([] if fresh is None else [fresh] if isinstance(fresh, torch.Tensor) else fresh)
        if not overload._schema.returns:
            return None
        results = [
            values[places.index(returned[number])] if number in returned else next(rest)
            for number in range(len(overload._schema.returns))
        ]
        return results[0] if single else tuple(results)

    return route


def _bound(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """A value for every argument of the schema; what was left out is its default."""
    rest = [
        kwargs.get(a.name, a.default_value if a.has_default_value() else None)
        for a in overload._schema.arguments[len(args) :]
    ]
    return [*args, *rest]


def _call(overload: Any, function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """`function`, which takes arguments as `overload` does."""
    named = {a.name: value for a, value in zip(overload._schema.arguments, values, strict=True) if a.kwarg_only}
    return function(*values[: len(values) - len(named)], **named)


def _fresh(results: Any, returned: Mapping[int, str]) -> Any:
    if results is None or isinstance(results, torch.Tensor):
        return None if returned else results
    kept = [result for number, result in enumerate(results) if number not in returned]
    return None if not kept else kept[0] if len(kept) == 1 else tuple(kept)


def _autograd_key(device: str | None) -> str:
    name = device or torch._C._get_privateuse1_backend_name()
    if name == torch._C._get_privateuse1_backend_name():
        return "AutogradPrivateUse1"
    keys = {"cpu": "AutogradCPU", "cuda": "AutogradCUDA", "xpu": "AutogradXPU"}
    if name not in keys:
        raise UnknownOperatorError(
            f"Calls on {name!r} cannot be re-routed.",
            seen=repr(name),
            expected=f"{', '.join(keys)}, or this process' PrivateUse1 device",
            hint="give the device type of the tensors, such as 'musa'",
        )
    return keys[name]
