"""One trace of a model for all sizes: an FX graph without guards, and how its inputs and outputs hang together.

Dynamo traces once, with the sizes of the dynamic dimensions as one symbol. What its graph takes are the caller's
tensors, that symbol, and everything else the model reaches: parameters, buffers, closures. The last are bound here,
once; on the replay path nobody asks for them again, and no guard is evaluated. What a caller passes besides tensors is
a constant of the graph, which `arguments` compares on every call.

What the model returns is told from its graph (`outputs`): for that it runs once, through Dynamo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import FxPatchError, TraceError
from fxpatch.piecewise.arguments import Arguments
from fxpatch.piecewise.buckets import LEAST
from fxpatch.piecewise.of_n import of_n
from fxpatch.piecewise.outputs import Finder, Output, flat, result_nodes, sentinel, sizes_of, with_another_n
from fxpatch.piecewise.regions import classes_of, in_line, marked, strict
from fxpatch.piecewise.side_effects import lasting
from fxpatch.piecewise.subclasses import refuse_subclasses


@dataclass
class Traced:
    """A graph and its surroundings.

    Attributes:
        gm: what Dynamo made.
        arguments: what a call takes: the caller's tensors and constants.
        feed: for each placeholder of `gm`: an `Input`, a function of n, or the bound tensor.
        outputs: the leaves of what the model returns, which `spec` puts together.
        results: how many results the graph has.
        names: the bound tensors that are the model's parameters and buffers, by their names there.
        regions: whether equal layers were traced once.
        returned: the leaves of what the model returned for the example when it ran through this graph.
    """

    gm: torch.fx.GraphModule
    arguments: Arguments
    feed: list[Any]
    outputs: list[Output]
    spec: pytree.TreeSpec
    results: int
    names: dict[str, torch.Tensor]
    regions: bool = False
    returned: list[Any] = field(default_factory=list)

    @property
    def bound(self) -> list[torch.Tensor]:
        """The tensors that the graph reads and no caller passes: parameters, buffers, closures."""
        return [value for value in self.feed if isinstance(value, torch.Tensor)]


def trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Mapping[str, Any],
    largest: int,
    before: Callable[[Sequence[torch.Tensor]], None] = lambda bound: None,
    look: Callable[[torch.fx.GraphModule], None] = lambda gm: None,
    *,
    regions: bool = True,
) -> Traced:
    """Traces `function` once.

    Args:
        function: a module or function.
        args, kwargs: an example call, with at least two elements in each dynamic dimension.
        dynamic: parameter name -> its dynamic dimension, or several; all of one size, n.
        largest: no n is above it.
        before: called with all tensors that the graph takes, before the model runs.
        look: called with the graph, from within the trace.
        regions: whether equal layers may be traced once (`regions`).

    Raises:
        TraceError: Dynamo cannot trace it whole, or what it returns cannot be told from its graph.
        InputError: `dynamic` does not fit the example.
    """
    ran = False

    def started() -> None:
        nonlocal ran
        ran = True

    with _ONE_AT_A_TIME:  # classes, Dynamo's settings and its rules are this process's
        classes = classes_of(function) if regions else {}
        if classes:
            try:
                with marked(classes):
                    traced = _trace(function, args, kwargs, dynamic, largest, before, look, started)
                    return replace(traced, regions=True)
            except FxPatchError:
                if ran:
                    raise
        return _trace(function, args, kwargs, dynamic, largest, before, look, started)


_ONE_AT_A_TIME = threading.RLock()


def _trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Mapping[str, Any],
    largest: int,
    before: Callable[[Sequence[torch.Tensor]], None],
    look: Callable[[torch.fx.GraphModule], None],
    started: Callable[[], None],
) -> Traced:
    arguments = Arguments.of(function, args, kwargs, dynamic)
    leaves = arguments.leaves(args, kwargs)
    grabbed: list[tuple[torch.fx.GraphModule, list[Any]]] = []
    results: list[Any] = []
    listeners = [(before, look)]

    def grab(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        if grabbed:
            raise RuntimeError("the model was traced twice")
        changed = lasting()
        if changed:
            raise RuntimeError(f"it changes what is no tensor: {', '.join(changed)}")
        refuse_subclasses(gm, examples)
        in_line(gm)
        grabbed.append((gm, examples))
        for before_run, look_at in listeners:
            look_at(gm)
            before_run([each for each in examples if isinstance(each, torch.Tensor)])

        def run(*inputs: Any) -> Any:
            started()
            if not results:  # otherwise it is called for another n, to see what the code around it returns
                graph = grabbed[0][0]
                values = zip(result_nodes(graph), _Interpreter(graph).run(*inputs), strict=True)
                results.extend(sentinel(number, node, value) for number, (node, value) in enumerate(values))
            return list(results)

        return run

    try:
        with (
            _marked(arguments, leaves, largest),
            torch._dynamo.config.patch(**_SETTINGS),
            torch.no_grad(),
            strict(),
            _fresh(function) as fresh,
        ):
            try:
                compiled = torch.compile(fresh, backend=grab, fullgraph=True)
                returned = compiled(*args, **kwargs)
                n = arguments.size(leaves)
                if results and any(type(each) is int and each == n for each in pytree.tree_leaves(returned)):
                    other, (more, named) = with_another_n(arguments, leaves, (args, kwargs))
                    returned = sizes_of(returned, n, compiled(*more, **named), other)
            except Exception as error:  # of Dynamo, of a fake kernel, or of the model itself
                inner = getattr(error, "inner_exception", None)  # what `grab` raises, Dynamo wraps
                if isinstance(inner, FxPatchError):
                    raise inner from error
                raise TraceError(
                    f"{_named(function)} cannot be traced whole.",
                    seen=f"{type(error).__name__}: {_start_of(error, [*arguments.signature.parameters])}",
                    expected="a model that torch.compile(fullgraph=True) accepts for every n, and that changes only "
                    "tensors",
                    hint="take the part that breaks out with fxpatch.eager_on_graph, or register fake kernels for its "
                    "operators (fxpatch.install(), fake_kernels)",
                ) from error
        if not grabbed:
            raise TraceError(
                f"{_named(function)} has no graph.",
                seen="Dynamo called no backend: there is no tensor operation in it",
                expected="a model that computes with the tensors it is given",
                hint="call it as it is",
            )
        gm, examples = grabbed[0]
        feed = _feed(gm, examples, arguments, leaves)
        returned_leaves, spec = flat(returned)
        find = Finder(list(results), result_nodes(gm), arguments, leaves, feed)
        outputs = [find(leaf) for leaf in returned_leaves]
        return Traced(
            gm, arguments, feed, outputs, spec, len(find.results), _names(function, feed), returned=returned_leaves
        )
    finally:
        for emptied in (grabbed, results, listeners):  # Dynamo keeps every backend: not with the model's tensors
            emptied.clear()


# One trace: what is not said to be dynamic is static, and floats are constants. What a replay would not do, append to a
# list or set an attribute, is an error; `side_effects` tells it from what is set back: Dynamo's own policy does not.
_SETTINGS: dict[str, Any] = {
    "assume_static_by_default": True,
    "automatic_dynamic_shapes": False,
    "specialize_float": True,
    "specialize_int": True,
}


class _Interpreter(torch.fx.Interpreter):
    """Runs a graph node by node (its own code may be broken by a vendor's `torch.device`), and marks as written what an
    operator's schema says it writes: a kernel from a library does not do so itself."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            for tensor in _written(target, args, kwargs):
                torch.autograd.graph.increment_version(tensor)
        return result


def _written(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operator, or one of the overloads of its name, writes."""
    overloads = [op] if isinstance(op, torch._ops.OpOverload) else [getattr(op, name) for name in op.overloads()]
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                yield from (each for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor))


@contextmanager
def _fresh(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`function` behind code and globals of its own, which are forgotten afterwards. Dynamo keeps what it made with the
    code that it traced, and with that the model, and gives up on code that it has traced eight times."""
    surroundings: dict[str, Any] = {"function": function}
    exec("def traced(*args, **kwargs): return function(*args, **kwargs)", surroundings)
    traced = surroundings["traced"]
    try:
        yield traced
    finally:
        torch._dynamo.eval_frame.reset_code(traced.__code__)  # type: ignore[attr-defined]
        del surroundings["function"]


def _start_of(error: BaseException, parameters: Sequence[str]) -> str:
    """The first lines of a message, as one, with arguments by their names in the model."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[: lines.index("")] if "" in lines else lines)
    for number, name in enumerate(parameters):
        text = text.replace(f"L['args'][{number}]", name).replace(f"L['kwargs']['{name}']", name)
    return text[:400]


def _feed(gm: torch.fx.GraphModule, examples: Sequence[Any], arguments: Arguments, leaves: Sequence[Any]) -> list[Any]:
    callers = {id(leaves[each.leaf]): each for each in arguments.inputs}
    return [of_n(each) if isinstance(each, torch.SymInt) else callers.get(id(each), each) for each in examples]


@contextmanager
def _marked(arguments: Arguments, leaves: Sequence[Any], largest: int) -> Iterator[None]:
    """The example's dynamic dimensions are marked for Dynamo, and nothing of that stays on the caller's tensors."""
    tensors = [leaves[each.leaf] for each in arguments.inputs]
    before = [set(vars(tensor)) for tensor in tensors]
    try:
        for each, tensor in zip(arguments.inputs, tensors, strict=True):
            for dim in each.dims:
                torch._dynamo.mark_dynamic(tensor, dim, min=LEAST, max=max(largest, LEAST + 1))
        yield
    finally:
        for tensor, names in zip(tensors, before, strict=True):
            for name in set(vars(tensor)) - names:
                delattr(tensor, name)


def _names(function: Any, feed: Sequence[Any]) -> dict[str, torch.Tensor]:
    if not isinstance(function, torch.nn.Module):
        return {}
    bound = {id(each) for each in feed if isinstance(each, torch.Tensor)}
    named = [*function.named_parameters(remove_duplicate=False), *function.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if id(tensor) in bound}


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
