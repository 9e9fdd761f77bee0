"""vLLM's static quantisation to fp8: with scales given for the tensor, for rows, for columns or for blocks of both.

Source: vllm-project/vllm csrc/libtorch_stable/quantization/w8a8/fp8/common.cu (094be773), csrc/libtorch_stable/
torch_bindings.cpp; the schema of vLLM 0.33.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.quantisation_vllm import LIBRARY, SOURCE, Q, X, bad, check, expect, refusals, tensors, to_fp8

_FP8 = torch.float8_e4m3fn


def _static(result: Tensor, input: Tensor, scale: Tensor, group_shape: list[int] | None = None) -> None:
    rows, columns = expect(result, input, scale)
    if scale.numel() == 1:
        each = scale.reshape(1, 1)
    else:
        if group_shape is not None:
            sizes = [whole if part == -1 else part for whole, part in zip((rows, columns), group_shape, strict=True)]
            if rows % sizes[0] or columns % sizes[1]:
                raise ValueError(f"groups of {sizes} in {rows} by {columns}")
            counts = (rows // sizes[0], columns // sizes[1])
        elif scale.dim() == 2:
            counts = (scale.shape[0], scale.shape[1])
        else:
            raise ValueError("scales of one dimension may be of rows or of columns")
        if math.prod(counts) != scale.numel() or (scale.dim() == 1 and 1 not in counts) or scale.dim() not in (1, 2):
            raise ValueError(f"scales {list(scale.shape)} for {counts} groups")
        if scale.dim() == 2 and (tuple(scale.shape) != counts or rows % counts[0] or columns % counts[1]):
            raise ValueError(f"scales {list(scale.shape)} for {counts} groups of {rows} by {columns}")
        table = scale.reshape(counts)
        each = table.repeat_interleave(rows // counts[0], 0).repeat_interleave(columns // counts[1], 1)
    values = input.float().reshape(rows, columns) * (1.0 / each)
    result.copy_(to_fp8(values).view(result.shape))


def _static_arguments(draw: Draw) -> Call:
    kind = draw.choice("tensor", "scalar", "row", "column", "row of 2", "groups", "groups given")
    groups = (draw.choice(1, 2, 4), draw.choice(1, 4)) if kind.startswith("groups") else (1, 1)
    q, x = tensors(draw, *groups)
    columns = x.shape[-1]
    rows = x.numel() // columns
    shape: tuple[int, ...] = {
        "tensor": (1,),
        "scalar": (),
        "row": (rows,),
        "column": (columns,),
        "row of 2": (rows, 1),
    }.get(kind, (rows // groups[0], columns // groups[1]))
    scale = draw.floats(*shape, dtype=torch.float32, layout="contiguous").abs() + 0.1
    group_shape = {"row": [1, -1], "column": [-1, 1], "groups given": list(groups)}.get(kind)
    return (q, x, scale, group_shape) if group_shape or draw.flag() else (q, x, scale), {}


@fake_kernel(
    "_C::static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    reference=_static,
    source=SOURCE,
    library=LIBRARY,
    arguments=_static_arguments,
    refuses={
        **refusals(1),
        "1D scale requires explicit group_shape": bad(Q, X, torch.ones(3)),
        "scale has to have 3 * 1 elements": bad(Q, X, torch.ones(4), [1, -1]),
        "of 1 dimension has to be of rows or of columns": bad(
            torch.zeros(4, 8).to(_FP8), torch.ones(4, 8), torch.ones(4), [2, 4]
        ),
        "has to be cut evenly by scale": bad(Q, X, torch.ones(3, 3)),
        "does not match the groups that scale implies": bad(Q, X, torch.ones(3, 2), [1, 2]),
        "has to divide input": bad(Q, X, torch.ones(1, 8), [2, 1]),
        "scale has to have 0, 1 or 2 dimensions": bad(Q, X, torch.ones(3, 2, 1)),
    },
)
def static_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, group_shape: list[int] | None = None) -> None:
    """Writes `result = input / scale`, saturating; returns nothing.

    Args:
        result: float8_e4m3fn, of the shape of `input`.
        input: `[..., rows, columns]` float32, float16 or bfloat16, rows contiguous.
        scale: float32: one element; `[rows]` or `[columns]` with `group_shape`; or `[rows / m, columns / n]`.
        group_shape: m and n, -1 for all.
    """
    check(result, input, scale)
    torch._check(scale.dim() <= 2, lambda: f"scale has to have 0, 1 or 2 dimensions, not {scale.dim()}")
    if scale.numel() == 1:
        return
    rows, columns = math.prod(input.shape[:-1]), input.shape[-1]
    if group_shape is None:
        torch._check(
            scale.dim() == 2, lambda: "1D scale requires explicit group_shape: it may be of rows or of columns"
        )
        counts = [scale.shape[0], scale.shape[1]]
    else:
        torch._check(len(group_shape) == 2, lambda: f"group_shape has to have 2 elements, not {len(group_shape)}")
        torch._check(
            all(n == -1 or whole % n == 0 for whole, n in zip((rows, columns), group_shape, strict=True)),
            lambda: f"group_shape {group_shape} has to divide input, {rows} rows of {columns} elements",
        )
        counts = [1 if n == -1 else whole // n for whole, n in zip((rows, columns), group_shape, strict=True)]
    if scale.dim() == 1:
        torch._check(
            counts[0] == 1 or counts[1] == 1, lambda: "a scale of 1 dimension has to be of rows or of columns alone"
        )
        torch._check(
            scale.shape[0] == counts[0] * counts[1],
            lambda: f"scale has to have {counts[0]} * {counts[1]} elements, not {scale.shape[0]}",
        )
        return
    torch._check(
        rows % scale.shape[0] == 0 and columns % scale.shape[1] == 0,
        lambda: f"{rows} rows of {columns} elements: input has to be cut evenly by scale {list(scale.shape)}",
    )
    torch._check(
        scale.shape[0] == counts[0] and scale.shape[1] == counts[1],
        lambda: f"group_shape {group_shape} does not match the groups that scale implies, {list(scale.shape)}",
    )


KERNELS = (static_scaled_fp8_quant,)
