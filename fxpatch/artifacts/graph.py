"""A graph as plain data, and back: nodes with their arguments, and how the graph takes and gives trees.

Devices in it are names, wherever they stand: in arguments and keyword arguments, nested, as strings where a device is
meant (`x.to("musa")`, `device="musa"`, an autocast's device type), in `meta`. They are mapped when the graph is read.
`x.musa()` is written as `x.to(device)`: a method of that name is there only where the backend has that name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo  # private; seen in torch 2.11 to 2.15
from torch.utils import _pytree as pytree

from fxpatch.artifacts import meta
from fxpatch.artifacts.devices import Devices, is_device_name
from fxpatch.artifacts.values import Json, Made, plain, value
from fxpatch.artifacts.vocabulary import NotTrustedError, NotWritableError, Vocabulary, is_identifier, is_path, name_of
from fxpatch.errors import ArtifactError
from fxpatch.privateuse1 import private_name

_DEVICE_KEYWORDS = ("device", "device_type")
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

    target: Json = node.target
    args: tuple[Any, ...] = node.args
    kwargs: dict[str, Any] = dict(node.kwargs)
    if node.op == "call_method" and node.target == private_name():
        target, args = "to", (*args[:1], _device_of_method(node), *args[2:])
    if node.op == "call_function":
        target = name_of(node.target)
    names = _device_strings(node)
    for key in names & set(kwargs):
        kwargs[key] = _DeviceName(str(kwargs[key]))
    args = tuple(_DeviceName(str(each)) if place in names else each for place, each in enumerate(args))
    encoded = [plain(each, _with_names(other)) for each in (args, kwargs)]
    notes.devices |= meta.devices_in(encoded)
    told = meta.written(node.meta, notes.devices, notes.left_out)
    return [node.op, node.name, target, *encoded, told, _SPELLED.get(node.type) if node.type else None]


class _DeviceName:
    """A string in a place where a device is meant."""

    def __init__(self, name: str) -> None:
        self.name = name


def _with_names(other: Callable[[Any], Json]) -> Callable[[Any], Json]:
    return lambda each: {"device name": each.name} if isinstance(each, _DeviceName) else other(each)


def _device_strings(node: torch.fx.Node) -> set[Any]:
    """Keywords and places of the arguments of a node that are strings and mean devices."""
    found: set[Any] = {key for key in _DEVICE_KEYWORDS if isinstance(node.kwargs.get(key), str)}
    place = 1 if node.op == "call_method" and node.target == "to" else None
    if node.op == "call_function" and "autocast" in getattr(node.target, "__name__", ""):
        place = 0
    if place is not None and len(node.args) > place and isinstance(node.args[place], str):
        found.add(place)
    strings = {each: node.kwargs[each] if isinstance(each, str) else node.args[each] for each in found}
    return {each for each, text in strings.items() if is_device_name(str(text))}


def _device_of_method(node: torch.fx.Node) -> torch.device:
    """The device of `x.musa()` and `x.musa(1)`."""
    kind, given = str(node.target), node.args[1] if len(node.args) > 1 else node.kwargs.get("device")
    if given is None and "device" not in node.kwargs:
        return torch._C.device(kind)
    if type(given) is int and "device" not in node.kwargs:
        return torch._C.device(kind, given)
    if isinstance(given, torch._C.device) and "device" not in node.kwargs:
        return given
    raise NotWritableError(f"{node.name} calls .{kind}({given!r}), and only an index or a device can be written")


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
