"""Modules as plain data, and back: the tree below a GraphModule, with its tensors, its settings and its own graphs.

A module is its class, its plain attributes, and its parameters, buffers and children by name; a module or tensor that
is there twice is one again. What would change what it computes and cannot be written (a hook, a replaced forward, an
attribute of a foreign class) is refused when it is saved, never dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx._lazy_graph_module import _LazyGraphModule  # private; seen in torch 2.11 to 2.15

from fxpatch.artifacts import graph as graphs
from fxpatch.artifacts.device_names import DEVICE_KEYWORDS, DeviceName, with_names
from fxpatch.artifacts.devices import Devices, is_device_name
from fxpatch.artifacts.meta import devices_in, reader
from fxpatch.artifacts.meta import written as meta_written
from fxpatch.artifacts.tensors import Writer
from fxpatch.artifacts.values import Json, Made, plain, value
from fxpatch.artifacts.vocabulary import (
    NotWritableError,
    Vocabulary,
    class_name,
    is_identifier,
    is_path,
    name_of,
)

_OF_MODULES = set(vars(torch.nn.Module()))
_OF_GRAPH_MODULES = set(vars(torch.fx.GraphModule({}, torch.fx.Graph())))
_GRAPH_MODULES = (torch.fx.GraphModule, _LazyGraphModule)  # FX makes a subclass for each graph
_REBUILT = {"_flat_weights", "_flat_weight_refs"}  # by RNNBase, from its parameters


class Tree:
    """Collects modules.

    Args:
        tensors: collects their tensors.
        notes: gets devices, and what is left out.
    """

    def __init__(self, tensors: Writer, notes: graphs.Notes) -> None:
        self._tensors, self._notes = tensors, notes
        self._rows: list[Json] = []
        self._numbers: dict[int, int] = {}
        self._above: list[int] = []

    def add(self, module: torch.nn.Module, path: str = "") -> int:
        """A module's number; its children come before it.

        Raises:
            NotWritableError, ArtifactError: something of it has no form as data.
        """
        if id(module) in self._above:
            raise NotWritableError(f"{path} is a module that it is part of")
        if id(module) not in self._numbers:
            self._above.append(id(module))
            children = {
                name: None if child is None else self.add(child, f"{path}.{name}" if path else name)
                for name, child in module._modules.items()
            }
            self._above.pop()
            self._rows.append(self._row(module, children, path or "the module"))
            self._numbers[id(module)] = len(self._rows) - 1
        return self._numbers[id(module)]

    def document(self) -> dict[str, Any]:
        """The table as JSON."""
        return {"modules": self._rows}

    def _row(self, module: torch.nn.Module, children: dict[str, int | None], path: str) -> Json:
        _check_plain(module, path)
        is_graph = isinstance(module, torch.fx.GraphModule)
        internal = _OF_GRAPH_MODULES if is_graph else _OF_MODULES
        skipped = _REBUILT if isinstance(module, torch.nn.RNNBase) else set[str]()
        kept = {name: each for name, each in vars(module).items() if name not in internal | skipped}
        where = f"{path}: " if path else ""
        try:
            state = self._state(module, kept)
            row: dict[str, Json] = {
                "class": None if is_graph else class_name(type(module)),
                "training": module.training,
                "state": state,
                "parameters": {name: self._number(each, f"{path}.{name}") for name, each in module._parameters.items()},
                "buffers": {
                    name: [self._number(each, f"{path}.{name}"), name not in module._non_persistent_buffers_set]
                    for name, each in module._buffers.items()
                },
                "modules": children,
            }
            self._notes.devices |= devices_in(state)
            if isinstance(module, torch.fx.GraphModule):
                name = type(module).__name__  # "<lambda>", of a function without a name that was traced
                row["name"] = name if is_identifier(name) else "GraphModule"
                row["graph"] = graphs.written(module.graph, self._notes, self._tensors.add)
                row["meta"] = meta_written(module.meta, self._notes.devices, self._notes.left_out)
        except NotWritableError as error:
            raise NotWritableError(f"{where}{error}") from error
        return row

    def _state(self, module: torch.nn.Module, kept: dict[str, Any]) -> list[Json]:
        """Attributes; of a GraphModule only its graph reads any, and what it does not read may have no form."""
        read, is_graph = set(kept), isinstance(module, torch.fx.GraphModule)
        if isinstance(module, torch.fx.GraphModule):
            read = {str(node.target).split(".")[0] for node in module.graph.nodes}
        found: list[Json] = []
        for name, each in kept.items():
            try:
                if is_graph and name not in read and name.startswith("__"):
                    raise NotWritableError("it is no attribute of a module's own")
                if name in DEVICE_KEYWORDS and isinstance(each, str) and is_device_name(each):
                    each = DeviceName(each)
                found.append([name, plain(each, with_names(self._other))])
            except NotWritableError as error:
                if name in read:
                    raise NotWritableError(f"{name}: {error}") from error
                self._notes.left_out.add(f"the attribute {name}")
        return found

    def _number(self, tensor: torch.Tensor | None, what: str) -> int | None:
        return None if tensor is None else self._tensors.add(tensor, what)

    def _other(self, each: Any) -> Json:
        if isinstance(each, torch.Tensor):
            return {"tensor": self._tensors.add(each, "an attribute")}
        if callable(each) and not isinstance(each, torch.nn.Module):
            return {"function": name_of(each)}
        raise NotWritableError(f"an attribute is a {type(each).__module__}.{type(each).__qualname__}")


def read(
    table: Json, number: Json, vocabulary: Vocabulary, devices: Devices, tensors: list[torch.Tensor]
) -> torch.nn.Module:
    """A module of a table.

    Raises:
        ArtifactError, NotTrustedError: see `Vocabulary`.
        LookupError, ValueError, TypeError: it is no such form.
    """
    made: list[torch.nn.Module] = []
    for row in table["modules"]:
        module = _empty(row, vocabulary)
        _fill(module, row, made, tensors, vocabulary, devices)
        made.append(module)
    if type(number) is not int or not 0 <= number < len(made):
        raise ValueError("no number of a module")
    return made[number]


def _empty(row: Json, vocabulary: Vocabulary) -> torch.nn.Module:
    if row["class"] is None:
        name = row["name"]
        if not (isinstance(name, str) and is_identifier(name)):
            raise ValueError("no name of a class")
        return torch.fx.GraphModule({}, torch.fx.Graph(), name)
    kind = vocabulary.module_class(*row["class"])
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


def _fill(
    module: torch.nn.Module,
    row: Json,
    made: list[torch.nn.Module],
    tensors: list[torch.Tensor],
    vocabulary: Vocabulary,
    devices: Devices,
) -> None:
    make: dict[str, Made] = {
        "device": devices,
        "device name": lambda name: str(devices(name)),
        "tensor": lambda at: _at(at, tensors),
        "function": vocabulary.argument,
    }
    if type(row["training"]) is not bool:
        raise TypeError("training is true or false")
    module.training = row["training"]
    for name, form in row["state"]:
        internal = _OF_GRAPH_MODULES if isinstance(module, torch.fx.GraphModule) else _OF_MODULES
        if not (isinstance(name, str) and is_identifier(name)) or name.startswith("__") or name in internal:
            raise ValueError(f"no attribute of a module: {str(name)[:80]!r}")
        object.__setattr__(module, name, value(form, make=make))
    for name, at in row["parameters"].items():
        found = None if at is None else _at(at, tensors)
        if found is not None and not isinstance(found, torch.nn.Parameter):
            raise TypeError(f"{str(name)[:80]} is no parameter")
        module.register_parameter(_part(name), found)
    for name, (at, persistent) in row["buffers"].items():
        module.register_buffer(_part(name), None if at is None else _at(at, tensors), persistent=persistent is True)
    for name, at in row["modules"].items():
        module.register_module(_part(name), None if at is None else _at(at, made))
    if isinstance(module, torch.fx.GraphModule):
        module.meta.update(reader(devices)(row["meta"]))
        found = graphs.read(row["graph"], vocabulary, devices, tensors)
        _check_targets(module, found)
        module.graph = found
    if isinstance(module, torch.nn.RNNBase):
        module._init_flat_weights()


def _check_targets(module: torch.nn.Module, graph: torch.fx.Graph) -> None:
    """That what a graph takes from its module is there, and is what the module was given: FX looks only when the graph
    runs, and would find attributes of the class, too."""
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        found: Any = module
        for part in str(node.target).split("."):
            places = [vars(found), *(vars(found).get(each, {}) for each in ("_parameters", "_buffers", "_modules"))]
            held = [place[part] for place in places if part in place]
            if not held or part.startswith("__") or part in _OF_GRAPH_MODULES:
                raise ValueError(f"{node.op} of {str(node.target)[:80]}, which the module does not have")
            found = held[0]
        if node.op == "call_module" and not isinstance(found, torch.nn.Module):
            raise ValueError(f"{str(node.target)[:80]} is no module")


def _check_plain(module: torch.nn.Module, path: str) -> None:
    hooks = [name for name in _OF_MODULES if "hook" in name and isinstance(vars(module)[name], dict)]
    held = [name for name in hooks if vars(module)[name]]
    if held:
        raise NotWritableError(f"{path} has hooks ({', '.join(sorted(held))}), which cannot be saved")
    if "forward" in vars(module):
        raise NotWritableError(f"{path} has a forward of its own, which cannot be saved")
    if isinstance(module, torch.fx.GraphModule) and type(module).__bases__[0] not in _GRAPH_MODULES:
        kind = type(module).__bases__[0].__qualname__
        raise NotWritableError(f"{path} is a {kind}, of which only a GraphModule's own part could be saved")


def _part(name: Any) -> str:
    if not (isinstance(name, str) and is_path(name) and "." not in name):
        raise ValueError(f"no name of a part of a module: {str(name)[:80]!r}")
    return name


def _at(number: Json, of: list[Any]) -> Any:
    if type(number) is not int or not 0 <= number < len(of):
        raise ValueError(f"a number that is not there: {str(number)[:40]}")
    return of[number]
