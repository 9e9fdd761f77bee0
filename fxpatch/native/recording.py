"""The real inputs of each operator, from one native run of the model. The problem: what an operator sees inside a
model (ranges, strides, shared memory, empty rows) is not what a random tensor of the same shape looks like. The rule:
an input is copied at the moment `forward` is called, hooks already run, also where the model calls `forward` itself;
of each instance the first calls are kept, and the model, its buffers and the caller's arguments are as before
afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.native.copies import Saved
from fxpatch.native.forwards import replaced
from fxpatch.native.operators import NativeOperator
from fxpatch.native.state import State

CALLS_KEPT = 4  # per instance and example: a shared instance is called once per layer, and a model can have many


@dataclass(frozen=True)
class Call:
    """One call of one operator: its arguments as `(args, kwargs)`, and the names of their leaves: `x`, `sizes[1]`."""

    saved: Saved
    names: tuple[str, ...]


def record(
    model: nn.Module, operators: Sequence[NativeOperator], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, list[Call]]:
    """Runs the model once, all operators native, and returns the calls of each operator, by its name."""
    calls: dict[str, list[Call]] = {op.name: [] for op in operators}

    def recorder(op: NativeOperator) -> Callable[..., Any]:
        forward, kept = op.native, calls[op.name]

        def recording(*args: Any, **kwargs: Any) -> Any:
            if len(kept) < CALLS_KEPT:
                kept.append(Call(Saved((args, kwargs)), names_of(forward, args, kwargs)))
            return forward(*args, **kwargs)

        return recording

    before = State(model)
    try:
        with replaced((op, recorder(op)) for op in operators):
            taken, given = Saved((args, dict(kwargs))).fresh().tree
            model(*taken, **given)
    finally:
        before.restore(keep_new=True)  # what native forwards create lazily, they create anyway
    return calls


def names_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """What the leaves of `(args, kwargs)` are called: by the function's parameters where it has names for them."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function without a signature: positions will do
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = []
    for path, _ in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]:
        _, at, *rest = path
        if isinstance(at, pytree.SequenceKey):
            name = positional[at.idx] if at.idx < len(positional) else f"args[{at.idx}]"
        else:
            assert isinstance(at, pytree.MappingKey)
            name = str(at.key)
        names.append(name + pytree.keystr(tuple(rest)))
    return tuple(names)
