"""When what was traced of one layer may be taken over for another one: Dynamo's own answer, and what it leaves out.

Dynamo takes over a region where the guards of its first call hold with the other layer in place of the first. Of the
following it knows nothing, and the result would be that of another model: an argument that is passed twice, or is named
instead of counted; constants that are equal and not the same (0.0 and -0.0); attributes set between two calls; what is
one object in the first layer and two in the second, or is reached on another way than through the layer; globals of
torch. Nor does it guard the layers for which it took something over. All this is asked and done here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.variables import UserDefinedObjectVariable, invoke_subgraph
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting, VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import InvokeSubgraphCache
from torch.overrides import _get_current_function_mode_stack

SEEN_IN = ("2.13",)
_SIGNATURES = {
    "build_reuse_condition": ("tx", "fingerprint", "traced_sources"),
    "is_reusable": ("tx", "condition", "fingerprint", "cached_entry"),
}
_ITSELF = (type, torch.dtype, torch.device, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_CONSTANT = (int, float, complex, str, bytes, type(None), *_ITSELF)


@cache
def moved() -> str:
    """What of Dynamo's is not as it was in `SEEN_IN`; empty where all is: otherwise every layer is to be traced."""
    if not torch.__version__.startswith(SEEN_IN):
        return f"torch {torch.__version__} is none of {', '.join(SEEN_IN)}"
    for name, expected in _SIGNATURES.items():
        found = tuple(inspect.signature(getattr(invoke_subgraph, name)).parameters)
        if found != expected:
            return f"{name} takes {', '.join(found)}"
    return ""


@contextmanager
def strictly() -> Iterator[None]:
    """While Dynamo takes over what is alike in all that matters, and guards it."""
    condition, reusable = invoke_subgraph.build_reuse_condition, invoke_subgraph.is_reusable
    with ExitStack() as stack:
        stack.enter_context(patch.object(invoke_subgraph, "build_reuse_condition", partial(_condition, condition)))
        stack.enter_context(patch.object(invoke_subgraph, "is_reusable", partial(_reusable, reusable)))
        # two graphs count as one there where their constants are equal; they are put in line, so that nothing is lost
        stack.enter_context(patch.object(InvokeSubgraphCache, "get_dynamo_installed_submodules", lambda *args: []))
        yield


def _condition(original: Callable[..., Any], tx: Any, call: Any, traced: Any) -> Any:
    """What another call has to fulfil; None where none can."""
    pending = _pending(tx)
    if pending is None or not _plain(call):
        return None
    layer = call.arg_sources[0]
    if _pending_in(pending, layer):
        return None
    guarded = [each for each in tx.output.guards.source_to_guards if _within(each, layer)]  # some it had read before
    sources = type(traced)([*traced, *guarded])
    try:
        condition = original(tx, call, sources)
    except RuntimeError:  # a guard that cannot be asked of another layer
        return None
    if condition is not None:
        condition.arguments, condition.surroundings = [*_arguments(call)], _surroundings()
        condition.pending = pending
        condition.all_guards = [guard for each in sources for guard in tx.output.guards.get_guards_for_source(each)]
    return condition


def _reusable(original: Callable[..., bool], tx: Any, condition: Any, call: Any, entry: Any) -> bool:
    pending = _pending(tx)
    if pending is None or not _plain(call) or call.treespec != condition.treespec:
        return False
    if len(pending) != len(condition.pending) or not all(map(operator.is_, pending, condition.pending)):
        return False
    if _pending_in(pending, call.arg_sources[0]):
        return False
    if condition.surroundings != _surroundings() or condition.arguments != [*_arguments(call)]:
        return False
    if not original(tx, condition, call, entry):
        return False
    layer, other = entry.arg_sources[0], call.arg_sources[0]
    if layer != other:
        move = partial(_moved, layer, other, dict[int, Any]())
        if not _alike(tx, condition, layer, move):
            return False
        _guard(tx, condition, move)
    return True


def _plain(call: Any) -> bool:
    """Whether a call passes a module, and besides no tensor twice."""
    nodes = [each.as_proxy().node for tag, each in call.flat_vts if tag.name in ("TENSOR", "SYMNODE")]
    return bool(call.arg_sources) and call.arg_sources[0] is not None and len(set(nodes)) == len(nodes)


def _arguments(call: Any) -> Iterator[Any]:
    """What has to be the same of the arguments besides the layer. Sizes as they are spelled: to compare them would tell
    Dynamo something about n."""
    for (tag, each), source in zip(call.flat_vts[1:], call.arg_sources[1:], strict=True):
        if tag.name == "CONSTANT":
            yield type(each.value), repr(each.value), source
        elif tag.name == "TENSOR":
            known = each.as_proxy().node.meta.get("example_value")
            sizes = [] if known is None else [*known.shape, "by", *known.stride(), "from", known.storage_offset()]
            yield type(known), " ".join(map(str, sizes)), source
        else:
            yield tag.name, source


def _pending(tx: Any) -> list[Any] | None:
    """What was there before the call and has been changed, with all that it now leads to. Reads of that have no guard:
    it has to be the same for both layers. None: that cannot be told."""
    found: list[Any] = []
    effects = tx.output.side_effects

    def note(each: Any) -> None:
        items = vars(each).get("items")
        found.extend([each, *(items if isinstance(items, (list, dict)) else ())])  # `visit` sees no value twice
        found.extend(items.values() if isinstance(items, dict) else ())

    for each in effects._get_modified_vars():
        if isinstance(each.mutation_type, (AttributeMutationExisting, ValueMutationExisting)):
            for now in (each, *effects.store_attr_mutations.get(each, {}).values()):
                VariableTracker.visit(note, now)
                found.append(None)
    made = (each for each in found if isinstance(each, UserDefinedObjectVariable) and each.source is None)
    return None if any(made) else found


def _pending_in(pending: list[Any], layer: Any) -> bool:
    return any(_within(getattr(each, "source", None), layer) for each in pending)


def _surroundings() -> tuple[Any, ...]:
    modes = tuple(map(id, _get_current_function_mode_stack()))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), modes


def _alike(tx: Any, condition: Any, layer: Any, move: Callable[[Any], Any]) -> bool:
    """Whether all that was read has its counterpart, one for each, and is what the graph takes for it."""
    effects, found = tx.output.side_effects, dict[Any, Any]()
    values = partial(_value, _scope(tx), found)
    there, back = dict[int, int](), dict[int, int]()
    common: list[Any] = []
    for source in (layer, *condition.traced_sources):
        try:
            old, new = values(source), values(move(source))
        except (AttributeError, IndexError, KeyError, TypeError):  # it has no such thing
            return False
        if type(old) is not type(new):
            return False
        if isinstance(old, _CONSTANT):
            if not isinstance(old, _ITSELF) and repr(old) != repr(new):
                return False
            continue
        if there.setdefault(id(old), id(new)) != id(new) or back.setdefault(id(new), id(old)) != id(old):
            return False
        known = getattr(effects[old], "source", None) if old in effects else None
        if known is not None and values(move(known)) is not new:
            return False
        if old is new:
            common.append(old)
    own = {each for each in there if there[each] != each}
    return not own & _reached(common).keys()  # a way around the layer


def _guard(tx: Any, condition: Any, move: Callable[[Any], Any]) -> None:
    """Guards what is taken over, as tracing it would have."""
    scope, found = _scope(tx), dict[Any, Any]()
    for guard in condition.all_guards:
        source = move(guard.originating_source)
        if source == guard.originating_source:
            continue
        value = _value(scope, found, source)
        if isinstance(value, torch.Tensor):
            VariableBuilder(tx, source)(value)  # these are guarded together
        elif guard.create_fn_name() == "DUPLICATE_INPUT":
            twin = move(guard.create_fn.keywords["source_b"])
            install_guard(source.make_guard(partial(GuardBuilder.DUPLICATE_INPUT, source_b=twin)))
        else:
            install_guard(source.make_guard(guard.create_fn))


def _scope(tx: Any) -> dict[str, Any]:
    return {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}


def _moved(layer: Any, other: Any, done: dict[int, Any], source: Any) -> Any:
    """The source with the other layer in place of the first. `done`: of sources that live as long as this."""
    if id(source) not in done:
        done[id(source)] = source.clone(lambda each: other if each == layer else each)
    return done[id(source)]


def _within(source: Any, layer: Any) -> bool:
    while source is not None and source != layer:
        source = getattr(source, "base", None)
    return source is not None


def _value(scope: Any, found: dict[Any, Any], source: Any) -> Any:
    return source.get_value(scope, {}, found)


def _reached(start: Any) -> dict[int, Any]:
    """All objects that an object leads to, by their ids."""
    found: dict[int, Any] = {}
    ahead = [start]
    while ahead:
        each = ahead.pop()
        if isinstance(each, _CONSTANT) or id(each) in found:
            continue
        found[id(each)] = each
        if isinstance(each, dict):
            ahead += each.values()
        elif isinstance(each, (list, tuple, set, frozenset)):
            ahead += each
        elif not isinstance(each, torch.Tensor):
            ahead += getattr(each, "__dict__", {}).values()
    return found
