"""Layers that are alike, traced once. A model of 64 equal layers takes Dynamo 64 times as long as one, and that is most
of what preparing it takes.

torch knows such layers as nested compile regions: a region is traced at its first call, and a later call for which all
that the trace depended on holds as well (its guards, with the other layer in place of the first) takes over what was
traced. Which is for Dynamo to decide; layers that differ are traced each for itself. While a model is traced here, the
classes that occur in it again and again are marked as regions; the graph that comes out of it is the one that tracing
every layer gives, since regions are put back in line, each call with fake values of its own.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxpatch.piecewise.lint import unbacked, writes

AGAIN = 3  # a class that occurs as often is worth it
_MARKING = threading.Lock()
_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)


class RegionsError(Exception):
    """Regions cannot be put in line; the model is to be traced without."""


def classes_of(function: Callable[..., Any]) -> dict[type[torch.nn.Module], int]:
    """The classes of a model's layers and how often they occur: outermost ones, with modules inside, in three places.
    Containers of torch's are not layers."""
    if not isinstance(function, torch.nn.Module) or not _reuses() or _MARKING.locked():
        return {}
    counted = Counter(type(module) for module in function.modules())
    found: dict[type[torch.nn.Module], int] = {}

    def look(module: torch.nn.Module) -> None:
        for child in module.children():
            kind = type(child)
            again = (
                counted[kind] >= AGAIN
                and isinstance(inspect.getattr_static(kind, "forward", None), FunctionType)
                and not hasattr(kind.forward, "__marked_compile_region_fn__")
            )
            if again and kind not in _CONTAINERS and next(child.children(), None) is not None:
                found[kind] = counted[kind]
            else:
                look(child)

    look(function)
    return found


@contextmanager
def marked(classes: Mapping[type[torch.nn.Module], int]) -> Iterator[None]:
    """While these classes' `forward`s are regions. Eager calls do not notice, and a second thread marks nothing."""
    if not _MARKING.acquire(blocking=False):
        yield
        return
    own = {kind: kind.__dict__.get("forward") for kind in classes}
    forwards = {kind: kind.forward for kind in classes}
    try:
        for kind, forward in forwards.items():
            kind.forward = torch.compiler.nested_compile_region(forward, max_reuse_entries=sum(classes.values()) + 1)
        yield
    finally:
        for kind, forward in forwards.items():
            before = own[kind]
            if before is not None:
                kind.forward = before
            elif "forward" in vars(kind):
                del kind.forward
            for name in [name for name in vars(forward) if name.startswith("__marked_compile_region")]:
                delattr(forward, name)
        _MARKING.release()


def strict() -> AbstractContextManager[None]:
    """While Dynamo takes a region over, a model's own included, only where `alike` says so."""
    if not _reuses():
        return nullcontext()
    from fxpatch.piecewise.alike import strictly

    return strictly()


def in_line(gm: torch.fx.GraphModule) -> None:
    """Replaces every call of a region by what it does. From the first one on, values are known anew: the two layers'
    would be the same tensors otherwise, and seem to share memory.

    Raises:
        RegionsError: what it does there is not known well enough.
    """
    before: set[torch.fx.Node] = set()
    for node in gm.graph.nodes:
        if node.target is _INVOKE:
            break
        before.add(node)
    while calls := [node for node in gm.graph.nodes if node.target is _INVOKE]:
        for call in calls:
            _put(gm, call)
    if len(before) == len(gm.graph.nodes):
        return
    for node in gm.graph.nodes:
        if node not in before and node.op not in ("get_attr", "output"):
            _know_anew(node)
    for node in [*reversed(gm.graph.nodes)]:
        if node.op in ("call_function", "call_method") and _idle(node):
            gm.graph.erase_node(node)
    for name in [name for name, module in gm.named_children() if not _used(gm, name)]:
        delattr(gm, name)
    gm.graph.lint()
    gm.recompile()


def _put(gm: torch.fx.GraphModule, call: Any) -> None:
    """What a region does in the place of its call."""
    region = call.args[0]
    name = str(region.target)
    inner = _attribute(gm, name)
    operands = iter(call.args[2:])
    places: dict[Any, Any] = {}
    results: Any = ()
    with gm.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                places[node] = next(operands)
            elif node.op == "output":
                results = torch.fx.map_arg(node.args[0], places.__getitem__)
            else:
                places[node] = gm.graph.node_copy(node, places.__getitem__)
                if node.op == "get_attr":
                    places[node].target = f"{name}_{node.target}".replace(".", "_")
                    setattr(gm, places[node].target, _attribute(inner, str(node.target)))
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise RegionsError(f"{user.format_node()} takes the results of a region as one")
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not region.users:
        gm.graph.erase_node(region)


def _know_anew(node: Any) -> None:
    known = node.meta.get("example_value")
    if known is None and writes(node) and not node.users:
        return  # it only writes
    if node.op == "placeholder" or known is None:
        raise RegionsError(f"{node.format_node()} follows a region, and what it gives is not known")
    form = _form(known)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), _value)
    modes = [each.fake_mode for each in pytree.tree_leaves((args, kwargs, known)) if isinstance(each, FakeTensor)]
    with modes[0] if modes else nullcontext(), torch.no_grad():
        target = getattr(args[0], node.target) if node.op == "call_method" else node.target
        value = target(*args[node.op == "call_method" :], **kwargs)
    if _form(value) != form:
        raise RegionsError(f"{node.format_node()} is {_form(value)} here, and {form} where it was traced")
    node.meta["example_value"] = value


def _idle(node: Any) -> bool:
    """Whether it gives only sizes that nobody takes; Dynamo leaves none in a graph, and all in a region."""
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    numbers = (int, torch.SymInt, torch.SymBool, torch.SymFloat)
    return bool(leaves) and not node.users and all(isinstance(each, numbers) for each in leaves)


def _value(node: Any) -> Any:
    if node.op == "get_attr":
        raise RegionsError(f"{node.format_node()} is a constant of a region")
    return node.meta["example_value"]


def _form(value: Any) -> list[str]:
    """What the calls of a region have in common."""
    found = []
    for leaf in pytree.tree_leaves(value):
        sizes = (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else (leaf,)
        if any(map(unbacked, sizes)):
            raise RegionsError("a size in a region depends on data")
        kind = f"{leaf.dtype} {leaf.device} {leaf.dim()}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        found.append(f"{kind} {sizes}")
    return found


def _attribute(gm: torch.fx.GraphModule, path: str) -> Any:
    return operator.attrgetter(path)(gm)


def _used(gm: torch.fx.GraphModule, name: str) -> bool:
    return any(
        node.op in ("get_attr", "call_module") and str(node.target).split(".")[0] == name for node in gm.graph.nodes
    )


def _reuses() -> bool:
    """Whether this torch takes over what it has traced of a region, in the way that `alike` knows: 2.13 does. Before, a
    region was only compiled once."""
    region = getattr(torch.compiler, "nested_compile_region", None)
    if region is None or "max_reuse_entries" not in inspect.signature(region).parameters:
        return False
    from fxpatch.piecewise.alike import moved

    return not moved()


_INVOKE = torch.ops.higher_order.invoke_subgraph
