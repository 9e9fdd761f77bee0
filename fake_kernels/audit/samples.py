"""Calls made from a schema: what to pass for each argument, by its type, its name and its default.

A `Sample` is plain data (sizes and dtypes, no tensors), so that one accepted call can be made again with meta tensors,
fake tensors, symbolic sizes, other strides or other dtypes, and printed as code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

SIZES = (4, 6, 8, 16, 64)  # a rank-r tensor gets the last r: distinct, at least 2, the last one a usual hidden size
_INDEX = re.compile(
    r"idx|index|indice|mapping|table|slot|_len|lens|expert_id|count|group_list|label|target|position|topk_id"
)
_MASK = re.compile(r"mask")
_FACTOR = re.compile(r"scale|gamma|beta|bias|weight$|^w$|rstd|mean|invstd")


@dataclass(frozen=True)
class Spec:
    """A tensor to be: sizes, dtype, and in which order (outermost first) its axes lie in memory; None: contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    order: tuple[int, ...] | None = None

    def strides(self, size_of: Callable[[int], Any] = int) -> tuple[Any, ...]:
        """Dense strides, in elements, for this memory order."""
        strides: list[Any] = [1] * len(self.shape)
        step: Any = 1
        for axis in reversed(self.order or range(len(self.shape))):
            strides[axis] = step
            step = step * size_of(max(self.shape[axis], 1))
        return tuple(strides)

    def __str__(self) -> str:
        call = f"torch.empty({self.shape}, dtype={self.dtype}, device='meta')"
        if self.order is None:
            return call
        shape = tuple(self.shape[axis] for axis in self.order)
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return f"torch.empty({shape}, dtype={self.dtype}, device='meta').permute{back}"


OMIT = "<omitted>"  # the argument is left to its default
Sample = dict[str, Any]  # argument name -> Spec, list of Spec, plain value, or OMIT
Make = Callable[[Spec], Any]


def kind_of(argument: Any) -> tuple[str, bool]:
    """The argument's type as a word (`Tensor`, `Tensor[]`, `int`, `int[]`, ...) and whether it may be None."""
    text = re.sub(r"\(.*?\)", "", str(argument.real_type if hasattr(argument, "real_type") else argument.type))
    text = text.replace("number", "Scalar")
    optional = text.startswith("Optional[") or text.endswith("?")
    text = text.removeprefix("Optional[").removesuffix("?")
    text = text[:-1] if optional and text.endswith("]") and text.count("[") < text.count("]") else text
    match = re.fullmatch(r"List\[(.*)\]", text)
    return (f"{match[1].removeprefix('Optional[').removesuffix(']')}[]" if match else text).replace(
        "SymInt", "int"
    ), optional


def first_sample(schema: Any, rank: int, size: tuple[int, ...] = SIZES) -> Sample:
    """Every required argument by convention, tensors of `rank`; everything else left to its default."""
    return {
        argument.name: OMIT if argument.has_default_value() else plain_value(argument, rank, size)
        for argument in schema.arguments
    }


def plain_value(argument: Any, rank: int, size: tuple[int, ...] = SIZES) -> Any:
    """The conventional value for one argument."""
    kind, _ = kind_of(argument)
    if kind == "Tensor":
        return tensor_for(argument.name, rank, size)
    if kind == "Tensor[]":
        return [tensor_for(argument.name, rank, size)] * 2
    return values_for(argument, [], [])[0]


def tensor_for(name: str, rank: int, size: tuple[int, ...] = SIZES) -> Spec:
    """A tensor as its name suggests: indices are int64, masks bool, factors 1-D."""
    low = name.lower()
    if _MASK.search(low):
        return Spec(size[-rank:], torch.bool)
    if _INDEX.search(low):
        return Spec(size[-rank:-1] or size[-1:], torch.int64)
    if _FACTOR.search(low):
        return Spec(size[-1:])
    return Spec(size[-rank:])


def values_for(argument: Any, strings: list[str], numbers: list[int]) -> list[Any]:
    """Candidates for an argument that is no tensor, the conventional one first; `strings`, `numbers`: further ones."""
    kind, optional = kind_of(argument)
    name = argument.name.lower()
    found: list[Any] = []
    if kind in ("int", "Scalar"):
        if re.search(r"dim|axis", name):
            found = [-1, 0, 1]
        elif re.search(r"head|num_|_num|k$|world", name):
            found = [2, 4, 8, 1]
        elif re.search(r"dtype|type", name):
            found = [1, *numbers]
        found += [1, 0, 2, *numbers, 64, 16, 4, 6, 8, -1]
    elif kind == "float":
        found = [1.0, 0.5, 0.0]
    elif kind == "bool":
        found = [False, True]
    elif kind == "str":
        found = [*strings, "group"]
    elif kind == "ScalarType":
        found = [torch.float16, torch.float32, torch.int8, torch.bfloat16]
    elif kind == "int[]":
        found = [
            [1, 1],
            [64],
            [0, 1],
            [4, 6, 8],
            [1],
            [6, 64],
            [],
            [2, 2, 2],
            [4, 6, 8, 16],
            [1, 0, 2],
            [0, 2, 1, 3],
            [6],
        ]
        found += [[n] for n in numbers if n > 1]
    elif kind == "float[]":
        found = [[1.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    elif kind == "bool[]":
        found = [[True, True], [True, True, True], [True], [True] * 4]
    elif kind == "Device":
        found = [torch.device("meta")]
    elif kind == "Layout":
        found = [torch.strided]
    elif kind == "MemoryFormat":
        found = [torch.contiguous_format]
    elif kind == "Scalar[]":
        found = [[1, 1]]
    elif kind == "str[]":
        found = [["a"]]
    if optional or not found:
        found.append(None)
    distinct: list[Any] = []
    for value in found:
        if not any(type(value) is type(other) and value == other for other in distinct):
            distinct.append(value)
    return distinct


def bind(schema: Any, sample: Sample, make: Make) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for the call. A positional argument after an omitted one is passed by keyword."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    gap = False
    for argument in schema.arguments:
        value = sample[argument.name]
        if isinstance(value, str) and value == OMIT:
            gap = True
            continue
        value = made(value, make)
        if argument.kwarg_only or gap:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def made(value: Any, make: Make) -> Any:
    """A value of a sample with its tensors made."""
    if isinstance(value, Spec):
        return make(value)
    if isinstance(value, list) and value and isinstance(value[0], Spec):
        return [make(item) for item in value]
    return value


def on_meta(spec: Spec) -> torch.Tensor:
    """The tensor on the meta device."""
    return torch.empty_strided(spec.shape, spec.strides(), dtype=spec.dtype, device="meta")


def render(operator: str, schema: Any, sample: Sample) -> str:
    """The call as one line of Python."""
    args, kwargs = bind(schema, sample, str)  # tensors become the text that makes them
    shown = [_text(value) for value in args] + [f"{name}={_text(value)}" for name, value in kwargs.items()]
    namespace, _, rest = operator.partition("::")
    return f"torch.ops.{namespace}.{rest}({', '.join(shown)})"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value if value.startswith("torch.empty(") else repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return repr(value) if not isinstance(value, torch.dtype) else str(value)


def tensors(sample: Mapping[str, Any]) -> Iterator[tuple[str, Spec]]:
    """Each tensor argument that is passed, by name; a list's first one stands for all."""
    for name, value in sample.items():
        if isinstance(value, Spec):
            yield name, value
        elif isinstance(value, list) and value and isinstance(value[0], Spec):
            yield name, value[0]


def with_tensors(sample: Sample, change: Callable[[str, Spec], Spec]) -> Sample:
    """The sample with every tensor replaced."""
    new: Sample = {}
    for name, value in sample.items():
        if isinstance(value, Spec):
            new[name] = change(name, value)
        elif isinstance(value, list) and value and isinstance(value[0], Spec):
            new[name] = [change(name, item) for item in value]
        else:
            new[name] = value
    return new


def with_one(sample: Sample, name: str, **fields: Any) -> Sample:
    """The sample with fields of one tensor argument exchanged."""
    return with_tensors(sample, lambda given, spec: replace(spec, **fields) if given == name else spec)


def with_shape(sample: Sample, shape: tuple[int, ...], change: Callable[[Spec], Spec]) -> Sample:
    """The sample with every tensor of that shape changed."""
    return with_tensors(sample, lambda _, spec: change(spec) if spec.shape == shape else spec)


def resized(sample: Sample, sizes: Mapping[int, int]) -> Sample:
    """The sample with sizes exchanged wherever they occur in a tensor."""
    return with_tensors(sample, lambda _, spec: replace(spec, shape=tuple(sizes.get(n, n) for n in spec.shape)))
