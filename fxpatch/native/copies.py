"""Copies of what a call takes, to be called with again and again. The problem: an operator may write into its
arguments, and may behave differently for a view, for overlapping or shared memory, or for an address that is not
aligned. The rule: a copy has the geometry of the original (shape, stride, alignment), arguments that share memory
still do, and every trial gets a fresh one. Only the memory between the first and the last element is copied, not the
storage it lies in.

Kept together: tensors of one storage and one dtype. Tensors that are not strided are cloned one by one. Objects that
pytree does not know are passed on as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_ALIGN = 64  # elements: at least 64 bytes, more than any kernel asks of an address
_VARIED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _View:
    """A tensor in a copied piece of memory; `size` None: the piece itself."""

    base: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Fresh:
    """One copy, ready to be called with: the tree, its leaves, and the memory of its tensors."""

    tree: Any
    leaves: list[Any]
    bases: list[torch.Tensor]


class Saved:
    """The values of a tree of tensors and other things, as they were when this was made.

    Args:
        tree: anything pytree knows; tensors of any device.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(tree)
        groups: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and _flat(leaf):
                groups.setdefault(_group(leaf), []).append(leaf)
        self._bases: list[torch.Tensor] = []
        spans: dict[tuple[int, torch.dtype], tuple[int, int]] = {}
        for key, tensors in groups.items():
            low, base = _copy_span(tensors)
            spans[key] = (len(self._bases), low)
            self._bases.append(base)
        self._leaves: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                self._leaves.append(leaf)
            elif _flat(leaf):
                number, low = spans[_group(leaf)]
                offset = leaf.storage_offset() - low
                self._leaves.append(_View(number, tuple(leaf.shape), leaf.stride(), int(offset)))
            else:
                self._leaves.append(_View(len(self._bases)))
                self._bases.append(leaf.detach().clone())

    def fresh(self) -> Fresh:
        """A copy to call with."""
        bases = [base.clone() for base in self._bases]
        leaves = [_view(leaf, bases) if isinstance(leaf, _View) else leaf for leaf in self._leaves]
        return Fresh(pytree.tree_unflatten(leaves, self._spec), leaves, bases)

    def refill(self, fresh: Fresh) -> None:
        """Puts the values back into a copy, whatever a call has written there."""
        for live, saved in zip(fresh.bases, self._bases, strict=True):
            live.copy_(saved)

    def signature(self) -> tuple[Any, ...]:
        """Structure, shapes, strides, dtypes and devices; leaves that are no tensors by their representation."""
        described: list[tuple[Any, ...]] = []
        for leaf in self._leaves:
            if isinstance(leaf, _View):
                base = self._bases[leaf.base]
                size = tuple(base.shape) if leaf.size is None else leaf.size
                described.append((size, leaf.stride, base.dtype, str(base.device)))
            else:
                described.append((type(leaf), repr(leaf)))
        return (str(self._spec), *described)

    def shapes(self) -> list[tuple[int, ...] | None]:
        """The shape of each leaf; None for one that is no tensor."""
        return [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in self.fresh().leaves]


def vary(fresh: Fresh) -> Fresh:
    """Other values for a copy, from the same range: floating tensors back to front. Returns the copy.

    Integers stay: indices and offsets in another order may point nowhere.
    """
    for leaf in fresh.leaves:
        if isinstance(leaf, torch.Tensor) and _flat(leaf) and leaf.dtype in _VARIED and 0 not in leaf.stride():
            leaf.copy_(leaf.flip(tuple(range(leaf.ndim))))
    return fresh


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    if a.layout is not torch.strided or b.layout is not torch.strided or a.device != b.device:
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def _flat(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _group(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr() or id(tensor), tensor.dtype


def _copy_span(tensors: list[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Copies the memory from the first to the last element; returns where it begins in the storage, and the copy."""
    low, high = [], []
    for tensor in tensors:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        low.append(tensor.storage_offset())
        high.append(tensor.storage_offset() + (reach + 1 if tensor.numel() else 0))
    begin = min(low) // _ALIGN * _ALIGN
    span = tensors[0].detach().as_strided((max(0, max(high) - begin),), (1,), begin)
    return begin, span.clone()


def _view(leaf: _View, bases: list[torch.Tensor]) -> torch.Tensor:
    base = bases[leaf.base]
    if leaf.size is None:
        return base
    return base.as_strided(leaf.size, leaf.stride, leaf.offset).data  # autograd, and so Dynamo, sees no view in it
