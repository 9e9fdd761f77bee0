"""What one run did: its results, what it wrote to its arguments and to the model, the gradients. All of it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.native.copies import Saved
from fxpatch.tolerance import Difference, Tolerance, compare
from fxpatch.verification.example import Call

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_PARTS = ("result", "argument", "state", "gradient")


@dataclass(frozen=True)
class Outcome:
    """Copies of what a run left. `result` is a tree; the others are by name.

    Attributes:
        gradient: of the sum of each differentiable result times fixed random numbers; None where a tensor has no part
            in it.
    """

    result: Any
    argument: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]
    gradient: Mapping[str, torch.Tensor | None] = field(default_factory=dict)

    def difference(
        self, expected: Outcome, tolerances: Mapping[torch.dtype, Tolerance], roundings: int = 1, strides: bool = True
    ) -> Difference | None:
        """Where this differs from what was expected: in the results, then in what was written, then in the gradients.
        Strides count in results only: a gradient lies as its kernel likes it."""
        for part in _PARTS:
            one, other = getattr(self, part), getattr(expected, part)
            difference = compare(one, other, tolerances, strides=strides and part == "result", roundings=roundings)
            if difference is not None:
                name = f"{part}{difference.where}" if part == "result" else f"{part} {difference.where}"
                return dataclasses.replace(difference, where=name)
        return None


def outcome_of(
    result: Any, call: Call, state: Mapping[str, torch.Tensor], wrt: Mapping[str, torch.Tensor] | None
) -> Outcome:
    """Copies what a run left.

    Args:
        result: what it returned.
        call: what it was called with.
        state: the model's tensors.
        wrt: what to differentiate by; None without a backward.
    """
    gradient = {} if wrt is None else gradients(result, wrt)
    return Outcome(plain(result), _copies(call.tensors.items()), _copies(state.items()), gradient)


def gradients(result: Any, wrt: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Gradients of the differentiable results, with the same random cotangents for everybody; none is accumulated."""
    outputs = [leaf for leaf in _tensors(result) if leaf.requires_grad]
    if not outputs or not wrt:
        return {}
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.dtype).to(each.device)
        for each in outputs
    ]
    found = torch.autograd.grad(outputs, list(wrt.values()), cotangents, allow_unused=True)
    return {name: None if each is None else each.detach().clone() for name, each in zip(wrt, found, strict=True)}


def plain(tree: Any, depth: int = 8) -> Any:
    """The tree with copies of its tensors, and with what pytree does not know (a cache object) as a dict of its
    attributes, so that tensors in there are compared too."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _copy(value)
        if isinstance(value, _PLAIN) or callable(value) or depth == 0 or not hasattr(value, "__dict__"):
            return value if isinstance(value, _PLAIN) else type(value).__qualname__
        return {type(value).__qualname__: plain(dict(vars(value)), depth - 1)}

    return pytree.tree_map(leaf, tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copies(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: _copy(tensor) for name, tensor in tensors}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides, also where elements share memory."""
    copy = tensor.detach().clone()
    if tensor.layout is torch.strided and copy.stride() != tensor.stride():
        return Saved([tensor]).fresh().leaves[0]  # type: ignore[no-any-return]
    return copy
