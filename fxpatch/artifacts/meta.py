"""What a node's `meta` keeps in a file: shapes and plain data. The rest of it (modules, guards, symbols) is left out.

Fake tensors of fixed shapes come back as fake tensors, on the device that they are mapped to; `TensorMetadata` as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # private; seen in torch 2.11 to 2.15
from torch.fx.passes.shape_prop import TensorMetadata

from fxpatch.artifacts.devices import Devices
from fxpatch.artifacts.values import DTYPES, Json, Made, plain, value
from fxpatch.artifacts.vocabulary import NotWritableError

_MOST_DIMENSIONS = 64
_NAMES = ("device", "device name")


def written(meta: Mapping[str, Any], devices: set[str], left_out: set[str]) -> list[Json]:
    """The pairs that can be written.

    Args:
        devices, left_out: get what is named, and the keys that have no form.
    """
    found: list[Json] = []
    for key, each in meta.items():
        named: set[str] = set()
        try:
            form = plain(each, _other(named))
        except (NotWritableError, RecursionError):
            left_out.add(str(key))
            continue
        devices |= named | devices_in(form)
        found.append([str(key), form])
    return found


def devices_in(form: Json) -> set[str]:
    """Every device that plain data names."""
    if isinstance(form, list):
        return {name for each in form for name in devices_in(each)}
    if not isinstance(form, dict):
        return set()
    return {name for kind, each in form.items() for name in ([each] if kind in _NAMES else devices_in(each))}


def reader(devices: Devices) -> Callable[[Json], dict[str, Any]]:
    """Gives a function that reads what `written` gave."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make: dict[str, Made] = {"device": devices, "fake": lambda row: _fake(row, devices, mode)}
    make["tensor_meta"] = lambda fields: _tensor_meta([value(each, make=make) for each in fields])

    def read(pairs: Json) -> dict[str, Any]:
        found = {}
        for key, form in pairs:
            if not isinstance(key, str):
                raise TypeError("a key that is no string")
            found[key] = value(form, make=make)
        return found

    return read


def _other(named: set[str]) -> Callable[[Any], Json]:
    def other(each: Any) -> Json:
        if type(each) is FakeTensor and each.layout is torch.strided and not each.is_quantized:
            sizes = [*each.shape, *each.stride()]
            if all(type(size) is int for size in sizes):
                named.add(str(each.device))
                return {"fake": [str(each.dtype), sizes, str(each.device), each.requires_grad]}
        if type(each) is TensorMetadata:
            return {"tensor_meta": [plain(field, other) for field in each]}
        raise NotWritableError(f"a {type(each).__name__}")

    return other


def _fake(row: Json, devices: Devices, mode: FakeTensorMode) -> torch.Tensor:
    dtype, sizes, device, grad = row
    if len(sizes) > 2 * _MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a fake tensor with no such shape")
    middle = len(sizes) // 2
    with mode:
        found = torch.empty_strided(sizes[:middle], sizes[middle:], dtype=DTYPES[dtype], device=devices.now(device))
    return found.requires_grad_(grad is True and found.dtype.is_floating_point)


def _tensor_meta(fields: list[Any]) -> TensorMetadata:
    if len(fields) != len(TensorMetadata._fields):
        raise ValueError("no TensorMetadata")
    return TensorMetadata(*fields)
