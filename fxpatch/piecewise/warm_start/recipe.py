"""A traced model as plain data, and back: which pieces there are, what goes in and out, and where tensors come from.

Nothing of it is pickled. Pieces that run between the graphs, and those that no compiler changed, are graphs
(`graph_json`); compiled pieces are named by their key, and are the compiler's own files. Bound tensors are the model's
parameters and buffers, by name: a tensor without a name there cannot be bound again, and the model cannot be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.piecewise.arguments import Arguments, Input
from fxpatch.piecewise.build import Built
from fxpatch.piecewise.lint import unbacked
from fxpatch.piecewise.of_n import OfN
from fxpatch.piecewise.outputs import Output
from fxpatch.piecewise.split import Piece, Split, Value
from fxpatch.piecewise.trace import Traced
from fxpatch.piecewise.warm_start import graph_json
from fxpatch.piecewise.warm_start.graph_json import Json, NotCacheableError

Forms = Mapping[int | None, Sequence[Built]]  # size, or None for every size -> what each piece was compiled to


def written(traced: Traced, split: Split, forms: Forms, *, compiled: bool) -> Json:
    """What can be built again without a trace.

    Args:
        traced, split, forms: the model.
        compiled: whether graph pieces are the compiler's files, and their graphs are not needed.

    Raises:
        NotCacheableError: something has no such form.
    """
    names = {id(tensor): name for name, tensor in reversed(traced.names.items())}

    def name_of(tensor: torch.Tensor) -> str:
        if id(tensor) not in names:
            raise NotCacheableError(
                f"it uses a tensor of shape {list(tensor.shape)} that is neither a parameter nor a buffer of the model"
            )
        return names[id(tensor)]

    graphs: dict[str, Json] = {}
    numbers: dict[str, str] = {}
    pieces = []
    for piece in split.pieces:
        graph = None
        if piece.kind != "graph" or not compiled:
            nodes = graph_json.written(piece.gm)
            graph = numbers.setdefault(repr(nodes), str(len(numbers)))
            graphs[graph] = nodes
        opens = [_is_open(node) for node in _results(piece.gm)]
        pieces.append([piece.kind, graph, piece.inputs, piece.outputs, piece.reasons, opens])
    return {
        "feed": [_feed(each, name_of) for each in traced.feed],
        "outputs": [_output(each, name_of) for each in traced.outputs],
        "spec": _spec(traced.spec),
        "results": traced.results,
        "graphs": graphs,
        "pieces": pieces,
        "split": [split.feed, [_result(each) for each in split.results], split.count],
        "forms": [[size, [each.key for each in built]] for size, built in forms.items()],
    }


def read(
    recipe: Json, model: Any, arguments: Arguments, load: Callable[[str], Callable[..., Any]]
) -> tuple[Traced, Split, dict[int | None, list[Built]]]:
    """The model again.

    Args:
        recipe: what was written.
        model: whose parameters and buffers are bound.
        arguments: of the example.
        load: the compiled form of a key, where graph pieces were compiled.

    Raises:
        LookupError, ValueError, TypeError, AttributeError: it is no recipe of this model.
    """
    named = tensors_of(model)
    inputs = {each.leaf: each for each in arguments.inputs}
    modules = {number: graph_json.read(nodes) for number, nodes in recipe["graphs"].items()}
    empty = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    pieces = []
    for index, (kind, graph, given, made, reasons, opens) in enumerate(recipe["pieces"]):
        if kind not in ("graph", "split", "views"):
            raise ValueError(f"no kind of piece: {kind!r}")
        gm = empty if graph is None else modules[graph]
        if graph is not None:
            for node, is_open in zip(_results(gm), opens, strict=True):
                if isinstance(node, torch.fx.Node):
                    node.meta["open"] = is_open
        pieces.append(Piece(index, kind, gm, tuple(given), tuple(made), tuple(reasons)))
    feed = [_fed(each, named, inputs) for each in recipe["feed"]]
    outputs = [_output_of(each, named) for each in recipe["outputs"]]
    spec = pytree.treespec_loads(recipe["spec"])
    bound = {id(each) for each in feed if isinstance(each, torch.Tensor)}
    names = {name: tensor for name, tensor in named.items() if id(tensor) in bound}
    traced = Traced(empty, arguments, feed, outputs, spec, recipe["results"], names)
    numbers, results, count = recipe["split"]
    split = Split(pieces, numbers, [_result_of(each) for each in results], count)
    forms = {}
    for size, keys in recipe["forms"]:
        calls = [
            piece.gm.forward if piece.kind != "graph" or recipe["pieces"][piece.index][1] is not None else load(key)
            for piece, key in zip(pieces, keys, strict=True)
        ]
        forms[size] = [Built(call, key, 0.0) for call, key in zip(calls, keys, strict=True)]
    return traced, split, forms


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have."""
    if not isinstance(model, torch.nn.Module):
        return {}
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _results(gm: torch.fx.GraphModule) -> list[Any]:
    return list(next(reversed(gm.graph.nodes)).args[0]) if len(gm.graph.nodes) else []


def _is_open(node: Any) -> bool:
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    return isinstance(value, torch.Tensor) and any(map(unbacked, (*value.shape, *value.stride())))


def _of_n(function: Any) -> Json:
    if function is int:
        return ["int", "n"]
    if not isinstance(function, OfN) or function.text is None:
        raise NotCacheableError("a size depends on n in a way that cannot be written as arithmetic")
    return [function.kind, function.text]


def _feed(each: Any, name_of: Callable[[torch.Tensor], str]) -> Json:
    if isinstance(each, torch.Tensor):
        return ["bound", name_of(each)]
    return ["input", each.leaf] if isinstance(each, Input) else ["size", *_of_n(each)]


def _fed(each: Json, named: Mapping[str, torch.Tensor], inputs: Mapping[int, Input]) -> Any:
    if each[0] == "bound":
        return named[each[1]]
    return inputs[each[1]] if each[0] == "input" else OfN.read(each[1], each[2])


def _output(each: Output, name_of: Callable[[torch.Tensor], str]) -> Json:
    if each.kind == "shape":
        value: Json = [_output(side, name_of) for side in each.value]
    else:
        value = ["bound", name_of(each.value)] if isinstance(each.value, torch.Tensor) else graph_json.plain(each.value)
    return [each.kind, each.at, [[dim, *_of_n(size)] for dim, size in each.sizes.items()], value, each.open]


def _output_of(each: Json, named: Mapping[str, torch.Tensor]) -> Output:
    kind, at, sizes, value, is_open = each
    found: Any
    if kind == "shape":
        found = tuple(_output_of(side, named) for side in value)
    else:
        found = named[value[1]] if isinstance(value, list) else graph_json.value(value)
    return Output(kind, at, {dim: OfN.read(*size) for dim, *size in sizes}, found, is_open)


def _result(each: Any) -> Json:
    return {"value": each.number} if isinstance(each, Value) else {"constant": graph_json.plain(each)}


def _result_of(each: Json) -> Any:
    return Value(each["value"]) if "value" in each else graph_json.value(each["constant"])


def _spec(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
        if pytree.treespec_loads(text) == spec:
            return text
    except (NotImplementedError, TypeError, ValueError) as error:
        raise NotCacheableError(f"what the model returns cannot be written down: {error}") from error
    raise NotCacheableError("what the model returns cannot be written down")
