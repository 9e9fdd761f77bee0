"""A graph as plain data, and back: nodes with their arguments, and how the graph takes and gives trees.

Devices in it are names, wherever they stand: in arguments and keyword arguments, nested, as strings where a device is
meant (`device_names`), in `meta`. They are mapped when the graph is read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo  # private; seen in torch 2.11 to 2.15
from torch.utils import _pytree as pytree

from fxpatch.artifacts import meta
from fxpatch.artifacts.device_names import named, with_names
from fxpatch.artifacts.devices import Devices
from fxpatch.artifacts.values import Json, Made, plain, value
from fxpatch.artifacts.vocabulary import NotTrustedError, NotWritableError, Vocabulary, is_identifier, is_path, name_of
from fxpatch.errors import ArtifactError

_COMPARES = (operator.eq, operator.ne, operator.is_, operator.is_not, operator.contains)
_TYPES = {"torch.Tensor": torch.Tensor, "int": int, "float": float, "bool": bool, "str": str}
_SPELLED = {kind: name for name, kind in _TYPES.items()}

Number = Callable[[torch.Tensor, str], int]


class Notes:
    """What is found on the way to a file.

    Attributes:
        devices: every device that is named.
        left_out: keys of `meta` that were not written.
    """

    def __init__(self) -> None:
        self.devices, self.left_out = set[str](), set[str]()


def written(graph: torch.fx.Graph, notes: Notes, tensor: Number) -> Json:
    """A graph as JSON.

    Args:
        tensor: gives the number of a tensor that is an argument.

    Raises:
        NotWritableError: it holds what has no such form.
    """
    nodes = [_node(node, notes, tensor) for node in graph.nodes]
    return {"nodes": nodes, "codegen": _codegen(graph._codegen)}


def read(form: Json, vocabulary: Vocabulary, devices: Devices, tensors: list[torch.Tensor]) -> torch.fx.Graph:
    """The graph.

    Raises:
        ArtifactError, NotTrustedError: see `Vocabulary`.
        LookupError, ValueError, TypeError: it is no such form.
    """
    graph = torch.fx.Graph()
    known: dict[str, torch.fx.Node] = {}
    make: dict[str, Made] = {
        "device": devices,
        "device name": lambda name: str(devices(name)),
        "tensor": lambda number: tensors[_index(number, tensors)],
        "function": vocabulary.argument,
    }
    read_meta = meta.reader(devices)
    for op, name, target, args, kwargs, told, kind in form["nodes"]:
        if not (isinstance(name, str) and is_identifier(name)) or name in known:
            raise ValueError(f"no name of a node, or a second one: {str(name)[:80]!r}")
        found = _target(op, target, vocabulary)
        given, named = value(args, known, make), value(kwargs, known, make)
        if not isinstance(given, tuple) or not isinstance(named, dict) or not all(map(_is_keyword, named)):
            raise TypeError(f"the arguments of {name} are no tuple and no dict with names")
        _check_call(found, given, named, vocabulary, devices, name)
        node = graph.create_node(op, found, given, named, name, None if kind is None else _TYPES[kind])
        node.meta.update(read_meta(told))
        known[name] = node
    if form["codegen"] is not None:
        graph.set_codegen(_PyTreeCodeGen(_tree_info(form["codegen"], vocabulary)))
    graph.lint()
    return graph


# -- nodes -------------------------------------------------------------------------------------------------------------


def _node(node: torch.fx.Node, notes: Notes, tensor: Number) -> Json:
    def other(each: Any) -> Json:
        if isinstance(each, torch.Tensor):
            return {"tensor": tensor(each, f"an argument of {node.name}")}
        if callable(each):
            return {"function": name_of(each)}
        raise NotWritableError(f"an argument of {node.name} is a {type(each).__name__}")

    target, args, kwargs = named(node)
    if node.op == "call_function":
        target = name_of(target)
    encoded = [plain(each, with_names(other)) for each in (args, kwargs)]
    notes.devices |= meta.devices_in(encoded)
    told = meta.written(node.meta, notes.devices, notes.left_out)
    return [node.op, node.name, target, *encoded, told, _SPELLED.get(node.type) if node.type else None]


def _target(op: Json, target: Json, vocabulary: Vocabulary) -> Any:
    if op == "call_function":
        return vocabulary.function(target)
    if op == "call_method":
        return vocabulary.method(target)
    if op == "placeholder" and isinstance(target, str) and is_identifier(target.lstrip("*")) and len(target) < 1000:
        return target
    if op in ("get_attr", "call_module") and isinstance(target, str) and is_path(target):
        return target
    if op == "output" and target == "output":
        return target
    raise ValueError(f"no operation of a graph: {str(op)[:40]!r} {str(target)[:80]!r}")


def _is_keyword(name: Any) -> bool:
    return isinstance(name, str) and is_identifier(name)


def _check_call(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], vocabulary: Vocabulary, devices: Devices, name: str
) -> None:
    """What a call does that depends on its arguments."""
    if function is getattr:
        if len(args) not in (2, 3) or kwargs:
            raise ValueError(f"{name} calls getattr with {len(args)} arguments")
        vocabulary.attribute(args[1])
    if devices.unpin and function in _COMPARES and any(isinstance(each, torch._C.device) for each in args):
        raise ArtifactError(
            "This graph cannot be un-pinned.",
            seen=f"{name} compares devices; one without an index is never equal to that of a tensor",
            expected="a graph that uses devices only to put tensors there",
            hint="leave unpin out, and give device= an index",
        )


def _index(number: Any, of: list[Any]) -> int:
    if type(number) is not int or not 0 <= number < len(of):
        raise ValueError(f"no number of a tensor: {str(number)[:40]}")
    return number


# -- trees -------------------------------------------------------------------------------------------------------------


def _codegen(codegen: CodeGen) -> Json:
    if codegen._body_transformer is not None:
        raise NotWritableError("its code is changed after it is generated (Graph.on_generate_code)")
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise NotWritableError(f"its code is generated by a {type(codegen).__qualname__}")
    info = codegen.pytree_info
    return [list(info.orig_args), spec_form(info.in_spec), None if info.out_spec is None else spec_form(info.out_spec)]


def _tree_info(form: Json, vocabulary: Vocabulary) -> _PyTreeInfo:
    names, in_form, out_form = form
    if not isinstance(names, list) or not all(map(_is_keyword, names)):
        raise ValueError("the arguments of a graph are no names")
    given = spec_of(in_form, vocabulary)
    for child in given.children() if given.type is tuple else ():
        if child.type is dict and not all(map(_is_keyword, child.context)):  # FX writes them into source
            raise ValueError("the keyword arguments of a graph are no names")
    return _PyTreeInfo(names, given, None if out_form is None else spec_of(out_form, vocabulary))


def spec_form(spec: pytree.TreeSpec) -> Json:
    """A tree as JSON: of tuples, lists and dicts for anybody's file; with registered classes for trusted ones."""
    try:
        example = pytree.tree_unflatten([_Leaf()] * spec.num_leaves, spec)
        form = plain(example, _leaf_form)
        if pytree.tree_structure(value(form, make={"leaf": lambda _: 0})) == spec:
            return form
    except NotWritableError:
        form = None
    try:
        text = pytree.treespec_dumps(spec)
        if pytree.treespec_loads(text) == spec:
            return {"registered": text}
    except (NotImplementedError, TypeError, ValueError) as error:
        raise NotWritableError(f"its arguments or results form a tree that cannot be written: {error}") from error
    raise NotWritableError("its arguments or results form a tree that cannot be written")


def spec_of(form: Json, vocabulary: Vocabulary) -> pytree.TreeSpec:
    """The tree again. torch imports modules that a tree of registered classes names: that is for trusted files only."""
    if isinstance(form, dict) and "registered" in form:
        if not vocabulary.trusted:
            raise NotTrustedError("arguments or results of classes registered with pytree")
        return pytree.treespec_loads(form["registered"])
    return pytree.tree_structure(value(form, make={"leaf": lambda _: 0}))


class _Leaf:
    pass


def _leaf_form(each: Any) -> Json:
    if isinstance(each, _Leaf):
        return {"leaf": None}
    raise NotWritableError(f"a {type(each).__qualname__}")
