"""Hypothesis strategies for tensors: shapes, layouts, dtypes, and tensors made of them.

Values come from a drawn seed, not element by element: an example stays small, prints in one line, and is made again
from what it prints. Everything shrinks towards a contiguous float32 tensor with few elements.

    from fxpatch.testing.strategies import tensors

    @given(x=tensors())
    def test_my_operator(x): ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from fxpatch.testing.fx_graphs import fx_graphs
from fxpatch.testing.layout import Layout, relocated

__all__ = ["Drawn", "dtypes", "fx_graphs", "layouts", "shapes", "tensors"]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGRAL = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64, torch.complex128)
BOOLEAN = (torch.bool,)


def dtypes(
    *, floating: bool = True, integral: bool = False, complex: bool = False, boolean: bool = False
) -> st.SearchStrategy[torch.dtype]:
    """Dtypes of the kinds asked for.

    Args:
        floating: float32, float64, bfloat16, float16.
        integral: int64 to int8, and uint8.
        complex: complex64, complex128.
        boolean: bool.
    """
    kinds = ((floating, FLOATING), (integral, INTEGRAL), (complex, COMPLEX), (boolean, BOOLEAN))
    return st.sampled_from([dtype for wanted, group in kinds if wanted for dtype in group])


def shapes(
    *, min_dims: int = 0, max_dims: int = 4, min_side: int = 0, max_side: int = 6
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes. By default also of no dimension, and with sides of 0 and 1, where kernels forget to look.

    Args:
        min_dims, max_dims: how many dimensions.
        min_side, max_side: of each.
    """
    return st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def layouts(
    draw: st.DrawFn,
    shape: Sequence[int],
    *,
    permuted: bool = True,
    strided: bool = True,
    expanded: bool = True,
    offset: bool = True,
) -> Layout:
    """Layouts of a shape, as views make them.

    Args:
        permuted: the order of the dimensions in memory may differ (`transpose`).
        strided: elements may lie apart (`x[::2]`).
        expanded: elements may be the same memory (`expand`); such a tensor cannot be written to.
        offset: the first element may not be the first of the storage (`x[1:]`).
        shape: of the tensor.
    """
    order = draw(st.permutations(range(len(shape)))) if permuted else range(len(shape))
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        kinds = ["dense"] + ["strided"] * strided + ["expanded"] * expanded
        kind = draw(st.sampled_from(kinds)) if len(kinds) > 1 else "dense"
        if kind != "expanded":
            strides[dim] = step * (2 if kind == "strided" else 1)
            step = strides[dim] * max(shape[dim], 1)
    return Layout(tuple(shape), tuple(strides), draw(st.integers(0, 3)) if offset else 0)


@dataclass(frozen=True)
class Drawn:
    """A tensor in words.

    Args:
        layout: shape, strides and place in its storage.
        dtype: of its elements.
        seed: of its values.
        requires_grad: as of the tensor.
    """

    layout: Layout
    dtype: torch.dtype
    seed: int
    requires_grad: bool = False

    def build(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor; the same values on every device, because they are made on the CPU.

        Args:
            device: where the tensor is to be.
        """
        random = torch.Generator().manual_seed(self.seed)
        # a few elements after the last, so that a kernel that writes past the end is seen to
        tensor = self.layout.over(_values(self.layout.extent + 2, self.dtype, random))
        moved: torch.Tensor = relocated(tensor.requires_grad_(self.requires_grad), device)
        return moved


@st.composite
def tensors(
    draw: st.DrawFn,
    *,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: st.SearchStrategy[torch.dtype] | None = None,
    dense: bool = False,
    writable: bool = False,
    requires_grad: bool = False,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Tensors with values that are neither all alike nor large: normal ones, or integers from -9 to 9.

    Args:
        shapes, dtypes: where to draw from; None for this module's defaults.
        dense: contiguous ones only.
        writable: no expanded ones.
        requires_grad: leaves that require grad (of dtypes that can).
        device: where to put them.
    """
    shape = draw(_DEFAULT_SHAPES if shapes is None else shapes)
    dtype = draw(_DEFAULT_DTYPES if dtypes is None else dtypes)
    layout = draw(layouts(shape, permuted=not dense, strided=not dense, expanded=not (dense or writable)))
    gradient = requires_grad and (dtype.is_floating_point or dtype.is_complex)
    return Drawn(layout, dtype, draw(st.integers(0, 2**16)), gradient).build(device)


def _values(count: int, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    if dtype.is_complex or dtype.is_floating_point:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(count, dtype=wide, generator=random).to(dtype)
    low = 0 if dtype in (torch.uint8, torch.bool) else -9
    high = 1 if dtype is torch.bool else 9
    return torch.randint(low, high + 1, (count,), generator=random).to(dtype)


_DEFAULT_SHAPES = shapes().filter(lambda shape: math.prod(shape) <= 1296)
_DEFAULT_DTYPES = dtypes(integral=True, boolean=True)
