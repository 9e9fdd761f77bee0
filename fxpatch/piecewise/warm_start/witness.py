"""What a trace depends on, so that another process can tell whether it would trace the same.

A trace is right for the code it went through and the values it took for constants. Dynamo knows both: the code objects
it inlined, and a guard for every value it looked at. Both are written down, and compared before anything that was saved
is used: code by its bytecode (`codes`), values by place (`places`) and by what the guard asks of them. So a changed
helper function, a changed global, another flag of a config object are all seen.

How complete this is: what Dynamo guards, and in addition the environment variables that are named in the code, the
schemas and Python fake kernels of the operators in the graph, and what `request` puts into the key. Not seen: the code
of an operator that is registered as composite, as a meta kernel or in C++, which tracing or Inductor looks through
without a trace in Python; values that are read by functions which Dynamo takes for constants without a guard
(`torch.compiler.assume_constant_result`); decompositions that were added to torch's tables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch

from fxpatch.piecewise.warm_start import codes
from fxpatch.piecewise.warm_start.fingerprints import of_function, of_value, plain
from fxpatch.piecewise.warm_start.graph_json import Json, NotCacheableError
from fxpatch.piecewise.warm_start.places import Globals, Missing, Places

_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]{2,}")
_TORCH_NAMESPACES = {"aten", "prims", "prim", "c10d", "_c10d_functional"}


@dataclass
class Watch:
    """What Dynamo says while it traces.

    Attributes:
        guards: for every value it looked at.
        code: of every function it went through.
        operators: qualified names, of the graph.
    """

    guards: Collection[Any] = ()
    code: list[CodeType] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)

    def look(self, gm: torch.fx.GraphModule) -> None:
        """To be called by a backend, from within the trace. Both collections go on growing until it is done."""
        context = torch._guards.TracingContext.get()
        self.guards = context.guards_context.dynamo_guards.inner
        self.code = context.traced_code
        for node in gm.graph.nodes:
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target.namespace not in _TORCH_NAMESPACES:
                self.operators.add(target.name())
            elif isinstance(target, torch._ops.OpOverloadPacket):
                each = [getattr(target, name) for name in target.overloads()]
                self.operators.update(op.name() for op in each if op.namespace not in _TORCH_NAMESPACES)


def written(watch: Watch, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Json:
    """What a trace depended on, as plain data.

    Raises:
        NotCacheableError: something of it cannot be looked up by another process.
    """
    places, facts = Places(), {}
    callers = {id(each) for each in torch.utils._pytree.tree_leaves((args, dict(kwargs)))}
    for guard in watch.guards:
        if not guard.name:
            continue  # global state: part of the key
        detail = _detail(guard)
        other = places.add(guard.create_fn.keywords["source_b"].name) if "source_b" in detail else -1
        facts[places.add(guard.name), guard.create_fn_name(), detail, other] = ""
    values = _Found(places.walk(_names(function, args, kwargs)))
    found: list[Json] = []
    known: list[CodeType] = []
    for place, kind, detail, other in sorted(facts):
        value = values[place]
        if isinstance(value, Missing):
            raise NotCacheableError(f"the trace depends on {_spelled(places, place)}, which is not found: {value.why}")
        if isinstance(value, torch.Tensor) and id(value) in callers:
            continue  # the form of the caller's tensors is part of the key
        if kind not in _FACTS or (kind in _BY_VALUE and plain(list(value) if kind in _KEYS else value) is None):
            raise NotCacheableError(
                f"the trace depends on {_spelled(places, place)}, a {type(value).__name__} ({kind}), whose value "
                "cannot be compared in another process"
            )
        found.append([place, kind, detail, other, _fact(kind, detail, value, values[other], values)])
        if kind in ("CLOSURE_MATCH", "FUNCTION_MATCH"):
            known += [value.__code__] if isinstance(value, FunctionType) else []
    return {
        "places": places.steps,
        "facts": found,
        "code": codes.written(watch.code, known),
        "environment": {name: os.environ.get(name) for name in sorted(_named(watch.code))},
        "operators": {name: _operator(name) for name in sorted(watch.operators)},
    }


def difference(
    record: Json, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """What is another one in this process than when a trace was written, in words; None where it would be the same."""
    for each in record["code"]:
        changed = codes.difference(each)
        if changed is not None:
            return changed
    for name, value in record["environment"].items():
        if os.environ.get(name) != value:
            return f"the environment variable {name} is {os.environ.get(name)!r}, and was {value!r}"
    for name, value in record["operators"].items():
        if _operator(name) != value:
            return f"the operator {name} or its fake kernel has changed"
    places = Places(record["places"])
    values = _Found(places.walk(_names(function, args, kwargs)))
    for place, kind, detail, other, wanted in record["facts"]:
        value = values[place]
        found = value.why if isinstance(value, Missing) else _fact(kind, detail, value, values[other], values)
        if found != wanted:
            return f"{_spelled(places, place)} is {found[:80]}, and was {wanted[:80]}"
    return None


def _names(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What Dynamo's expressions begin with: the locals and globals of the frame that is traced."""
    local = {"args": tuple(args), "kwargs": dict(kwargs)}  # of `traced` in `trace._fresh`
    return {"L": local, "G": Globals({"function": function}), "torch": torch}


def _detail(guard: Any) -> str:
    """What a guard asks besides: the name of the attribute, the key."""
    keywords = getattr(guard.create_fn, "keywords", {})
    return " ".join(f"{name}={'' if name == 'source_b' else plain(value)}" for name, value in keywords.items())


_KEYS = {"DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"}
_BY_VALUE = {"CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "DICT_VERSION", *_KEYS}
_BY_IDENTITY = {
    *("ID_MATCH", "NN_MODULE", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH")
}
_CONTAINS = {"DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"}
_OTHERS = {"TYPE_MATCH", "NOT_NONE_MATCH", "SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT", "TENSOR_MATCH", "HASATTR"}
_FACTS = _BY_VALUE | _BY_IDENTITY | _CONTAINS | _OTHERS | {"NOT_PRESENT_IN_GENERIC_DICT", "DUPLICATE_INPUT"}


class _Found(list[Any]):
    """The values at all places; `first[id(value)]` is the first place of each."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__(values)
        self.first = {id(each): at for at, each in reversed(list(enumerate(values)))}


def _fact(kind: str, detail: str, value: Any, other: Any, values: _Found) -> str:
    """What is compared of a value: what its guard asks, or more."""
    if kind == "DUPLICATE_INPUT":
        return f"is the other: {value is other}"
    if kind in ("NOT_PRESENT_IN_GENERIC_DICT", "HASATTR"):
        name = detail.partition("attr=str ")[2].strip("'")
        there = hasattr(value, name) if kind == "HASATTR" else name in getattr(value, "__dict__", {})
        return f"{type(value).__qualname__} {there}"
    if kind in _CONTAINS:
        wanted = detail.partition("key=")[2].partition(" invert=")[0]
        return f"{wanted in {plain(each) for each in value}}"
    if kind in ("TYPE_MATCH", "NOT_NONE_MATCH"):
        return f"{type(value).__module__}.{type(value).__qualname__}{_which(value, values)}"
    if kind in ("SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"):
        return f"{type(value).__qualname__} of {len(value)}"
    if kind in _KEYS:
        return f"{type(value).__qualname__} {[of_value(each) for each in value]}"
    return of_value(value) + (_which(value, values) if kind in _BY_IDENTITY else "")


def _which(value: Any, values: _Found) -> str:
    """Where an object that is nothing but itself was found first: one of two `object()`s is that which a global names,
    or is not. Dynamo guards the type of such an object only, and traces `is` with the one that it sees."""
    return "" if plain(value) is not None else f", the one at {values.first[id(value)]}"


def _spelled(places: Places, place: int) -> str:
    step = places.steps[place]
    if step[0] == "attribute":
        return f"{_spelled(places, step[1])}.{step[2]}"
    if step[0] == "item":
        return f"{_spelled(places, step[1])}[{_spelled(places, step[2])}]"
    if step[0] == "ask":
        return f"{step[1]}({', '.join(_spelled(places, each) for each in step[2])})"
    return repr(step[1]) if step[0] == "constant" else str(step[1])


def _named(code: Sequence[CodeType]) -> set[str]:
    """Strings in the code that may name environment variables."""
    return {
        each
        for part in code
        if not codes.has_a_version(part)
        for each in part.co_consts
        if isinstance(each, str) and _ENVIRONMENT.fullmatch(each)
    }


def _operator(name: str) -> str:
    """An operator's schema and its fake kernel, where that is Python's."""
    from torch._library.simple_registry import singleton

    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, space), packet, None), overload or "default", None)
    if found is None:
        return "not registered"
    entry = singleton.get(f"{space}::{packet}") or singleton.get(name)
    kernel = entry.fake_impl.kernel if entry is not None else None
    return f"{found._schema} {of_function(_given(kernel.func)) if kernel is not None else ''}"


def _given(fake: Callable[..., Any]) -> Callable[..., Any]:
    """What `register_fake` was given: torch puts it behind a check that changes its own state when it is first run."""
    cells = dict(zip(fake.__code__.co_freevars, fake.__closure__ or (), strict=True))
    return cells["func"].cell_contents if "_check_pystubs_once" in fake.__qualname__ and "func" in cells else fake
