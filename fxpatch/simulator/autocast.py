"""Autocast as on CUDA. The problem: what is cast inside `torch.autocast(device)` is decided by kernels at the dispatch
key AutocastPrivateUse1, and torch gives a new device none. The rule: the policies and their lists are those of torch's
own header, so a program gets the dtypes here that it gets on CUDA.

Casts of weights are cached until the outermost autocast region ends, as C++ caches them: for float32 leaves that want a
gradient, and only in the lower precision. All threads share the cache, as they do there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator.autocast_lists import BANNED, FP32_APPEND_DTYPE, names
from fxpatch.simulator.untraced import untraced

_KEY = "AutocastPrivateUse1"
_KEYS = torch._C.DispatchKeySet(cast(torch._C.DispatchKey, torch._C._parse_dispatch_key(_KEY)))
_libraries: list[torch.library.Library] = []  # a library's kernels go when it does
# id of a weight -> the weight, and its cast. The weights may go; the casts are dropped where torch drops its own.
_cached: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}


def register() -> None:
    """Registers the policies, for the rest of the process."""
    others, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, _KEY)
    for policy in (lower_precision_fp, fp32, fp32_set_opt_dtype, promote):
        for name in names(policy.__name__):
            _register(own, name, policy, name)
    for name, with_dtype in FP32_APPEND_DTYPE.items():
        _register(own, name, fp32_append_dtype, with_dtype)
    _register(own, BANNED, banned, BANNED)
    _libraries.extend((others, own))
    _forget_casts_with_torch()


def _register(
    library: torch.library.Library,
    name: str,
    policy: Callable[[torch._ops.OpOverload], Callable[..., Any]],
    calls: str,
) -> None:
    packet, _, overload = calls.partition(".")
    op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    if op is not None:  # this torch has it
        library.impl(name, untraced(policy(op)), _KEY)


# -- the policies ------------------------------------------------------------------------------------------------------


def lower_precision_fp(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """All inputs in the region's dtype."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _beneath():
            return _call(op, args, kwargs, _lower_precision())

    return kernel


def fp32(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """All inputs in float32."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _beneath():
            return _call(op, args, kwargs, torch.float32)

    return kernel


def fp32_set_opt_dtype(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The operator computes in the dtype it is told: in float32, unless the caller says otherwise."""
    (place,) = (place for place, argument in enumerate(op._schema.arguments) if argument.name == "dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _beneath():
            said = args[place] if place < len(args) else kwargs.get("dtype")
            if said is None and _eligible(args[0]):
                return op(*args[:place], **{**kwargs, "dtype": torch.float32})
            return op(*args, **kwargs)

    return kernel


def fp32_append_dtype(with_dtype: torch._ops.OpOverload) -> Callable[..., Any]:
    """An overload that takes no dtype is exchanged for the one that does, with float32."""
    places = [argument.name for argument in with_dtype._schema.arguments if not argument.kwarg_only]
    defaults: dict[str, Any] = {"p": 2, "keepdim": False}  # of the overloads that take none

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _beneath():
            given = {**defaults, **dict(zip(places, args, strict=False)), **kwargs}
            dtype = torch.float32 if _eligible(args[0]) else args[0].dtype
            return with_dtype(*(given[name] for name in places), dtype=dtype)

    return kernel


def promote(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """All inputs in the widest of their dtypes, and at least in the region's."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _beneath():
            return _call(op, args, kwargs, _widest(args, _lower_precision()))

    return kernel


def banned(_op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Half precision cannot hold what this one computes."""

    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
            "Many models use a sigmoid layer right before the binary cross entropy layer.\n"
            "In this case, combine the two layers using torch.nn.functional.binary_cross_entropy_with_logits\n"
            "or torch.nn.BCEWithLogitsLoss.  binary_cross_entropy_with_logits and BCEWithLogits are\n"
            "safe to autocast."
        )

    return kernel


class _beneath(torch._C._ExcludeDispatchKeyGuard):
    """What a kernel calls is not cast a second time, and no function mode sees it: none would see what C++ calls."""

    def __init__(self) -> None:
        super().__init__(_KEYS)
        self._functions = torch._C.DisableTorchFunction()

    def __enter__(self) -> None:
        self._functions.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)


# -- casting -----------------------------------------------------------------------------------------------------------


def _call(op: torch._ops.OpOverload, args: Iterable[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    return op(*(_cast(x, dtype) for x in args), **{name: _cast(x, dtype) for name, x in kwargs.items()})


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, (list, tuple)):
        return [_cast(item, dtype) for item in x]
    if not _eligible(x) or x.dtype is dtype:
        return x
    return _cast_weight(x, dtype) if _is_weight(x, dtype) else x.to(dtype)


def _eligible(x: object) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.device.type == private_type()
        and x.is_floating_point()
        and x.dtype is not torch.float64
    )


def _lower_precision() -> torch.dtype:
    return torch.get_autocast_dtype(private_type())


def _widest(arguments: Iterable[Any], dtype: torch.dtype) -> torch.dtype:
    for x in arguments:
        if isinstance(x, (list, tuple)):
            dtype = _widest(x, dtype)
        elif _eligible(x):
            if torch.float32 in (dtype, x.dtype):
                dtype = torch.float32
            elif x.dtype is not dtype:
                raise RuntimeError(f"Unexpected floating ScalarType: {x.dtype} in an autocast region of {dtype}")
    return dtype


def _is_weight(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        torch.is_autocast_cache_enabled()
        and x.dtype is torch.float32
        and x.requires_grad
        and x.is_leaf
        and not x._is_view()
        and dtype is _lower_precision()
    )


def _cast_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # by weight alone, as in C++: a region of another dtype inside the outermost one gets the cast that is there
    known = _cached.get(id(weight))
    if known is not None and known[0]() is weight:
        return known[1]
    with torch.inference_mode(False), torch.enable_grad():  # a later use, in another mode, may want its gradient
        lower = weight.to(dtype)
    _cached[id(weight)] = weakref.ref(weight), lower
    return lower


def _forget_casts_with_torch() -> None:
    """torch ends the outermost region with `torch.clear_autocast_cache()`, which knows the cache of C++ only."""
    clear = torch.clear_autocast_cache

    def clear_autocast_cache() -> None:
        _cached.clear()
        clear()

    # Dynamo knows the function by this place, whichever object is there; torch 2.11, 2.13, 2.15
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(clear_autocast_cache, name, getattr(clear, name))
    owner: Any
    for owner in (torch, torch._C):
        owner.clear_autocast_cache = clear_autocast_cache
