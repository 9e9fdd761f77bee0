"""sgl_kernel's per-token-group quantisation, second version: fused with silu and multiply, and with padded experts.

The kernel honours `fuse_silu_and_mul` and `masked_m` for packed UE8M0 scales alone; asked for them with other scales it
quantises the unfused input, silently. Those calls are refused here, and so is `masked_m` without fusion.

Row-major UE8M0 scales came later than the wheels sgl-kernel 0.3.21 and sglang-kernel 0.4.10, which have no kernel for
them; the source at sglang 037cd6ea, which has branches for MUSA too, does.

The wheels declare what is written. The builds for MUSA and XPU, and CUDA builds of 2025, register the operator without
the marks (`UNDECLARED`): a fake kernel would make that call dead code.

Source: sgl-project/sglang sgl-kernel/csrc/gemm/per_token_group_quant_8bit_v2.cu, sgl-kernel/csrc/common_extension.cc.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, FakeKernel
from fake_kernels.library.group_scales import check_scales, empty_scales, is_column_major
from fake_kernels.library.quantisation_sgl_calls import LAYOUTS, all_refused, bad, draw_groups, draw_scales, valid
from fake_kernels.library.rounding import RANGES, ceil_log2, exp2, to_8bit, write_exponents

LIBRARY = "sgl_kernel"
SOURCE = "sgl-project/sglang sgl-kernel/csrc/gemm/per_token_group_quant_8bit_v2.cu"
GROUP_SIZES = (16, 32, 64, 128)
_SMALLEST = 1e-10  # what the kernel has built in; its argument eps is compared with it


def _silu_and_mul(input: Tensor) -> Tensor:
    gate, up = input.chunk(2, -1)
    return torch.nn.functional.silu(gate.float()).to(input.dtype) * up


def _reference(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    fuse_silu_and_mul: bool,
    masked_m: Tensor | None,
) -> None:
    if input.dtype not in (torch.float16, torch.bfloat16) or (fp8_min, fp8_max) != RANGES.get(output_q.dtype):
        raise TypeError(f"{input.dtype} to {output_q.dtype} in {fp8_min} to {fp8_max}")
    if not input.numel() or group_size not in (16, 32, 64, 128) or abs(eps - _SMALLEST) >= 1e-13:
        raise ValueError(f"{input.numel()} elements in groups of {group_size}, eps {eps}")
    if output_s.dim() != (2 if masked_m is None else 3):
        raise ValueError(f"scales of {output_s.dim()} dimensions")
    turned = output_s.stride(-2) < output_s.stride(-1)
    packed = turned and scale_ue8m0
    if (fuse_silu_and_mul and not packed) or (masked_m is not None and not fuse_silu_and_mul):
        raise ValueError("fusion goes with packed scales, and padded experts go with fusion")
    if not (input.is_contiguous() and output_q.is_contiguous()):
        raise ValueError("input and output_q are contiguous")
    x = _silu_and_mul(input) if fuse_silu_and_mul else input
    if x.shape != output_q.shape or x.shape[-1] % group_size:
        raise ValueError(f"{list(x.shape)} into {list(output_q.shape)} in groups of {group_size}")
    groups = x.shape[-1] // group_size
    rows = x.shape[-2] if masked_m is not None else x.numel() // x.shape[-1]
    if output_s.shape[-2:] != (rows, -(-groups // 4) if packed else groups):
        raise ValueError(f"scales of {list(output_s.shape)} for {rows} rows of {groups} groups")
    if output_s.dtype != (torch.int32 if packed else torch.float32):
        raise TypeError(f"scales of {output_s.dtype}")
    if not (output_s.stride(-2) == 1 if turned else output_s.is_contiguous()):
        raise ValueError(f"scales in no layout that the kernel has: strides {output_s.stride()}")
    if masked_m is None:
        _quantise(x.reshape(rows, groups, group_size), output_q.view(rows, -1), output_s, packed, scale_ue8m0)
        return
    if groups % 16 or masked_m.dtype != torch.int32 or masked_m.shape != input.shape[:1]:
        raise ValueError(f"{groups} groups in a row, {masked_m.dtype} {list(masked_m.shape)} counts")
    for expert, count in enumerate(masked_m.tolist()):
        values = x[expert, :count].reshape(count, groups, group_size)
        _quantise(values, output_q[expert, :count], output_s[expert, :count], packed, scale_ue8m0)


def _quantise(x: Tensor, output_q: Tensor, output_s: Tensor, packed: bool, powers: bool) -> None:
    """`x` is `[rows, groups, group_size]`."""
    top = RANGES[output_q.dtype][1]
    largest = x.float().abs().amax(-1).clamp(min=_SMALLEST)
    scales = largest * torch.tensor(1.0 / top)  # the reciprocal is rounded to float32 first
    factors = top / largest
    if packed:
        exponents = ceil_log2(scales)
        factors = exp2(-exponents)
        write_exponents(exponents, output_s, clear=True)
    else:
        output_s.copy_(exp2(ceil_log2(scales)) if powers else scales)
    output_q.copy_(to_8bit(x.float() * factors.unsqueeze(-1), output_q.dtype).view(output_q.shape))


def _fused_call(draw: Draw, masked: bool) -> Call:
    from_dtype, dtype = draw.choice(*HALVES), draw.choice(*RANGES)
    group_size = draw.choice(128, 16, 32)
    experts = [draw.size(least=1, most=4)] if masked else []
    rows, groups = draw.size(least=1), 16 * draw.size(least=1, most=2) if masked else draw_groups(draw, True)
    shape = (*experts, rows, groups * group_size)
    x = draw.floats(*shape[:-1], 2 * shape[-1], dtype=from_dtype, layout="contiguous")
    q = draw.floats(*shape, dtype=dtype, layout="contiguous")
    s = draw_scales(draw, shape, group_size, "packed")
    counts = draw.integers(shape[0], low=0, high=shape[1] + 1, dtype=torch.int32) if masked else None
    return (x, q, s, group_size, 1e-10, *RANGES[dtype], True, True, counts), {}


def _arguments(draw: Draw) -> Call:
    mode = draw.choice("plain", "fused", "masked")
    if mode != "plain":
        return _fused_call(draw, mode == "masked")
    return (*valid(draw, inputs=HALVES, group_sizes=GROUP_SIZES, layouts=LAYOUTS), False, None), {}


def sgl_per_token_group_quant_8bit_v2(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    fuse_silu_and_mul: bool,
    masked_m: Tensor | None,
) -> None:
    """Writes `output_q` and `output_s`; returns nothing.

    `scale = max(1e-10, max |group|) / fp8_max`, `output_q = input / scale`, rounded to nearest for fp8 and towards zero
    for int8. With `scale_ue8m0` the scale is rounded up to a power of two: packed as exponent + 127 in the bytes of
    column-major int32, the bytes of groups that do not exist become 0; as row-major float32, the elements are
    quantised with the scale as it was before rounding.

    Args:
        input: float16 or bfloat16, contiguous, not empty: `[..., K]`; `[..., 2 * K]` fused, gate then up.
        output_q: `[..., K]`, float8_e4m3fn or int8, contiguous.
        output_s: scales of `rows` (all dimensions but the last) and `K // group_size` groups, 2 dimensions, in any
            layout of `group_scales`; `[experts, tokens, ...]`, packed, with `masked_m`.
        group_size: 16, 32, 64 or 128; divides K.
        eps: 1e-10.
        fp8_min, fp8_max: -448 and 448, or -128 and 127.
        fuse_silu_and_mul: quantises `silu(gate) * up`; needs packed scales.
        masked_m: int32 `[experts]`, for `input` `[experts, tokens, 2 * K]`: how many tokens of each there are; the
            others are not written. Needs `fuse_silu_and_mul`, and K to be a multiple of 16 groups.
    """
    torch._check(input.is_contiguous(), lambda: f"input must be contiguous; its strides are {list(input.stride())}")
    torch._check(
        output_q.is_contiguous(), lambda: f"output_q must be contiguous; its strides are {list(output_q.stride())}"
    )
    torch._check(input.dtype in HALVES, lambda: f"input has to be float16 or bfloat16, not {input.dtype}")
    torch._check(output_q.dtype in RANGES, lambda: f"output_q has to be float8_e4m3fn or int8, not {output_q.dtype}")
    torch._check(input.numel() > 0, lambda: "input must not be empty")
    torch._check(abs(eps - _SMALLEST) < 1e-13, lambda: f"eps has to be 1e-10, which the kernel has built in, not {eps}")
    low, high = RANGES[output_q.dtype]
    torch._check(
        fp8_min == low and fp8_max == high,
        lambda: f"fp8_min and fp8_max have to be {low} and {high} for {output_q.dtype}, not {fp8_min} and {fp8_max}",
    )
    torch._check(group_size in GROUP_SIZES, lambda: f"group_size has to be 16, 32, 64 or 128, not {group_size}")
    dimensions = 2 if masked_m is None else 3
    torch._check(
        output_s.dim() == dimensions, lambda: f"output_s has to have {dimensions} dimensions, not {output_s.dim()}"
    )
    torch._check(
        not fuse_silu_and_mul or (scale_ue8m0 and is_column_major(output_s)),
        lambda: "fuse_silu_and_mul needs packed UE8M0 scales: the kernel ignores it with others",
    )
    torch._check(
        masked_m is None or fuse_silu_and_mul, lambda: "masked_m needs fuse_silu_and_mul: the kernel ignores it without"
    )
    columns = output_q.shape[-1]
    torch._check(
        output_q.shape[:-1] == input.shape[:-1] and columns * (2 if fuse_silu_and_mul else 1) == input.shape[-1],
        lambda: (
            f"output_q has to have the shape of input, {list(input.shape)}, with the last dimension halved if "
            f"fuse_silu_and_mul; it is {list(output_q.shape)}"
        ),
    )
    torch._check(
        columns % group_size == 0,
        lambda: f"a row of output_q, {columns}, has to be a multiple of group_size {group_size}",
    )
    groups = columns // group_size
    if masked_m is not None:
        _check_masked(input, groups, masked_m)
    rows = math.prod(output_q.shape[:-1]) if masked_m is None else output_q.shape[-2]
    check_scales(output_s, rows, groups, ue8m0=scale_ue8m0)


def _check_masked(input: Tensor, groups: int, masked_m: Tensor) -> None:
    torch._check(
        masked_m.dtype == torch.int32 and masked_m.dim() == 1 and masked_m.shape[0] == input.shape[0],
        lambda: f"masked_m has to be int32 [{input.shape[0]}], not {masked_m.dtype} {list(masked_m.shape)}",
    )
    torch._check(groups % 16 == 0, lambda: f"with masked_m a row has to be a multiple of 16 groups, not {groups}")


def _bad_masked(groups: int, counts: Tensor) -> Callable[[Draw], Call]:
    packed = empty_scales((2, 4, groups * 16), 16, device="cpu", column_major=True, tma_aligned=True, ue8m0=True)
    return bad(
        10,
        input=torch.ones(2, 4, groups * 32, dtype=torch.bfloat16),
        output_q=torch.zeros(2, 4, groups * 16, dtype=torch.int8),
        output_s=packed.zero_(),
        group_size=16,
        scale_ue8m0=True,
        fuse_silu_and_mul=True,
        masked_m=counts,
    )


_TWO = torch.tensor([1, 2], dtype=torch.int32, device="cpu")
_REFUSES = all_refused(10) | {
    "input must not be empty": bad(
        10, input=torch.ones(0, 256).half(), output_q=torch.zeros(0, 256).char(), output_s=torch.zeros(0, 2)
    ),
    "eps has to be 1e-10": bad(10, eps=1e-6),
    "fp8_min and fp8_max have to be -128.0 and 127.0": bad(10, low=-127.0),
    "group_size has to be 16, 32, 64 or 128": bad(10, group_size=256, output_s=torch.zeros(3, 1)),
    "has to be a multiple of group_size 128": bad(
        10, input=torch.ones(3, 192).half(), output_q=torch.zeros(3, 192).char(), output_s=torch.zeros(3, 1)
    ),
    "fuse_silu_and_mul needs packed UE8M0 scales": bad(
        10, input=torch.ones(3, 512).half(), fuse_silu_and_mul=True, scale_ue8m0=True
    ),
    "masked_m needs fuse_silu_and_mul": bad(10, masked_m=_TWO, output_s=torch.zeros(1, 3, 2)),
    "masked_m has to be int32 [2]": _bad_masked(16, _TWO.long()),
    "a multiple of 16 groups": _bad_masked(8, _TWO),
}
_SCHEMA = (
    "sgl_kernel::sgl_per_token_group_quant_8bit_v2(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, "
    "float eps, float fp8_min, float fp8_max, bool scale_ue8m0, bool fuse_silu_and_mul, Tensor? masked_m) -> ()"
)


def _record(schema: str, *writes: str) -> FakeKernel:
    return FakeKernel(
        schema, sgl_per_token_group_quant_8bit_v2, _reference, SOURCE, LIBRARY, _arguments, _REFUSES, writes
    )


KERNELS = (_record(_SCHEMA),)
UNDECLARED = (_record(_SCHEMA.replace("Tensor!", "Tensor"), "output_q", "output_s"),)
