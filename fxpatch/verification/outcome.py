"""What one run did: its results, what it wrote to its arguments and to the model, the gradients. All of it counts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.difference import Difference, compare
from fxpatch.native.copies import Saved
from fxpatch.tolerance import Roundings, Tolerance
from fxpatch.verification.example import Call

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_PARTS = ("result", "argument", "state", "gradient")


@dataclass(frozen=True)
class Outcome:
    """Copies of what a run left. `result` is a tree; the others are by name.

    Attributes:
        gradient: of the sum of each differentiable result times fixed random numbers; None where a tensor has no part
            in it.
        memory: in whose memory a result lies, by its place: an argument's, the model's. Who writes to it writes there.
    """

    result: Any
    argument: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    gradient: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)

    def difference(
        self,
        expected: Outcome,
        tolerances: Mapping[torch.dtype, Tolerance],
        roundings: Roundings = 1,
        strides: bool = True,
    ) -> Difference | None:
        """Where this differs from what was expected: in the results, then in what was written, then in the gradients.
        Strides and memory count in results only: a gradient lies as its kernel likes it."""
        for part in _PARTS:
            one, other = getattr(self, part), getattr(expected, part)
            difference = compare(one, other, tolerances, strides=strides and part == "result", roundings=roundings)
            if difference is not None:
                name = f"{part}{difference.where}" if part == "result" else f"{part} {difference.where}"
                return dataclasses.replace(difference, where=name)
        for place in sorted({*self.memory, *expected.memory} if strides else ()):
            mine, theirs = (self.memory.get(place), expected.memory.get(place))
            if mine != theirs:
                words = [f"that of {owner}" if owner else "of its own" for owner in (mine, theirs)]
                return Difference("memory", f"result{place}", words[0], words[1])
        return None

    def says_nothing(self, before: Outcome) -> bool:
        """Whether there is nothing to compare: no result, and nothing written.

        Args:
            before: the arguments and the state before the run.
        """
        written = compare((self.argument, self.state), (before.argument, before.state), {})
        return written is None and all(leaf is None for leaf in pytree.tree_leaves(self.result))


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
    arguments = call.leaves()
    argument = {name: plain(leaf) for name, leaf in arguments.items()}
    memory = _memory(result, {**{f"argument {name}": leaf for name, leaf in arguments.items()}, **state})
    return Outcome(plain(result), argument, _copies(state.items()), gradient, memory)


def _memory(result: Any, owners: Mapping[str, Any]) -> dict[str, str]:
    """Whose memory a result lies in: place to name, for those that do."""
    known: dict[int, str] = {}
    for name, each in owners.items():
        if _has_memory(each):
            known.setdefault(each.untyped_storage()._cdata, name)
    leaves = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(result)[0] if _has_memory(leaf)]
    found = {pytree.keystr(path): known.get(leaf.untyped_storage()._cdata) for path, leaf in leaves}
    return {place: name for place, name in found.items() if name is not None}


def _has_memory(value: Any) -> bool:
    plain_tensor = type(value) in (torch.Tensor, torch.nn.Parameter)
    return plain_tensor and value.layout is torch.strided and not value.is_quantized and value.numel() > 0


def gradients(result: Any, wrt: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Gradients of the differentiable results, with the same random cotangents for everybody; none is accumulated."""
    outputs = [leaf for leaf in _tensors(result) if leaf.requires_grad]
    if not outputs or not wrt:
        return {}
    generator = torch.Generator("cpu").manual_seed(0)
    cotangents = [
        torch.randn(each.shape, generator=generator, dtype=torch.float64, device="cpu").to(each.dtype).to(each.device)
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
        if isinstance(value, _PLAIN):
            return value
        name = type(value).__qualname__
        numbers = _numpys(value)
        if numbers is not None:
            return {"numpy": numbers}  # compiled code returns an array where eager has a scalar
        held = _attributes(value)
        if callable(value) or depth == 0:
            return name
        if held is None:  # it has none: a range, a Decimal, a set
            return name if getattr_static(type(value), "__eq__") is object.__eq__ else value
        return {name: plain(held, depth - 1)}

    return pytree.tree_map(leaf, tree)


def _numpys(value: Any) -> Any:
    """NumPy's arrays and scalars as tensors, those of other things as lists; None for what is not NumPy's."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    try:
        return torch.from_numpy(numpy.array(value))
    except TypeError:  # strings, objects, longdouble
        return repr(value.tolist())


def _attributes(value: Any) -> dict[str, Any] | None:
    """Of an object, in its `__dict__` and its slots; None where it can have none."""
    slots = [name for each in type(value).__mro__ for name in _slots(each)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


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
