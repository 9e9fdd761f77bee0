"""The first layer that compiled code gets wrong. Every module's results are observed, by forward hooks that are traced
with the model, so that one compilation shows all of them; a layer that finishes first and differs is the innermost one.

For the backward, zeros are added to what goes into each layer and to what comes out: the gradient by such zeros is the
gradient at that place. The layer to blame has the right gradient at its results and a wrong one at its arguments or
parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.difference import Difference, compare
from fxpatch.tolerance import Roundings, Tolerance
from fxpatch.verification.outcome import gradients
from fxpatch.verification.running import Bench, eagerly

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Places:
    """What the hooks of one run see: values by place, a module's name and how often it has been called, in the order
    in which they were reached; and the zeros that they add."""

    def __init__(self) -> None:
        self.seen: Any = None  # between runs too: a runner takes a function that leaves its objects as they were
        self.calls: Any = None
        self.zeros: dict[str, torch.Tensor] = {}


def first_wrong_forward(
    bench: Bench,
    compile_: Compile,
    tolerances: Mapping[torch.dtype, Tolerance],
    roundings: Roundings,
    *,
    training: bool,
) -> tuple[str, Difference] | None:
    """The first layer whose results differ, and how; None where all agree, or the model has no layers.

    Args:
        bench: of a module.
        compile_: makes of a function what is to be compared with it.
        tolerances, roundings: as of `tolerance.compare`.
        training: whether the graphs are training graphs.
    """
    with _hooked(bench.model) as places:
        if places is None:
            return None
        observed = _observed(bench.model, places)
        expected = _run(bench, eagerly(observed), training)
        seen = _run(bench, compile_(observed), training)
    for place, values in expected.items():
        difference = compare(seen.get(place), values, tolerances, strides=False, roundings=roundings)
        if difference is not None:
            return _layer(place), difference
    return None


def first_wrong_backward(
    bench: Bench, compile_: Compile, tolerances: Mapping[torch.dtype, Tolerance], roundings: Roundings
) -> tuple[str, Difference] | None:
    """The layer whose backward is wrong, and how its gradient differs; None where all agree.

    Args: as of `first_wrong_forward`.
    """
    with _hooked(bench.model) as places:
        if places is None:
            return None
        observed = _observed(bench.model, places)
        values = _run(bench, eagerly(observed), False)
        zeros = places.zeros = {
            place: torch.zeros_like(found[0]).requires_grad_()
            for place, found in values.items()
            if found[0].is_floating_point()
        }
        expected = _gradients(bench, eagerly(observed), zeros)
        seen = _gradients(bench, compile_(observed), zeros)
    wrong = {
        place: difference
        for place in expected
        if (difference := compare(seen.get(place), expected[place], tolerances, strides=False, roundings=roundings))
    }
    # behind the right gradient of its results, in the order of the backward; a layer inside of it comes before it
    for place in reversed([each for each in values if each.endswith(" out")]):
        inside = [each for each in wrong if each.startswith(place.removesuffix("out") + "in")]
        inside += [each for each in wrong if each.rpartition(".")[0] == _layer(place) and " " not in each]
        if place not in wrong and inside and not _deeper(_layer(place), place, values, wrong):
            return _layer(place), wrong[inside[0]]
    return None


def _deeper(layer: str, place: str, values: Mapping[str, Any], wrong: Mapping[str, Difference]) -> bool:
    """Whether a layer inside of this one has a right gradient at its results and a wrong one at its arguments."""
    for each in values:
        if each.endswith(" out") and each != place and _layer(each).startswith(f"{layer}." if layer else ""):
            inner = each.removesuffix("out") + "in"
            if each not in wrong and (inner in wrong or any(w.rpartition(".")[0] == _layer(each) for w in wrong)):
                return True
    return False


def _layer(place: str) -> str:
    return place.partition("#")[0]


def _observed(model: Callable[..., Any], places: _Places) -> Callable[..., Any]:
    def observed(*args: Any, **kwargs: Any) -> Any:
        places.seen, places.calls = {}, {}
        result = model(*args, **kwargs)
        seen = places.seen
        places.seen = places.calls = None
        return result, seen

    observed.__signature__ = inspect.signature(  # type: ignore[attr-defined]  # a runner binds calls to it
        model.forward if isinstance(model, nn.Module) else model
    )
    return observed


def _run(bench: Bench, function: Callable[..., Any], training: bool) -> dict[str, Any]:
    bench.restore()
    call = bench.example.call()
    with torch.set_grad_enabled(training):
        _, seen = function(*call.args, **call.kwargs)
    return pytree.tree_map_only(torch.Tensor, torch.clone, dict(seen))  # type: ignore[no-any-return]


def _gradients(bench: Bench, function: Callable[..., Any], zeros: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    bench.restore()
    call = bench.example.call()
    parameters = {name: each for name, each in bench.held.parameters.items() if each.requires_grad}
    with torch.enable_grad():
        result, _ = function(*call.args, **call.kwargs)
        return gradients(result, {**zeros, **parameters})


@contextmanager
def _hooked(model: Callable[..., Any]) -> Iterator[_Places | None]:
    """Hooks on all modules inside of a model, gone afterwards; None where there are no modules inside."""
    layers = [(name, module) for name, module in model.named_modules() if name] if isinstance(model, nn.Module) else []
    if not layers:
        yield None
        return
    places = _Places()
    handles: list[Any] = []
    try:
        for name, module in layers:
            before, after = _hooks(name, places)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _hooks(name: str, places: _Places) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def seen(kind: str, tensors: list[torch.Tensor]) -> str:
        place = f"{name}#{places.calls[name]} {kind}"
        places.seen[place] = [each.detach().clone() for each in tensors]
        return place

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places.calls[name] = places.calls.get(name, 0) + 1
        if args and isinstance(args[0], torch.Tensor):  # most layers; tracing a flatten takes longer
            place = seen("in", [args[0]])
            zero = places.zeros.get(place)
            return None if zero is None else ((args[0] + zero, *args[1:]), kwargs)
        return in_tree("in", (args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            zero = places.zeros.get(seen("out", [result]))
            return None if zero is None else result + zero
        return in_tree("out", result)

    def in_tree(kind: str, value: Any) -> Any:
        leaves, spec = pytree.tree_flatten(value)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        first = next((i for i in tensors if leaves[i].is_floating_point()), None)
        if first is None:
            return None
        zero = places.zeros.get(seen(kind, [leaves[first], *(leaves[i] for i in tensors if i != first)]))
        if zero is None:
            return None
        leaves[first] = leaves[first] + zero
        return pytree.tree_unflatten(leaves, spec)

    return before, after
