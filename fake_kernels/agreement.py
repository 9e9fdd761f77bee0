"""What a fake kernel says about a call, held against what the real one does: as lists of disagreements in words.

Used by `fake_kernels.conformance` (a record against its reference) and by `fxpatch.testing.FakeKernelTests` (whatever
is registered, on a device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

_FACTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda t: tuple(t.shape),
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device.type,
    "layout": lambda t: t.layout,
}


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in a tree of arguments or results, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def result_disagreements(told: Any, found: Any) -> list[str]:
    """Where the results that a fake kernel gives differ from the real ones in number, kind, shape, strides, dtype,
    device or layout. A size that the fake leaves open (a `SymInt`) agrees with any.

    Args:
        told: the fake kernel's results.
        found: the real ones.
    """
    fakes, reals = pytree.tree_leaves(told), pytree.tree_leaves(found)  # None is a leaf: an absent result has a place
    if len(fakes) != len(reals):
        return [f"the fake kernel returns {len(fakes)} values, the real {len(reals)}"]
    return [
        f"result {number}: {what}"
        for number, (fake, real) in enumerate(zip(fakes, reals, strict=True))
        for what in _differences(fake, real)
    ]


def sharing(results: Any, inputs: Any) -> list[set[int]]:
    """For each tensor result, the numbers of the tensor arguments whose memory it is."""
    given = [storage(tensor) for tensor in tensors_in(inputs)]
    return [{number for number, one in enumerate(given) if one == storage(result)} for result in tensors_in(results)]


def storage(tensor: torch.Tensor) -> int:
    """What tells storages apart, of real tensors and of fake ones."""
    return int(tensor.untyped_storage()._cdata)


def written_as_declared(
    schema: torch.FunctionSchema, args: Sequence[Any], kwargs: Mapping[str, Any], besides: Iterable[str] = ()
) -> set[int]:
    """The storages that a call may write to: those of the arguments that `schema` marks, and of `besides`."""
    named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    marked = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return {storage(t) for t in tensors_in([named[name] for name in (*marked, *besides) if name in named])}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor's storage, as it is now: a write beside the tensor counts as well."""
    memory = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    whole.set_(memory, 0, (memory.nbytes() // tensor.element_size(),), (1,))
    return whole.cpu().clone().view(torch.uint8)


def _differences(fake: Any, real: Any) -> list[str]:
    if not isinstance(real, torch.Tensor) or not isinstance(fake, torch.Tensor):
        alike = type(fake) is type(real) or isinstance(fake, (torch.SymInt, torch.SymFloat))
        return [] if alike else [f"is a {type(real).__name__}, and the fake kernel gives a {type(fake).__name__}"]
    differing = [
        f"{fact} is {of(real)}, and the fake kernel says {of(fake)}"
        for fact, of in _FACTS.items()
        if not _agree(of(fake), of(real))
    ]
    if not differing:
        means = [real.numel() > 0 and side != 1 for side in real.shape]  # the other strides say nothing
        told, found = fake.stride(), real.stride()
        if not all(not m or _agree(t, f) for t, f, m in zip(told, found, means, strict=True)):
            differing.append(f"strides are {found}, and the fake kernel says {tuple(told)}")
    return differing


def _agree(told: Any, found: Any) -> bool:
    if isinstance(told, tuple) and any(isinstance(each, torch.SymInt) for each in told):
        return len(told) == len(found) and all(map(_agree, told, found))
    return isinstance(told, torch.SymInt) or bool(told == found)
