"""A piece's graph as plain data, and back, without pickles and without running anything.

What comes out of a file names operators and torch's own functions, and nothing else can be named: a file cannot make
this process call what is not an operation on tensors. A graph that holds more (a function of the user's, a subgraph, a
large constant) cannot be saved, and that is said. Values and names are those of `fxpatch.artifacts`.
"""

from __future__ import annotations

import base64
from typing import Any

import torch

from fxpatch.artifacts.tensors import bytes_of
from fxpatch.artifacts.values import DTYPES, Json, plain, value
from fxpatch.artifacts.vocabulary import NotWritableError, Vocabulary, is_identifier, name_of

_BUILTINS = {"max", "min", "abs", "round", "getattr", "int", "float", "bool", "len", "divmod", "pow", "sum", "slice"}
_LARGEST_CONSTANT = 1 << 16  # bytes
_VOCABULARY = Vocabulary(trusted=True)  # of what `_found` lets through

NotCacheableError = NotWritableError  # why a prepared model cannot be saved, in words; it works as it is


def written(gm: torch.fx.GraphModule) -> Json:
    """A graph as lists, strings and numbers.

    Raises:
        NotCacheableError: it holds what has no such form.
    """
    nodes = []
    for node in gm.graph.nodes:
        target: Json = node.target
        if node.op == "call_function":
            target = _target(node.target)
        elif node.op == "get_attr":
            target = _constant(gm, node.target)
        elif node.op == "call_module":
            raise NotCacheableError(f"a piece calls the module {node.target}")
        nodes.append([node.op, node.name, target, plain(node.args), plain(dict(node.kwargs))])
    return nodes


def read(nodes: Json) -> torch.fx.GraphModule:
    """The graph.

    Raises:
        LookupError, ValueError, TypeError: it is no such form, or names an operator that this process does not have.
    """
    graph, root = torch.fx.Graph(), torch.nn.Module()
    known: dict[str, torch.fx.Node] = {}
    for number, (op, name, target, args, kwargs) in enumerate(nodes):
        if op == "call_function":
            target = _found(target)
        elif op == "get_attr":
            root.register_buffer(f"constant{number}", _tensor(target), persistent=False)
            target = f"constant{number}"
        elif op not in ("placeholder", "call_method", "output"):
            raise ValueError(f"no operation of a graph: {op!r}")
        elif not is_identifier(target.lstrip("*")):  # FX writes it into source
            raise ValueError(f"no name in a graph: {target!r}")
        if not is_identifier(name):
            raise ValueError(f"no name of a node: {name!r}")
        known[name] = graph.create_node(op, target, value(args, known), value(kwargs, known), name)
    return torch.fx.GraphModule(root, graph)


def _target(target: Any) -> Json:
    found = name_of(target)
    if found[0] == "higher" or (found[0] == "function" and not _is_torch(found[1], found[2])):
        raise NotCacheableError(f"a piece calls {found[2]}, which is neither an operator nor a function of torch's")
    return found


def _is_torch(module: str, name: str) -> bool:
    if module == "builtins":
        return name in _BUILTINS
    return module in ("_operator", "math") or module.partition(".")[0] == "torch"


def _found(target: Json) -> Any:
    if target[0] != "op" and (target[0] != "function" or not _is_torch(target[1], target[2])):
        raise ValueError(f"no function of a graph: {target!r}")
    return _VOCABULARY.function(target)


def _constant(gm: torch.fx.GraphModule, path: str) -> Json:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
        raise NotCacheableError(f"a piece holds {path}, a {type(value).__name__} that is no plain tensor on the CPU")
    if value.numel() * value.element_size() > _LARGEST_CONSTANT:
        raise NotCacheableError(f"a piece holds the tensor {path} of {value.numel() * value.element_size()} bytes")
    data = bytes_of(value.detach().resolve_conj().resolve_neg().contiguous())
    return [str(value.dtype), list(value.shape), base64.b64encode(data).decode()]


def _tensor(constant: Json) -> torch.Tensor:
    dtype, shape, data = constant
    raw = bytearray(base64.b64decode(data))
    if not raw:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


__all__ = ["Json", "NotCacheableError", "plain", "read", "value", "written"]
