"""What a call of a prepared model takes: the caller's tensors, which of their dimensions have n elements, constants.

A prepared graph is right for one form of call. A tensor of another dtype, device or rank, another structure or another
flag would make it wrong without a word, so each call is compared with the example, and what differs is said.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import InputError


@dataclass(frozen=True)
class Input:
    """One tensor of the caller.

    Args:
        name: the parameter, and the place within it: `"kv[0]"`.
        leaf: its number among all leaves of the arguments.
        dims: its dynamic dimensions.
        shape: with -1 for these.
        dtype, device: of the example.
    """

    name: str
    leaf: int
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def difference(self, value: Any) -> str | None:
        """How a value differs from the example, in words; None where only dynamic sizes do."""
        if not isinstance(value, torch.Tensor):
            return f"{self.name} is a {type(value).__name__}, and was a tensor"
        if value.dtype is not self.dtype:
            return f"{self.name} is {value.dtype}, and was {self.dtype}"
        if value.device != self.device:
            return f"{self.name} is on {value.device}, and was on {self.device}"
        if value.dim() != len(self.shape):
            return f"{self.name} has {value.dim()} dimensions, and had {len(self.shape)}"
        if any(want not in (-1, side) for want, side in zip(self.shape, value.shape, strict=True)):
            wanted = ["n" if side == -1 else side for side in self.shape]
            return f"{self.name} is {list(value.shape)}, and has to be [{', '.join(map(str, wanted))}]"
        return None


@dataclass(frozen=True)
class Arguments:
    """The form of a call.

    Attributes:
        signature: of the function.
        spec: of the bound arguments, defaults included.
        inputs: the tensors, in the order of the leaves.
        constants: every other leaf, by number.
    """

    signature: inspect.Signature
    spec: pytree.TreeSpec
    inputs: tuple[Input, ...]
    constants: Mapping[int, Any]

    @classmethod
    def of(
        cls, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: Mapping[str, Any]
    ) -> Arguments:
        """The form of an example call.

        Args:
            function: what is called.
            args, kwargs: the example.
            dynamic: parameter name -> dimension or dimensions with n elements, for every tensor in that argument.

        Raises:
            InputError: `dynamic` names what is no tensor argument, or a dimension that is not there; the sizes differ.
        """
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
        bound = _bind(signature, args, kwargs)
        paths, spec = pytree.tree_flatten_with_path(bound)
        unknown = [name for name in dynamic if name not in bound]
        if unknown:
            raise _dynamic_error(f"{', '.join(unknown)}: no such parameter", f"some of {', '.join(bound)}")
        inputs, constants = [], {}
        for leaf, (path, value) in enumerate(paths):
            if not isinstance(value, torch.Tensor):
                constants[leaf] = value
                continue
            parameter = _parameter(path)
            name = parameter + pytree.keystr(path[1:])
            dims = _dims(dynamic.get(parameter, ()), value, name)
            shape = tuple(-1 if d in dims else side for d, side in enumerate(value.shape))
            inputs.append(Input(name, leaf, dims, shape, value.dtype, value.device))
        still = [name for name in dynamic if not any(i.dims and i.name.startswith(name) for i in inputs)]
        if still:
            raise _dynamic_error(f"{', '.join(still)}: no tensor in the example", "tensors there")
        form = cls(signature, spec, tuple(inputs), constants)
        form.size([value for _, value in paths])
        return form

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, checked against the example.

        Raises:
            InputError: a structure, a constant, a dtype, a device, a rank or a static size is another one.
        """
        leaves = self._plain_leaves(args, kwargs)
        if leaves is None:
            leaves, spec = pytree.tree_flatten(_bind(self.signature, args, kwargs))
            if spec != self.spec:
                raise _call_error(f"arguments in the form {spec}", f"as in the example: {self.spec}")
        for each, dtype, device, sides in self._checks:
            value = leaves[each.leaf]
            if type(value) is torch.Tensor and value.dtype is dtype and value.device == device:
                shape = value.shape
                if len(shape) == len(each.shape) and all([shape[d] == side for d, side in sides]):  # noqa: C419 - faster
                    continue
            difference = each.difference(value)
            if difference is not None:
                raise _call_error(difference, "what prepare() was given")
        for leaf, value in self.constants.items():
            if leaves[leaf] is not value and (type(leaves[leaf]) is not type(value) or leaves[leaf] != value):
                raise _call_error(
                    f"{self.name_of(leaf)} is {leaves[leaf]!r}",
                    f"{value!r}: what is no tensor is a constant of the graph",
                )
        return leaves

    @functools.cached_property
    def _names(self) -> tuple[str, ...] | None:
        """The parameters, where each argument is one leaf, whose number is the parameter's."""
        named = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in self.signature.parameters.values())
        names = tuple(self.signature.parameters)
        plain = all(child.is_leaf() for child in self.spec.children())  # a list of one tensor has one leaf, too
        return names if named and plain and len(names) == self.spec.num_children else None

    @functools.cached_property
    def _checks(self) -> list[tuple[Input, torch.dtype, torch.device, list[tuple[int, int]]]]:
        """Each input with what is cheap to compare, and its static sides."""
        return [
            (each, each.dtype, each.device, [(d, side) for d, side in enumerate(each.shape) if side != -1])
            for each in self.inputs
        ]

    def _plain_leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The leaves of a call that brings every argument, as most do, where each is one leaf: without the 4 us that
        binding a signature and flattening a tree take. A list in the place of a tensor is found by the comparison."""
        names = self._names
        if names is None or len(args) + len(kwargs) != len(names):
            return None
        leaves = list(args)
        for name in names[len(args) :]:
            if name not in kwargs:
                return None
            leaves.append(kwargs[name])
        return leaves

    def size(self, leaves: Sequence[Any]) -> int:
        """The n of a call: what all dynamic dimensions have.

        Raises:
            InputError: they differ, or there are none.
        """
        sizes = {leaves[each.leaf].shape[d] for each in self.inputs for d in each.dims}
        if len(sizes) != 1:
            found = {f"{each.name}.shape[{d}]": leaves[each.leaf].shape[d] for each in self.inputs for d in each.dims}
            seen = ", ".join(f"{name} = {n}" for name, n in found.items()) or "no dynamic dimension"
            raise _call_error(seen, "one size, n, in all dynamic dimensions")
        return int(sizes.pop())

    def name_of(self, leaf: int) -> str:
        """What a leaf is called."""
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(self.spec.num_leaves), self.spec))
        path = paths[leaf][0]
        return _parameter(path) + pytree.keystr(path[1:])


def _parameter(path: Sequence[Any]) -> str:
    return str(path[0].key)  # the bound arguments are a dict


def _bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise _call_error(str(error), f"arguments of {signature}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _dims(wanted: Any, value: torch.Tensor, name: str) -> tuple[int, ...]:
    dims = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    wrong = [d for d in dims if not -value.dim() <= d < value.dim()]
    if wrong:
        raise _dynamic_error(f"dimension {wrong[0]} of {name}, which is {list(value.shape)}", "a dimension it has")
    return tuple(sorted({d % value.dim() for d in dims}))


def _dynamic_error(seen: str, expected: str) -> InputError:
    return InputError(
        "`dynamic` does not fit the example.",
        seen=seen,
        expected=expected,
        hint="give {parameter: dimension}, for the dimensions whose size changes from call to call",
    )


def _call_error(seen: str, expected: str) -> InputError:
    return InputError(
        "This call is not the one that was prepared.",
        seen=seen,
        expected=expected,
        hint="call it as in prepare(), or prepare another runner for this form",
    )
