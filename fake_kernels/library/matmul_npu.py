"""torch_npu's product of int8 matrices, scaled back.

Modelled is what int8 models use: both matrices int8, one scale or one per column of `x2`, with or without a scale per
row of `x1`. Packed int4, fp8 and fp4, group sizes, a bias per batch and `y_scale` are not, and refused. A scale of
int64 is one that `npu_trans_quant_param` made: its lower 32 bits are those of a float32 (the kernel drops 13 of them).

Source: Ascend/op-plugin op_plugin/ops/opapi/QuantMatmulKernelNpuOpApi.cpp; formulas:
docs/context/torch_npu-npu_quant_matmul.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.matmul_reference_npu import BFLOAT16, BIASES, HALF, INT8, RESULTS, quant_matmul


def _arguments(draw: Draw) -> Call:
    output = draw.choice(None, *RESULTS)
    per_token = output in (HALF, BFLOAT16) and draw.flag()
    scale_dtype = draw.choice(
        torch.float32, *([torch.bfloat16] if output == BFLOAT16 else [] if per_token else [torch.int64])
    )
    biases = [None, torch.int32]
    if output == BFLOAT16:
        biases.append(torch.bfloat16)
    if per_token and output == HALF:
        biases.append(torch.float16)
    bias_dtype, one, with_offset = draw.choice(*biases), draw.flag(), output in (None, INT8) and draw.flag()
    batch, kind, first_is_whole = draw.choice(0, 1, 2), draw.choice("none", "same", "ones"), draw.flag()
    transposed = draw.flag()
    sizes = draw.sizes(batch, least=1)
    rows, inner, columns = draw.sizes(3, least=1)
    batches = [sizes, {"none": (), "same": sizes, "ones": (1,) * batch}[kind]]
    first, others = batches if first_is_whole else reversed(batches)
    x1 = draw.integers(*first, rows, inner, low=-128, high=128, dtype=torch.int8)
    x2 = draw.integers(*others, columns, inner, low=-128, high=128, dtype=torch.int8, layout="contiguous")
    x2 = x2.transpose(-1, -2) if transposed else x2.transpose(-1, -2).contiguous()
    scale = draw.floats(1 if one else columns, dtype=torch.float32, layout="contiguous").abs() * 0.01
    scale = scale.view(torch.int32).to(torch.int64) if scale_dtype == torch.int64 else scale.to(scale_dtype)
    options: dict[str, Any] = {} if output is None else {"output_dtype": output}
    if per_token:
        options["pertoken_scale"] = draw.floats(rows, dtype=torch.float32)
    if bias_dtype is not None:
        options["bias"] = draw.floats(columns, dtype=torch.float32, layout="contiguous").mul(9).to(bias_dtype)
    if with_offset:
        options["offset"] = draw.floats(1 if one else columns, dtype=torch.float32)
    return (x1, x2, scale), options


def _bad(**changed: Any) -> Callable[[Draw], Call]:
    def draw_call(draw: Draw) -> Call:
        a, b = torch.ones(3, 4, dtype=torch.int8), torch.ones(4, 5, dtype=torch.int8)
        given = {"x1": a, "x2": b, "scale": torch.ones(5), "output_dtype": HALF} | changed
        given = {name: draw.there(value) if isinstance(value, Tensor) else value for name, value in given.items()}
        return (given.pop("x1"), given.pop("x2"), given.pop("scale")), given

    return draw_call


_INT = torch.ones(2, 3, 4, dtype=torch.int8, device="cpu")


@fake_kernel(
    "npu::npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    reference=quant_matmul,
    source="Ascend/op-plugin op_plugin/ops/opapi/QuantMatmulKernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_arguments,
    refuses={
        "x1 and x2 are modelled as int8 only": _bad(x2=torch.ones(4, 5, dtype=torch.int32)),
        "group_sizes and y_scale are not modelled": _bad(group_sizes=[0, 0, 32]),
        "output_dtype 6 is not modelled": _bad(output_dtype=6),
        "x1 and x2 have to have 2 to 6 dimensions": _bad(x1=torch.ones(4, dtype=torch.int8)),
        "k dim of x1 and x2": _bad(x2=torch.ones(3, 5, dtype=torch.int8)),
        "the batch shape cannot be broadcast": _bad(x1=_INT, x2=torch.ones(3, 4, 5, dtype=torch.int8)),
        "scale has to be [1] or [5]": _bad(scale=torch.ones(4)),
        "scale has to be float32, int64 or, for a bfloat16 result, bfloat16": _bad(scale=torch.ones(5).bfloat16()),
        "pertoken_scale has to be float32 [3]": _bad(pertoken_scale=torch.ones(5)),
        "offset has to be float32 [1] or [5]": _bad(offset=torch.ones(3)),
        "bias is modelled as [5]": _bad(bias=torch.ones(1, 1, 5, dtype=torch.int32)),
        "bias of bfloat16 needs output_dtype bfloat16": _bad(bias=torch.ones(5).bfloat16()),
        "bias of float16 needs pertoken_scale and output_dtype float16": _bad(bias=torch.ones(5).half()),
    },
)
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """`(x1 @ x2 + bias) * scale * pertoken_scale + offset`; a bias that is not int32 is added after scaling.

    Args:
        x1, x2: int8 `[..., M, K]` and `[..., K, N]`, 2 to 6 dimensions, those in front broadcast.
        scale: `[1]` or `[N]` float32, int64, or bfloat16 for a bfloat16 result.
        offset: float32 `[1]` or `[N]`, for an int8 result.
        pertoken_scale: float32 `[M]`.
        bias: `[N]` int32, float32, bfloat16 (for such a result) or float16 (likewise, with `pertoken_scale`).
        output_dtype: int8 (1, or None), float16 (5) or bfloat16 (15).

    Returns:
        `[..., M, N]`, contiguous.
    """
    others = (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype)
    torch._check(
        x1.dtype == torch.int8 and x2.dtype == torch.int8 and all(number is None for number in others),
        lambda: f"x1 and x2 are modelled as int8 only, without types of their own, not {x1.dtype} and {x2.dtype}",
    )
    torch._check(group_sizes is None and y_scale is None, lambda: "group_sizes and y_scale are not modelled")
    number = INT8 if output_dtype is None else output_dtype
    torch._check(
        number in RESULTS, lambda: f"output_dtype {number} is not modelled; of its values there are {[*RESULTS]}"
    )
    torch._check(
        2 <= x1.dim() <= 6 and 2 <= x2.dim() <= 6,
        lambda: f"x1 and x2 have to have 2 to 6 dimensions, not {x1.dim()} and {x2.dim()}",
    )
    torch._check(
        x1.shape[-1] == x2.shape[-2], lambda: f"k dim of x1 and x2 need be same, not {x1.shape[-1]} and {x2.shape[-2]}"
    )
    rows, columns = x1.shape[-2], x2.shape[-1]
    _check_scales(scale, offset, pertoken_scale, rows, columns, number)
    if bias is not None:
        _check_bias(bias, pertoken_scale, columns, number)
    return x1.new_empty((*_batch(x1.shape[:-2], x2.shape[:-2]), rows, columns), dtype=RESULTS[number])


def _batch(first: tuple[int, ...], second: tuple[int, ...]) -> list[int]:
    longer, shorter = (first, second) if len(first) > len(second) else (second, first)
    batch = list(longer[: len(longer) - len(shorter)])
    for one, other in zip(longer[len(longer) - len(shorter) :], shorter, strict=True):
        torch._check(
            one == other or one == 1 or other == 1, lambda: f"the batch shape cannot be broadcast: {first}, {second}"
        )
        batch.append(other if one == 1 else one)
    return batch


def _check_scales(
    scale: Tensor, offset: Tensor | None, pertoken_scale: Tensor | None, rows: int, columns: int, number: int
) -> None:
    torch._check(
        scale.dtype in (torch.float32, torch.int64) or (scale.dtype == torch.bfloat16 and number == BFLOAT16),
        lambda: f"scale has to be float32, int64 or, for a bfloat16 result, bfloat16, not {scale.dtype}",
    )
    torch._check(
        scale.dim() == 1 and (scale.shape[0] == 1 or scale.shape[0] == columns),
        lambda: f"scale has to be [1] or [{columns}], not {list(scale.shape)}",
    )
    if pertoken_scale is not None:
        torch._check(
            pertoken_scale.dtype == torch.float32 and pertoken_scale.dim() == 1 and pertoken_scale.shape[0] == rows,
            lambda: (
                f"pertoken_scale has to be float32 [{rows}], not {pertoken_scale.dtype} {list(pertoken_scale.shape)}"
            ),
        )
    if offset is not None:
        torch._check(
            offset.dtype == torch.float32
            and offset.dim() == 1
            and (offset.shape[0] == 1 or offset.shape[0] == columns),
            lambda: f"offset has to be float32 [1] or [{columns}], not {offset.dtype} {list(offset.shape)}",
        )


def _check_bias(bias: Tensor, pertoken_scale: Tensor | None, columns: int, number: int) -> None:
    torch._check(
        bias.dim() == 1 and bias.shape[0] == columns and bias.dtype in BIASES,
        lambda: (
            f"bias is modelled as [{columns}] int32, bfloat16, float32 or float16, not {bias.dtype} {list(bias.shape)}"
        ),
    )
    torch._check(
        bias.dtype != torch.bfloat16 or number == BFLOAT16, lambda: "bias of bfloat16 needs output_dtype bfloat16 (15)"
    )
    torch._check(
        bias.dtype != torch.float16 or (pertoken_scale is not None and number == HALF),
        lambda: "bias of float16 needs pertoken_scale and output_dtype float16 (5)",
    )


KERNELS = (npu_quant_matmul,)
