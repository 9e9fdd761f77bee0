"""A piece's graph as plain data, and back, without pickles and without running anything.

What comes out of a file names operators and torch's own functions, and nothing else can be named: a file cannot make
this process call what is not an operation on tensors. A graph that holds more (a function of the user's, a subgraph, a
large constant) cannot be saved, and that is said.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

Json = Any

_MODULES = (
    *("torch", "torch.nn.functional", "torch._C._nn", "torch._C", "torch.special", "torch.linalg", "torch.fft"),
    *("_operator", "math", "builtins", "torch.sym", "torch._C._special", "torch._C._linalg", "torch._C._fft"),
)
_BUILTINS = {"max", "min", "abs", "round", "getattr", "int", "float", "bool", "len", "divmod", "pow", "sum", "slice"}
_LARGEST_CONSTANT = 1 << 16  # bytes
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_FORMATS = {str(each): each for each in vars(torch).values() if isinstance(each, (torch.layout, torch.memory_format))}


class NotCacheableError(Exception):
    """Why a prepared model cannot be saved, in words; it works as it is."""


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
        known[name] = graph.create_node(op, target, value(args, known), value(kwargs, known), name)
    return torch.fx.GraphModule(root, graph)


def _target(target: Any) -> Json:
    if isinstance(target, torch._ops.OpOverload):
        return ["op", target.namespace, target._schema.name.partition("::")[2], target._overloadname]
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return ["op", namespace, name, None]
    name = getattr(target, "__name__", "")
    for module in (getattr(target, "__module__", None), *_MODULES):
        if module and _is_torch(module, name) and getattr(sys.modules.get(module), name, None) is target:
            return ["function", module, name]
    raise NotCacheableError(f"a piece calls {name or target!r}, which is neither an operator nor a function of torch's")


def _is_torch(module: str, name: str) -> bool:
    if module == "builtins":
        return name in _BUILTINS
    return module in ("_operator", "math") or module.partition(".")[0] == "torch"


def _found(target: Json) -> Any:
    kind, where, name, *overload = target
    if kind == "op":
        packet = getattr(getattr(torch.ops, where), name)
        return packet if overload[0] is None else getattr(packet, overload[0])
    if kind != "function" or not _is_torch(where, name) or where not in sys.modules:
        raise ValueError(f"no function of a graph: {target!r}")
    return getattr(sys.modules[where], name)


def _constant(gm: torch.fx.GraphModule, path: str) -> Json:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
        raise NotCacheableError(f"a piece holds {path}, a {type(value).__name__} that is no plain tensor on the CPU")
    if value.numel() * value.element_size() > _LARGEST_CONSTANT:
        raise NotCacheableError(f"a piece holds the tensor {path} of {value.numel() * value.element_size()} bytes")
    data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [str(value.dtype), list(value.shape), base64.b64encode(data).decode()]


def _tensor(constant: Json) -> torch.Tensor:
    dtype, shape, data = constant
    raw = bytearray(base64.b64decode(data))
    if not raw:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(raw, dtype=torch.uint8).view(_DTYPES[dtype]).reshape(shape)


def plain(given: Any) -> Json:
    """A constant or argument as plain data.

    Raises:
        NotCacheableError: it has no such form.
    """
    if given is None or isinstance(given, (bool, str)) or type(given) is int:
        return given
    for kind, of, encode in _KINDS:
        if isinstance(given, of):
            return {kind: encode(given)}
    raise NotCacheableError(f"an argument in a piece is a {type(given).__name__}")


_KINDS: tuple[tuple[str, Any, Any], ...] = (
    ("node", torch.fx.Node, lambda v: v.name),
    ("float", float, lambda v: v.hex()),
    ("complex", complex, lambda v: [v.real.hex(), v.imag.hex()]),
    ("dtype", torch.dtype, str),
    ("format", (torch.layout, torch.memory_format), str),
    ("device", torch.device, str),
    ("slice", slice, lambda v: [plain(v.start), plain(v.stop), plain(v.step)]),
    ("ellipsis", type(...), lambda v: None),
    ("size", torch.Size, lambda v: [plain(each) for each in v]),
    ("tuple", tuple, lambda v: [plain(each) for each in v]),
    ("list", list, lambda v: [plain(each) for each in v]),
    ("dict", dict, lambda v: [[plain(k), plain(each)] for k, each in v.items()]),
)


def value(data: Json, nodes: Mapping[str, torch.fx.Node] = MappingProxyType({})) -> Any:
    """What `plain` was given."""
    if not isinstance(data, dict):
        return data
    ((kind, given),) = data.items()
    if kind in ("slice", "size", "tuple", "list"):
        return _MAKE[kind]([value(each, nodes) for each in given])
    if kind == "dict":
        return {value(key, nodes): value(each, nodes) for key, each in given}
    return nodes[given] if kind == "node" else _MAKE[kind](given)


_MAKE: dict[str, Any] = {
    "float": float.fromhex,
    "complex": lambda v: complex(*map(float.fromhex, v)),
    "dtype": _DTYPES.__getitem__,
    "format": _FORMATS.__getitem__,
    "device": torch.device,
    "slice": lambda v: slice(*v),
    "ellipsis": lambda v: ...,
    "size": torch.Size,
    "tuple": tuple,
    "list": list,
}
