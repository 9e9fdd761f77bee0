"""Arguments of a graph, constants and settings as plain data, and back: JSON without anything that could run.

`None`, booleans, whole numbers and strings are themselves; all else is an object with one key that says what it is,
`{"float": "0x1p+0"}`, `{"device": "musa:0"}`, `{"tuple": [...]}`. Nodes are named, tensors are numbers in a table.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxpatch.artifacts.vocabulary import NotWritableError

Json = Any
_LARGEST_WHOLE = 1 << 128

DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
FORMATS = {str(each): each for each in vars(torch).values() if isinstance(each, (torch.layout, torch.memory_format))}


def plain(given: Any, other: Callable[[Any], Json] | None = None) -> Json:
    """A constant or argument as plain data.

    Args:
        other: gives the form of what has none here, e.g. of a tensor.

    Raises:
        NotWritableError: it has no such form.
    """
    if given is None or type(given) in (bool, str, int):
        return given
    for kind, of, encode in _KINDS:
        if isinstance(given, of):
            if type(given) not in _EXACT.get(kind, (type(given),)):
                break
            return {kind: encode(given, other)}
    if other is not None:
        return other(given)
    raise NotWritableError(f"an argument in a piece is a {type(given).__name__}")


def _each(given: Any, other: Any) -> list[Json]:
    return [plain(each, other) for each in given]


_KINDS: tuple[tuple[str, Any, Any], ...] = (
    ("node", torch.fx.Node, lambda v, _: v.name),
    ("float", float, lambda v, _: v.hex()),
    ("complex", complex, lambda v, _: [v.real.hex(), v.imag.hex()]),
    ("dtype", torch.dtype, lambda v, _: str(v)),
    ("format", (torch.layout, torch.memory_format), lambda v, _: str(v)),
    ("device", torch._C.device, lambda v, _: str(v)),
    ("slice", slice, lambda v, other: _each((v.start, v.stop, v.step), other)),
    ("range", range, lambda v, _: [v.start, v.stop, v.step]),
    ("ellipsis", type(...), lambda v, _: None),
    ("size", torch.Size, _each),
    ("tuple", tuple, _each),
    ("list", list, _each),
    ("ordered", OrderedDict, lambda v, other: [[plain(k, other), plain(each, other)] for k, each in v.items()]),
    ("dict", dict, lambda v, other: [[plain(k, other), plain(each, other)] for k, each in v.items()]),
)
# A tuple, list or dict of somebody else's class means more than its items: a default, a count, names.
_EXACT: dict[str, tuple[type, ...]] = {
    "tuple": (tuple,),
    "list": (list, immutable_list),
    "dict": (dict, immutable_dict),
    "ordered": (OrderedDict,),
}

Made = Callable[[Json], Any]


def value(
    data: Json,
    nodes: Mapping[str, torch.fx.Node] = MappingProxyType({}),
    make: Mapping[str, Made] = MappingProxyType({}),
) -> Any:
    """What `plain` was given.

    Args:
        nodes: by name.
        make: for kinds that need more than the data: `{"device": ..., "tensor": ...}`.

    Raises:
        LookupError, ValueError, TypeError: it is no such form.
    """
    if not isinstance(data, dict):
        if isinstance(data, int) and not -_LARGEST_WHOLE < data < _LARGEST_WHOLE:
            raise ValueError("a number with more than 128 bits")
        if data is None or isinstance(data, (bool, int, str)):
            return data
        raise TypeError(f"no plain value: {type(data).__name__}")
    ((kind, given),) = data.items()
    if kind in make:
        return make[kind](given)
    if kind in ("slice", "size", "tuple", "list"):
        return _MAKE[kind]([value(each, nodes, make) for each in given])
    if kind in ("dict", "ordered"):
        pairs = [(value(key, nodes, make), value(each, nodes, make)) for key, each in given]
        return OrderedDict(pairs) if kind == "ordered" else dict(pairs)
    return nodes[given] if kind == "node" else _MAKE[kind](given)


_MAKE: dict[str, Made] = {
    "float": float.fromhex,
    "complex": lambda v: complex(*map(float.fromhex, v)),
    "dtype": DTYPES.__getitem__,
    "format": FORMATS.__getitem__,
    "device": torch._C.device,
    "slice": lambda v: slice(*v),
    "range": lambda v: range(*v),
    "ellipsis": lambda v: ...,
    "size": torch.Size,
    "tuple": tuple,
    "list": list,
}
