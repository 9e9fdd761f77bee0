"""SGLang's helpers around the experts' matrix products: rows copied, weighted, summed.

Four of the five hide what they write: their schemas (sglang-kernel 0.4.10 and before) return nothing and declare no
mutation. torch refuses to make a fake for those on purpose; with a fake that returns nothing, compiled code drops the
call and hands on uninitialised memory. They are here to be made into shadow operators, never to be registered.

Sources: sgl-project/sglang sgl-kernel/csrc/moe/{moe_sum_reduce,moe_sum,prepare_moe_input}.cu; schemas from the wheel.
The kernels read raw pointers: beyond the checks below they assume contiguous tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "sgl-project/sglang sgl-kernel/csrc/moe/{}"
_PREPARE = _SOURCE.format("prepare_moe_input.cu")


def _floats(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw.floats(*shape, dtype=dtype, layout="contiguous")


def _int32(draw: Draw, *shape: int, below: int) -> Tensor:
    return draw.integers(*shape, low=0, high=below, dtype=torch.int32, layout="contiguous")


def _sum_reduce(input: Tensor, output: Tensor, routed_scaling_factor: float) -> None:
    if input.dim() != 3 or output.shape != (input.shape[0], input.shape[2]):
        raise ValueError("input [tokens, k, hidden], output [tokens, hidden]")
    if not input.is_contiguous() or not output.is_contiguous():
        raise ValueError("both contiguous")
    output.copy_(input.float().sum(1) * routed_scaling_factor)


def _sum_reduce_arguments(draw: Draw) -> Call:
    dtype, factor = draw.choice(*FLOATS), draw.choice(1.0, 2.5)
    tokens, hidden, k = draw.size(least=1), draw.size(least=1), draw.size()
    return (_floats(draw, tokens, k, hidden, dtype=dtype), _floats(draw, tokens, hidden, dtype=dtype), factor), {}


@fake_kernel(
    "sgl_kernel::moe_sum_reduce(Tensor input, Tensor output, float routed_scaling_factor) -> ()",
    reference=_sum_reduce,
    source=_SOURCE.format("moe_sum_reduce.cu"),
    library="sgl_kernel",
    arguments=_sum_reduce_arguments,
    refuses={
        "input has to be": lambda draw: ((_floats(draw, 3, 4), _floats(draw, 3, 4), 1.0), {}),
        "output has to be": lambda draw: ((_floats(draw, 3, 2, 4), _floats(draw, 3, 5), 1.0), {}),
        "contiguous": lambda draw: (
            (draw.floats(3, 2, 4, dtype=torch.float32, layout="transposed"), _floats(draw, 3, 4), 1.0),
            {},
        ),
    },
    writes=("output",),
)
def moe_sum_reduce(input: Tensor, output: Tensor, routed_scaling_factor: float) -> None:
    """`output = input.sum(1) * routed_scaling_factor`, summed in float32.

    Args:
        input: `[tokens, k, hidden]`, contiguous, float32, float16 or bfloat16.
        output: `[tokens, hidden]`, contiguous, of the same dtype. WRITTEN.
    """
    torch._check(input.dim() == 3, lambda: f"input has to be [tokens, k, hidden], not {list(input.shape)}")
    torch._check(
        output.dim() == 2 and output.shape[0] == input.shape[0] and output.shape[1] == input.shape[2],
        lambda: f"output has to be [tokens, hidden] of input {list(input.shape)}, not {list(output.shape)}",
    )
    torch._check(input.is_contiguous() and output.is_contiguous(), lambda: "input and output have to be contiguous")


def _shuffle(input: Tensor, dst2src_map: Tensor, output: Tensor) -> None:
    if input.dtype != output.dtype:
        raise ValueError("one dtype")
    rows = dst2src_map.long()[: len(output)]
    output.view(torch.uint8).copy_(input.view(torch.uint8)[rows])  # as bytes: there are dtypes without indexing


def _shuffle_arguments(draw: Draw) -> Call:
    dtype = draw.choice(torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8)
    sources, rows, hidden = draw.size(least=1), draw.size(least=1), draw.size(least=1, times=16)
    source = _floats(draw, sources, hidden).to(dtype)
    return (source, _int32(draw, rows, below=sources), torch.zeros_like(source[:1]).repeat(rows, 1)), {}


@fake_kernel(
    "sgl_kernel::shuffle_rows(Tensor input, Tensor dst2src_map, Tensor output) -> ()",
    reference=_shuffle,
    source=_PREPARE,
    library="sgl_kernel",
    arguments=_shuffle_arguments,
    refuses={
        "of one dtype": lambda draw: (
            (_floats(draw, 3, 16), _int32(draw, 2, below=3), _floats(draw, 2, 16, dtype=torch.float16)),
            {},
        )
    },
    writes=("output",),
)
def shuffle_rows(input: Tensor, dst2src_map: Tensor, output: Tensor) -> None:
    """`output[i] = input[dst2src_map[i]]`.

    Args:
        input: `[sources, hidden]`: float32, float16, bfloat16, float8_e4m3fn or uint8. dst2src_map: int32 `[rows]`.
        output: `[rows, hidden]` of the dtype of `input`. WRITTEN, as far as `hidden` goes in steps of 16 bytes (half
            precision) or elements (bytes): the kernel leaves a remainder as it was.
    """
    torch._check(
        input.dtype == output.dtype,
        lambda: f"input and output have to be of one dtype, not {input.dtype} and {output.dtype}",
    )


def _mul_sum(input: Tensor, output: Tensor, permutation: Tensor, factors: Tensor | None) -> None:
    tokens, hidden = output.shape
    places = len(permutation) // tokens
    if input.dim() != 2 or permutation.dim() != 1 or len(permutation) != tokens * places:
        raise ValueError("as many pairs for every token")
    if factors is not None and (factors.dtype != output.dtype or factors.numel() != len(permutation)):
        raise ValueError("a factor per pair, of the dtype of output")
    rows = input.float()[permutation.long()].view(tokens, places, hidden)
    weights = torch.ones(tokens, places, device=rows.device) if factors is None else factors.float()
    output.copy_((rows * weights.reshape(tokens, places, 1)).sum(1))


def _mul_sum_arguments(draw: Draw) -> Call:
    dtype, with_factors, flat = draw.choice(*HALVES), draw.flag(), draw.flag()
    tokens, places, hidden = draw.size(least=1), draw.size(least=1, most=4), draw.size(least=1)
    rows = _floats(draw, tokens * places, hidden, dtype=dtype)
    shape = (tokens * places,) if flat else (tokens, places)
    factors = _floats(draw, *shape, dtype=dtype) if with_factors else None
    order = draw.permutation(tokens * places, dtype=torch.int32)
    return (rows, _floats(draw, tokens, hidden, dtype=dtype), order, factors), {}


@fake_kernel(
    "sgl_kernel::apply_shuffle_mul_sum(Tensor input, Tensor output, Tensor permutation, Tensor? factors) -> ()",
    reference=_mul_sum,
    source=_PREPARE,
    library="sgl_kernel",
    arguments=_mul_sum_arguments,
    refuses={
        "input has to have 2 dimensions": lambda draw: (
            (_floats(draw, 2, 2, 4), _floats(draw, 2, 4), draw.permutation(4), None),
            {},
        ),
        "permutation has to have 1 dimension": lambda draw: (
            (_floats(draw, 4, 4), _floats(draw, 2, 4), draw.permutation(4).view(4, 1), None),
            {},
        ),
        "as many pairs for each": lambda draw: (
            (_floats(draw, 5, 4), _floats(draw, 2, 4), draw.permutation(5), None),
            {},
        ),
        "factors has to be of the dtype": lambda draw: (
            (_floats(draw, 4, 4), _floats(draw, 2, 4), draw.permutation(4), _floats(draw, 4, dtype=torch.float16)),
            {},
        ),
        "a factor per pair": lambda draw: (
            (_floats(draw, 4, 4), _floats(draw, 2, 4), draw.permutation(4), _floats(draw, 3)),
            {},
        ),
    },
    writes=("output",),
)
def apply_shuffle_mul_sum(input: Tensor, output: Tensor, permutation: Tensor, factors: Tensor | None) -> None:
    """`output[t]` is the sum over the pairs of token `t` of `factors[pair] * input[permutation[pair]]`.

    Args:
        input: `[tokens * k, hidden]`, float16 or bfloat16. output: `[tokens, hidden]`, of the same dtype. WRITTEN.
        permutation: int32 `[tokens * k]`. factors: as many numbers, of the dtype of `output`.
    """
    for name, tensor, wanted in (("input", input, 2), ("output", output, 2), ("permutation", permutation, 1)):
        seen = tensor.dim()
        plural = "" if wanted == 1 else "s"
        torch._check(
            seen == wanted,
            lambda n=name, s=seen, w=wanted, p=plural: f"{n} has to have {w} dimension{p}, not {s}",
        )
    pairs, tokens = permutation.shape[0], output.shape[0]
    torch._check(
        pairs % tokens == 0, lambda: f"permutation has to have as many pairs for each of {tokens} tokens, not {pairs}"
    )
    if factors is not None:
        torch._check(factors.dtype == output.dtype, lambda: f"factors has to be of the dtype of output, {output.dtype}")
        torch._check(
            factors.numel() == pairs, lambda: f"factors has to have a factor per pair, {pairs}, not {factors.numel()}"
        )


KERNELS = (moe_sum_reduce, shuffle_rows, apply_shuffle_mul_sum)
