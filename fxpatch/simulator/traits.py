"""What a schema says about an operator, read once: what it writes, draws, waits for, and lets stay on the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_METADATA = torch.Tag.inplace_view
_INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
    "aten::_unsafe_index_put",
}


# views whose CPU kernel makes a tensor with the storage and the dispatch keys of its argument, whatever the device
_GEOMETRY = {"aten::as_strided", "aten::_reshape_alias", "aten::view", "aten::unfold"}
# what an argument may be in an operator that only computes; not devices, generators, storages, which need a second look
_PLAIN = {"bool", "int", "float", "number", "str", "List[int]", "List[bool]", "List[float]"}
_TENSORS = {"Tensor", "Optional[Tensor]"}
_TENSOR_LISTS = {"List[Tensor]", "List[Optional[Tensor]]"}


@dataclass(frozen=True)
class Traits:
    """Facts about one operator overload.

    Args:
        writes: positions and names of the arguments it writes; `outs` are those among them that it may resize.
        results: per return value, the position or name of the argument it is, or None for a new tensor.
        moves_no_data: it changes or returns geometry only (a view, `transpose_`): a graph has nothing to record.
        draws: it takes random numbers; `generator` is the position or name of the argument to say from where.
        synchronizes: its result depends on data in a way that only the host can act on.
        takes_indices: its second argument lists index tensors, which may be on the CPU, and may be masks.
        tensors: positions of the arguments that are one tensor, `wide_tensors` with those that may be None;
            `tensor_lists`: of those that are several.
        only_geometry, only_computes, only_writes: what `dispatch` has a short way for.
    """

    writes: frozenset[int | str]
    outs: frozenset[int | str]
    results: tuple[int | str | None, ...]
    moves_no_data: bool
    draws: bool
    generator: int | str | None
    synchronizes: bool
    takes_indices: bool
    tensors: frozenset[int]
    wide_tensors: frozenset[int]
    tensor_lists: frozenset[int]
    only_geometry: bool
    only_computes: bool
    only_writes: bool


@functools.cache
def traits(op: torch._ops.OpOverload) -> Traits:
    """The facts about `op`."""
    generator: int | str | None = None
    writes: set[int | str] = set()
    outs: set[int | str] = set()
    by_alias: dict[frozenset[str], int | str] = {}
    for position, argument in enumerate(op._schema.arguments):
        place: int | str = argument.name if argument.kwarg_only else position
        if argument.name == "generator":
            generator = place
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.add(place)
            by_alias[frozenset(argument.alias_info.before_set)] = place
            if argument.is_out:
                outs.add(place)
    returned = [r.alias_info for r in op._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    takes_indices = op._schema.name in _INDEXING
    moves_no_data = is_view or _METADATA in op.tags
    draws = torch.Tag.nondeterministic_seeded in op.tags
    results = tuple(None if alias is None else by_alias.get(frozenset(alias.before_set)) for alias in returned)
    plain = not (moves_no_data or draws or takes_indices) and all(
        _is_plain(argument) for argument in op._schema.arguments
    )
    return Traits(
        writes=frozenset(writes),
        outs=frozenset(outs),
        results=results,
        moves_no_data=moves_no_data,
        draws=draws,
        generator=generator,
        synchronizes=torch.Tag.data_dependent_output in op.tags
        or (torch.Tag.dynamic_output_shape in op.tags and not takes_indices),
        takes_indices=takes_indices,
        tensors=_places(op, {"Tensor"}),
        wide_tensors=_places(op, _TENSORS),
        tensor_lists=_places(op, _TENSOR_LISTS),
        only_geometry=op._schema.name in _GEOMETRY,
        only_computes=plain and not writes,
        only_writes=plain and bool(results) and None not in results and writes <= _places(op, {"Tensor"}) | outs,
    )


def _places(op: torch._ops.OpOverload, types: set[str]) -> frozenset[int]:
    return frozenset(place for place, argument in enumerate(op._schema.arguments) if str(argument.type) in types)


def _is_plain(argument: torch.Argument) -> bool:
    kind = str(argument.type)
    if kind in _TENSORS or kind in _TENSOR_LISTS:
        return not argument.kwarg_only or (argument.is_out and kind == "Tensor")
    return kind in _PLAIN or (kind.startswith("Optional[") and kind[len("Optional[") : -1] in _PLAIN)
