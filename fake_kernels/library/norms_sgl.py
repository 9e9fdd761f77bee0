"""sgl_kernel's RMS norms, in place or into an output that the caller made; they return nothing.

The plain ones are flashinfer's. Their kernels take the memory of `weight`, `residual` and `output` for the dtype of
`input` and do not check it; another dtype would be read wrong without a word, and is refused here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, HALVES, Draw
from fake_kernels.kernel import Call, FakeKernel, fake_kernel

_SCHEMA = "; schema: the library of sglang-kernel 0.4.10"
_FLASHINFER = "flashinfer-ai/flashinfer csrc/norm.cu" + _SCHEMA
_OWN = "sgl-project/sglang sgl-kernel/csrc/elementwise/fused_add_rms_norm_kernel.cu" + _SCHEMA
Draws = Callable[[Draw], Call]


def _refuse(input: Tensor, other: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if input.dim() != 2 or weight.dim() != 1 or other.shape != input.shape or weight.size(0) != input.size(1):
        raise RuntimeError(f"sizes {tuple(input.shape)}, {tuple(other.shape)} and {tuple(weight.shape)}")
    if input.dtype not in dtypes or {other.dtype, weight.dtype} != {input.dtype}:
        raise RuntimeError(f"dtypes {input.dtype}, {other.dtype} and {weight.dtype}")
    if any(each.stride(-1) != 1 for each in (input, other, weight)):
        raise RuntimeError("rows that are not contiguous")


def _normalise(wide: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor:
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (plus + weight.float())


def _check(
    input: Tensor, other: Tensor, weight: Tensor, name: str, dtypes: tuple[torch.dtype, ...], *, whole: bool = False
) -> None:
    torch._check(input.dim() == 2, lambda: f"input has to be [tokens, hidden], not {list(input.shape)}")
    torch._check(other.shape == input.shape, lambda: f"{name} has to be of the sizes of input, not {list(other.shape)}")
    torch._check(
        tuple(weight.shape) == tuple(input.shape[1:]),
        lambda: f"weight has to have one element per column of input, not be of sizes {list(weight.shape)}",
    )
    torch._check(
        input.dtype in dtypes and other.dtype == input.dtype and weight.dtype == input.dtype,
        lambda: f"all have to be of one dtype of {dtypes}, not {input.dtype}, {other.dtype} and {weight.dtype}",
    )
    for called, each in (("input", input), (name, other), ("weight", weight)):
        torch._check(
            each.is_contiguous() if whole else each.stride(-1) == 1,
            lambda called=called: f"{called} has to be contiguous{'' if whole else ' in its last dimension'}",
        )


def _arguments(dtypes: tuple[torch.dtype, ...], *, input_first: bool, padded: bool) -> Draws:
    def arguments(draw: Draw) -> Call:
        dtype, pdl = draw.choice(*dtypes), draw.flag()
        padding = [draw.choice(0, 8) if padded else 0 for _ in range(2)]
        rows, columns = draw.sizes(2, least=1)  # no rows: the launch fails
        input, other = (
            draw.floats(rows, columns + pad, dtype=dtype, layout="contiguous")[:, :columns] for pad in padding
        )
        weight = draw.floats(columns, dtype=dtype, layout="contiguous")
        return (*((input, other) if input_first else (other, input)), weight, 1e-6, pdl), {}

    return arguments


def _bad(input: tuple[int, ...], other: tuple[int, ...], columns: int, layout: str, weight: torch.dtype) -> Draws:
    def call(draw: Draw) -> Call:
        tensors = [draw.floats(*shape, dtype=torch.float16, layout=layout) for shape in (input, other)]
        return (*tensors, draw.floats(columns, dtype=weight, layout="contiguous"), 1e-6, False), {}

    return call


def _refuses(name: str) -> dict[str, Draws]:
    half, plain = torch.float16, "contiguous"
    return {
        "input has to be [tokens, hidden]": _bad((2, 3, 8), (2, 3, 8), 8, plain, half),
        f"{name} has to be of the sizes of input": _bad((3, 8), (2, 8), 8, plain, half),
        "one element per column": _bad((3, 8), (3, 8), 4, plain, half),
        "of one dtype of": _bad((3, 8), (3, 8), 8, plain, torch.float32),
        "has to be contiguous": _bad((3, 8), (3, 8), 8, "transposed", half),
    }


def _into(name: str, plus: float) -> FakeKernel:
    def reference(output: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
        _refuse(input, output, weight, HALVES)
        output.copy_(_normalise(input.float(), weight, eps, plus))

    @fake_kernel(
        f"sgl_kernel::{name}(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
        reference=reference,
        source=_FLASHINFER,
        library="sgl_kernel",
        arguments=_arguments(HALVES, input_first=False, padded=True),
        refuses=_refuses("output"),
    )
    def record(output: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
        """The RMS norm of `input` `[tokens, hidden]` into `output`: times `weight` `[hidden]`, which Gemma's adds 1 to.

        float16 and bfloat16; rows may lie apart, and have to be contiguous. `enable_pdl` says how it is launched.
        """
        _check(input, output, weight, "output", HALVES)

    return record


def _adding(name: str, plus: float, source: str, dtypes: tuple[torch.dtype, ...], *, whole: bool) -> FakeKernel:
    def reference(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
        _refuse(input, residual, weight, dtypes)
        if whole and not (input.is_contiguous() and residual.is_contiguous()):
            raise RuntimeError("rows that lie apart")
        wide = input.float() + residual.float()  # normalised before it is rounded
        residual.copy_(wide)
        input.copy_(_normalise(wide, weight, eps, plus))

    @fake_kernel(
        f"sgl_kernel::{name}(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
        reference=reference,
        source=source,
        library="sgl_kernel",
        arguments=_arguments(dtypes, input_first=True, padded=not whole),
        refuses=_refuses("residual"),
    )
    def record(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
        """`residual` becomes `input + residual`, and `input` the RMS norm of that; both `[tokens, hidden]`, in place.

        `weight` `[hidden]`, which Gemma's adds 1 to. `enable_pdl` says how it is launched.
        """
        _check(input, residual, weight, "residual", dtypes, whole=whole)

    return record


rmsnorm = _into("rmsnorm", 0.0)
gemma_rmsnorm = _into("gemma_rmsnorm", 1.0)
fused_add_rmsnorm = _adding("fused_add_rmsnorm", 0.0, _OWN, FLOATS, whole=True)
gemma_fused_add_rmsnorm = _adding("gemma_fused_add_rmsnorm", 1.0, _FLASHINFER, HALVES, whole=False)

KERNELS = (rmsnorm, gemma_rmsnorm, fused_add_rmsnorm, gemma_fused_add_rmsnorm)
