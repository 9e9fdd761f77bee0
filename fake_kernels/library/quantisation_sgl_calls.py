"""Calls of sgl_kernel's per-token-group quantisation, for its records: valid ones, and ones to refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call
from fake_kernels.library.group_scales import empty_scales
from fake_kernels.library.rounding import RANGES

LAYOUTS = ("rows", "columns", "aligned", "packed", "powers")
"""Row-major, column-major, that and TMA-aligned, that and UE8M0, row-major UE8M0."""


def draw_groups(draw: Draw, packed: bool, most: int = 5) -> int:
    """How many groups a row has: never 1 in a graph, nor so many that they fill one column of packed scales."""
    if not packed:
        return draw.size(least=1, most=most)
    missing = draw.choice(0, 1, 2, 3)
    return 4 * draw.size(least=1, most=2) - missing


def draw_scales(draw: Draw, shape: Sequence[int], group_size: int, layout: str) -> Tensor:
    """Zeros for a quantised tensor of `shape`.

    Columns of aligned scales lie further apart than they have to, sometimes, and always in a graph: where a stride
    happens to equal a size, a graph takes it for that size.
    """
    aligned = layout in ("aligned", "packed")
    spare = 4 if draw.smallest and aligned else draw.choice(0, 4) if aligned else 0
    *batch, rows, columns = shape
    scales = empty_scales(
        (*batch, rows + spare, columns),
        group_size,
        device=draw.device,
        column_major=layout in ("columns", "aligned", "packed"),
        tma_aligned=aligned,
        ue8m0=layout in ("packed", "powers"),
    )
    return scales.zero_()[..., :rows, :]


def valid(
    draw: Draw,
    *,
    inputs: tuple[torch.dtype, ...],
    outputs: tuple[torch.dtype, ...] = tuple(RANGES),
    group_sizes: tuple[int, ...],
    epsilons: tuple[float, ...] = (1e-10,),
    layouts: tuple[str, ...] = LAYOUTS[:-1],
) -> tuple[Any, ...]:
    """The eight arguments that all versions have: unfused, with scales of two dimensions."""
    from_dtype, dtype = draw.choice(*inputs), draw.choice(*outputs)
    group_size, eps, layout = draw.choice(*group_sizes), draw.choice(*epsilons), draw.choice(*layouts)
    magnitude = draw.choice(1.0, 1e3, 1e-12)
    batch = draw.sizes(draw.choice(0, 1), least=1)
    groups = draw_groups(draw, layout == "packed")
    shape = (*batch, draw.size(least=1), groups * group_size)
    rows = shape[0] * shape[1] if batch else shape[0]
    scales = draw_scales(draw, (rows, shape[-1]), group_size, layout)
    x = draw.floats(*shape, dtype=from_dtype, layout="contiguous", scale=magnitude)
    q = draw.floats(*shape, dtype=dtype, layout="contiguous")
    return x, q, scales, group_size, eps, *RANGES[dtype], layout in ("packed", "powers")


def bad(length: int, **changed: Any) -> Callable[[Draw], Call]:
    """A call of int8 with 3 rows of 2 groups of 128, `length` arguments of it, apart from what is `changed`."""

    def draw_call(draw: Draw) -> Call:
        given = {
            "input": torch.ones(3, 256, dtype=torch.bfloat16),
            "output_q": torch.zeros(3, 256, dtype=torch.int8),
            "output_s": torch.zeros(3, 2),
            "group_size": 128,
            "eps": 1e-10,
            "low": -128.0,
            "high": 127.0,
            "scale_ue8m0": False,
            "fuse_silu_and_mul": False,
            "masked_m": None,
        } | changed
        args = [draw.there(value) if isinstance(value, Tensor) else value for value in given.values()]
        return tuple(args[:length]), {}

    return draw_call


def all_refused(length: int) -> dict[str, Callable[[Draw], Call]]:
    """What every version refuses, by the words of the message."""
    turned = torch.zeros(3, 256, dtype=torch.bfloat16).t().contiguous().t()
    cases: dict[str, dict[str, Any]] = {
        "input must be contiguous": {"input": turned},
        "output_q must be contiguous": {"output_q": turned.to(torch.int8)},
        "input has to be": {"input": torch.ones(3, 256, dtype=torch.float64)},
        "output_q has to be float8_e4m3fn or int8": {"output_q": torch.zeros(3, 256, dtype=torch.uint8)},
        "output_q has to have the shape": {"output_q": torch.zeros(3, 128, dtype=torch.int8)},
        "output_s has to have 2 dimensions": {"output_s": torch.zeros(6)},
        "output_s has to be [3, 2]": {"output_s": torch.zeros(2, 3)},
        "output_s has to be torch.float32": {"output_s": torch.zeros(3, 2, dtype=torch.float64)},
        "row-major output_s has to be contiguous": {"output_s": torch.zeros(3, 4)[:, :2]},
        "has to have stride 1 between rows": {"output_s": torch.zeros(2, 6).t()[::2]},
    }
    if length > 7:
        cases["output_s has to be torch.int32"] = {"scale_ue8m0": True, "output_s": torch.zeros(2, 4).t()[:3]}
    return {words: bad(length, **changed) for words, changed in cases.items()}
