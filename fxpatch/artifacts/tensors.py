"""Tensors as a table of storages and of views into them, so that what shares memory shares it again.

A storage is its raw bytes. A tensor is a dtype, a shape, strides and an offset in elements, within one storage: views,
transposed and expanded tensors, tied parameters and buffers come back as they were, and so does every dtype whose
elements are plain bytes (fp8, bool, complex, ...). Nothing is pickled; what a file claims is checked against the bytes
that it has, before torch sees it. Python attributes of a tensor and its gradient are not kept.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from fxpatch.artifacts.container import damaged
from fxpatch.artifacts.devices import Devices
from fxpatch.errors import ArtifactError

DTYPES = {
    str(each): each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype) and not str(each).startswith(("torch.q", "torch.bits"))
}
_MOST_DIMENSIONS = 64
_LARGEST = (1 << 63) - 1


class Writer:
    """Collects tensors.

    Attributes:
        members: the bytes of each storage.
        devices: where the tensors live.
    """

    def __init__(self) -> None:
        self.members: dict[str, bytes] = {}
        self.devices: set[str] = set()
        self._storages: dict[Any, int] = {}
        self._spans: dict[str, list[tuple[int, int, int]]] = {}  # first byte, last and number of each, by device
        self._of_storage: list[list[Any]] = []
        self._numbers: dict[int, int] = {}
        self._tensors: list[list[Any]] = []
        self._kept: list[torch.Tensor] = []  # an id is of the tensor as long as it lives

    def add(self, tensor: torch.Tensor, what: str) -> int:
        """A tensor's number: the same one for the same tensor.

        Args:
            what: its name, for messages.

        Raises:
            ArtifactError: it is no plain tensor.
        """
        if id(tensor) not in self._numbers:
            _check_plain(tensor, what)
            row = [
                self._storage(tensor, what),
                str(tensor.dtype),
                list(tensor.shape),
                list(tensor.stride()),
                tensor.storage_offset(),
                "parameter" if isinstance(tensor, torch.nn.Parameter) else "tensor",
                tensor.requires_grad,
                [tensor.is_conj(), tensor.is_neg()],
            ]
            self._numbers[id(tensor)] = len(self._tensors)
            self._tensors.append(row)
            self._kept.append(tensor)
        return self._numbers[id(tensor)]

    def document(self) -> dict[str, Any]:
        """The table as JSON."""
        return {"storages": self._of_storage, "tensors": self._tensors}

    def _storage(self, tensor: torch.Tensor, what: str) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            size = storage.nbytes()
            number = self._span(str(tensor.device), storage.data_ptr(), size, what)
            if number == len(self._of_storage):
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                with torch.no_grad():
                    flat.set_(storage, 0, (size,), (1,))
                    self.members[f"storage/{number}"] = bytes_of(flat.cpu())
                self._of_storage.append([str(tensor.device), size])
                self.devices.add(str(tensor.device))
            self._storages[storage._cdata] = number
        return self._storages[storage._cdata]

    def _span(self, device: str, start: int, size: int, what: str) -> int:
        """The number of the storage that has just this memory, or of the next one. Memory that was made outside torch
        (NumPy, DLPack, `torch.frombuffer`) may be in two storages, and what is written to one is seen in the other."""
        spans, span = self._spans.setdefault(device, []), (start, start + size, len(self._of_storage))
        if not size:
            return span[2]
        at = bisect_left(spans, span[:2])
        for first, last, number in spans[max(at - 1, 0) : at + 1]:
            if (first, last) == span[:2]:
                return number
            if first < span[1] and start < last:
                raise _not_saved(f"{what} shares some of its memory with a tensor before it, each in its own storage")
        spans.insert(at, span)
        return span[2]


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A copy of a tensor's memory, without NumPy, which torch does not bring.

    Args:
        tensor: on the CPU, contiguous.
    """
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def read(table: Any, raw: Callable[[str], bytes], devices: Devices) -> list[torch.Tensor]:
    """The tensors of a table, in its order.

    Args:
        raw: a member's bytes, by its name.

    Raises:
        ArtifactError: it claims what is not there.
    """
    storages = []
    checked = [_checked_row(row) for row in _rows(table, "tensors")]
    for number, row in enumerate(_rows(table, "storages")):
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
            raise damaged(f"storage {number} is described by {str(row)[:80]}")
        content = raw(f"storage/{number}")
        if len(content) != row[1]:
            raise damaged(f"storage {number} claims {str(row[1])[:40]} bytes and has {len(content)}")
        storages.append((devices.now(row[0]), content))
    for row in checked:
        _check_bounds(row, storages)
    made = [_storage(device, content) for device, content in storages]
    return [_tensor(row, made[row[0]]) for row in checked]


def _check_plain(tensor: torch.Tensor, what: str) -> None:
    fault = None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        fault = f"a {type(tensor).__module__}.{type(tensor).__qualname__}"
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        fault = f"a tensor of layout {tensor.layout}, dtype {tensor.dtype}"
    elif str(tensor.dtype) not in DTYPES:
        fault = f"a tensor of dtype {tensor.dtype}"
    elif tensor.device.type == "meta":
        fault = "a tensor on the meta device, which has no content"
    elif tensor.requires_grad and not tensor.is_leaf:
        fault = "a tensor with a history that gradients would flow through"
    elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        fault = "a tensor with hooks, which would be lost"
    if fault is not None:
        raise _not_saved(f"{what} is {fault}")


def _not_saved(seen: str) -> ArtifactError:
    return ArtifactError(
        "A tensor cannot be saved.",
        seen=seen,
        expected="a dense tensor or parameter, of a dtype whose elements are plain bytes, without a history or hooks",
        hint="convert it before saving: to_dense(), dequantize(), detach(), clone(); remove its hooks",
    )


def _rows(table: Any, name: str) -> list[Any]:
    rows = table.get(name) if isinstance(table, dict) else None
    if not isinstance(rows, list):
        raise damaged(f"the table of tensors has no {name}")
    return rows


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST


def _checked_row(row: Any) -> list[Any]:
    """A row whose types are right and whose storage is not yet looked at."""
    if isinstance(row, list) and len(row) == 8:
        storage, dtype, shape, stride, offset, kind, grad, bits = row
        numbers = isinstance(shape, list) and isinstance(stride, list) and all(map(_whole, (*shape, *stride)))
        if (
            numbers
            and len(shape) == len(stride) <= _MOST_DIMENSIONS
            and _whole(storage)
            and _whole(offset)
            and isinstance(dtype, str)
            and dtype in DTYPES
            and kind in ("tensor", "parameter")
            and type(grad) is bool
            and isinstance(bits, list)
            and [type(each) for each in bits] == [bool, bool]
        ):
            real = DTYPES[dtype]
            if (not grad or real.is_floating_point or real.is_complex) and not (any(bits[:1]) and not real.is_complex):
                return row
    raise damaged(f"a tensor is described by {str(row)[:120]}")


def _check_bounds(row: list[Any], storages: list[Any]) -> None:
    number, dtype, shape, stride, offset = row[:5]
    if number >= len(storages):
        raise damaged(f"a tensor is in storage {number}, and there are {len(storages)}")
    elements = 1
    for side in shape:
        elements *= side
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) + 1 if elements else offset
    size = len(storages[number][1])
    if elements > _LARGEST or last * DTYPES[dtype].itemsize > size:
        raise damaged(
            f"a tensor of shape {shape}, strides {stride}, offset {offset} and {dtype} does not fit into the {size} "
            f"bytes of storage {number}"
        )


def _storage(device: torch.device, content: bytes) -> torch.Tensor:
    """The bytes on a device, as one flat tensor."""
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return flat if device.type == "cpu" else flat.to(device)


def _tensor(row: list[Any], flat: torch.Tensor) -> torch.Tensor:
    _, dtype, shape, stride, offset, kind, grad, (conj, neg) = row
    found = torch.empty(0, dtype=DTYPES[dtype], device=flat.device)
    with torch.no_grad():
        if flat.device.type == "meta":
            found = torch.empty_strided(shape, stride, dtype=DTYPES[dtype], device="meta")
        else:
            found.set_(flat.untyped_storage(), offset, shape, stride)
        found = torch.conj(found) if conj else found
        found = torch._neg_view(found) if neg else found
    return torch.nn.Parameter(found, requires_grad=grad) if kind == "parameter" else found.requires_grad_(grad)
