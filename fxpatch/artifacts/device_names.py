"""Where a call of a graph means a device by its name: as a string, or by a method that is named after a device.

`x.to("musa")`, `device="musa"`, an autocast's device type, `torch.device("musa", 0)`, a string where the schema of an
operator has a device. A string anywhere else is data. `x.musa()` becomes `x.to(device)`: a method of that name is there
only where the backend has that name. So does `x.cuda()`; where a shim has replaced that method, it means PrivateUse1.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from fxpatch.artifacts.devices import is_device_name
from fxpatch.artifacts.values import Json
from fxpatch.artifacts.vocabulary import NotWritableError
from fxpatch.privateuse1 import private_name

DEVICE_KEYWORDS = ("device", "device_type")
_KNOWN_TO_TORCH = ("cuda", "xpu")

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class DeviceName:
    """A string in a place where a device is meant."""

    def __init__(self, name: str) -> None:
        self.name = name


def with_names(other: Callable[[Any], Json]) -> Callable[[Any], Json]:
    """`other`, for `values.plain`, which knows a `DeviceName` too."""
    return lambda each: {"device name": each.name} if isinstance(each, DeviceName) else other(each)


def named(node: torch.fx.Node) -> Call:
    """What a node calls, and its arguments, with every device among them told from data.

    Raises:
        NotWritableError: a method that is named after a device is called in a way that `to` has not.
    """
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    kwargs: dict[str, Any] = dict(node.kwargs)
    moves_to = _meant_by(str(target)) if node.op == "call_method" else None
    if moves_to is not None:
        return "to", *_as_to(node, moves_to)
    if target in (torch._C.device, torch.device) and len(args) == 2 and isinstance(args[0], str):
        args = (f"{args[0]}:{args[1]}",)
    found = _keywords(node, kwargs)
    for key in found:
        kwargs[key] = DeviceName(kwargs[key])
    places = _places(node, len(args))
    args = tuple(DeviceName(each) if at in places and _is_device(each) else each for at, each in enumerate(args))
    return target, args, kwargs


def _is_device(each: Any) -> bool:
    return isinstance(each, str) and is_device_name(each)


def _keywords(node: torch.fx.Node, kwargs: dict[str, Any]) -> list[str]:
    by_schema = {argument.name for schema in _schemas(node) for argument in schema.arguments if _takes_device(argument)}
    return [key for key, each in kwargs.items() if key in {*DEVICE_KEYWORDS, *by_schema} and _is_device(each)]


def _places(node: torch.fx.Node, count: int) -> set[int]:
    """Places among the positional arguments in which a string is a device."""
    if node.op == "call_method":
        return {1} if node.target == "to" else set()
    if node.target in (torch._C.device, torch.device) or "autocast" in getattr(node.target, "__name__", ""):
        return {0}
    schemas = _schemas(node)
    return {at for schema in schemas for at, argument in enumerate(schema.arguments[:count]) if _takes_device(argument)}


def _schemas(node: torch.fx.Node) -> list[Any]:
    """Of an operator; of all its overloads, where the graph leaves torch to choose."""
    if isinstance(node.target, torch._ops.OpOverload):
        return [node.target._schema]
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return list(node.target._schemas.values())
    return []


def _takes_device(argument: Any) -> bool:
    return "Device" in str(argument.type)


def _meant_by(method: str) -> str | None:
    """The type of the device on which a method that is called like one puts a tensor."""
    private = private_name()
    if method in _KNOWN_TO_TORCH and not isinstance(getattr(torch.Tensor, method, None), types.MethodDescriptorType):
        return private
    return method if method in (private, *_KNOWN_TO_TORCH) else None


def _as_to(node: torch.fx.Node, kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `x.to` for those of `x.musa()`, `x.musa(1)`, `x.musa(device, non_blocking)`."""
    kwargs: dict[str, Any] = dict(node.kwargs)
    tensor, *rest = node.args
    given: Any = rest.pop(0) if rest else kwargs.pop("device", None)
    if rest:
        kwargs["non_blocking"] = rest.pop(0)
    if given is None:
        given = torch._C.device(kind)
    elif type(given) is int:
        given = torch._C.device(kind, given)
    elif _is_device(given):
        given = DeviceName(given)
    if rest or not isinstance(given, (torch._C.device, DeviceName)):
        raise NotWritableError(
            f"{node.name} calls .{node.target}{tuple(node.args[1:])}, and only a device can be written"
        )
    return (tensor, given), kwargs
