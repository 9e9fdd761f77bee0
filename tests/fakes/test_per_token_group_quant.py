"""What per-token-group quantisation writes, read as its kernel addresses it, and the function that a model calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fake_kernels.library import quantisation_sgl, quantisation_sgl_v2
from fake_kernels.library.group_scales import empty_scales
from fake_kernels.library.per_token_group_quant import per_token_group_quant

V1, V2 = quantisation_sgl.KERNELS[0].reference, quantisation_sgl_v2.KERNELS[0].reference
FP8, SIZE = torch.float8_e4m3fn, 16


def quantised(version: int, x: Tensor, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """Elements, and one scale per group: out of the memory, by the arithmetic of the CUDA source."""
    rows, columns = x.shape
    groups = columns // SIZE
    turned, packed = layout in ("columns", "aligned", "packed"), layout == "packed"
    s = empty_scales(
        x.shape, SIZE, device="cpu", column_major=turned, tma_aligned=layout in ("aligned", "packed"), ue8m0=packed
    )
    q, low, high = torch.empty(x.shape, dtype=dtype), *((-448.0, 448.0) if dtype == FP8 else (-128.0, 127.0))
    args = (x, q, s, SIZE, 1e-10, low, high, packed)
    V1(*args) if version == 1 else V2(*args, False, None)
    memory = torch.empty(0, dtype=s.dtype).set_(s.untyped_storage()).view(torch.uint8 if packed else torch.float32)
    scales = torch.empty(rows, groups)
    for row in range(rows):
        for group in range(groups):
            if packed:
                byte = memory[(group // 4) * s.stride(1) * 4 + row * 4 + group % 4]
                scales[row, group] = math.ldexp(1.0, int(byte) - 127)
            else:
                scales[row, group] = memory[group * s.stride(1) + row if turned else row * groups + group]
    return q, scales


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
@pytest.mark.parametrize("layout", ["rows", "columns", "aligned", "packed"])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_elements_times_scales_are_what_was_quantised(version, dtype, layout, rows):
    x = torch.randn(rows, 6 * SIZE, generator=torch.Generator().manual_seed(rows)).bfloat16()
    x[0, :SIZE] = 0
    q, scales = quantised(version, x, dtype, layout)
    top = 448.0 if dtype == FP8 else 127.0
    for row in range(rows):
        for group in range(6):
            part = [float(v) for v in x[row, group * SIZE : (group + 1) * SIZE]]
            exact = max(1e-10, *map(abs, part)) / top
            scale = float(scales[row, group])
            if layout == "packed":
                exact = max(exact, 1e-10) if version == 1 else exact  # the first bounds the scale once more
                assert scale / 2 < exact <= scale
                assert math.frexp(scale)[0] == 0.5
            else:
                assert scale == pytest.approx(exact, rel=1e-6)
            for value, element in zip(part, q[row, group * SIZE : (group + 1) * SIZE].float().tolist(), strict=True):
                if dtype == FP8:  # 3 bits behind the point; below the smallest normal number, its last bit
                    assert element * scale == pytest.approx(value, rel=2**-4, abs=2**-10 * scale)
                else:  # towards zero
                    assert -1e-5 <= (value - element * scale) / scale * math.copysign(1, value) <= 1.01


def test_the_second_version_clears_the_bytes_of_groups_that_do_not_exist_and_the_first_leaves_them():
    x = torch.ones(2, 3 * SIZE).half()
    for version, left in ((1, 0x55), (2, 0)):
        s = empty_scales(x.shape, SIZE, device="cpu", column_major=True, tma_aligned=True, ue8m0=True).fill_(0x55555555)
        args = (x, torch.empty(x.shape, dtype=FP8), s, SIZE, 1e-10, -448.0, 448.0, True)
        V1(*args) if version == 1 else V2(*args, False, None)
        assert (s.clone(memory_format=torch.contiguous_format).view(torch.uint8)[:, 3] == left).all()


def test_of_padded_experts_only_the_rows_that_there_are_are_written():
    x = torch.randn(2, 3, 2 * 16 * SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = torch.full((2, 3, 16 * SIZE), 7, dtype=torch.int8)
    s = empty_scales(q.shape, SIZE, device="cpu", column_major=True, tma_aligned=True, ue8m0=True).fill_(-1)
    V2(x, q, s, SIZE, 1e-10, -128.0, 127.0, True, True, torch.tensor([1, 3], dtype=torch.int32))
    assert (q[0, 1:] == 7).all()
    assert (s[0, 1:] == -1).all()
    gate, up = x[1].float().chunk(2, -1)
    exponents = s[1].clone(memory_format=torch.contiguous_format).view(torch.uint8).float() - 127
    found = q[1].float() * (2**exponents).repeat_interleave(SIZE, -1)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, atol=0.05, rtol=0.05)


def test_without_the_operators_it_says_which_it_looked_for(fresh: Callable[..., str]):
    told = fresh("""
        import torch
        from fake_kernels.errors import UnknownOperatorError
        from fake_kernels.library.per_token_group_quant import per_token_group_quant
        try:
            per_token_group_quant(torch.ones(2, 256).bfloat16(), 128)
        except UnknownOperatorError as error:
            print(error)
    """)
    assert "none of sgl_per_token_group_quant_8bit_v2, sgl_per_token_group_quant_8bit" in told
    assert "import sgl_kernel first" in told


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((4, 200), {}, "cut into groups"),
        ((4, 256), {"dtype": torch.uint8}, "float8_e4m3fn or torch.int8"),
        ((4, 512), {"fuse_silu_and_mul": True}, "needs column-major UE8M0"),
        ((4, 256), {"masked_m": torch.ones(4)}, "masked_m needs fuse_silu_and_mul"),
        ((2, 4, 256), {"column_major_scales": True}, "x of 2 dimensions"),
    ],
)
def test_what_does_not_go_together_is_refused(shape, options, words):
    with pytest.raises(ValueError, match=words):
        per_token_group_quant(torch.ones(shape).bfloat16(), 128, **options)
    with pytest.raises(ValueError, match="contiguous"):
        per_token_group_quant(torch.ones(256, 4).t(), 128)


COMPILED = """
import itertools, torch
from fake_kernels.library import quantisation_sgl, quantisation_sgl_v2
from fake_kernels.library.per_token_group_quant import per_token_group_quant
from fake_kernels.shadow import shadow

declared = {declared}
library = torch.library.Library("sgl_kernel", "FRAGMENT")
for module in (quantisation_sgl, quantisation_sgl_v2):
    kernel = (module.KERNELS if declared else module.UNDECLARED)[0]
    name = kernel.op.split("::")[1]
    library.define(kernel.schema.split("::")[1])
    library.impl(name, kernel.reference, "CPU")
    if declared:
        torch.library.register_fake(kernel.op, kernel.fn, lib=library)
    else:
        shadow(kernel.op, mutates_args=kernel.writes, fake=kernel.fn, device="cpu")

def run(x, group_size, dtype, column_major, aligned, powers, fused):
    q, s = per_token_group_quant(x, group_size, 1e-10, dtype, column_major, aligned, powers, fused)
    return q, s, q.float().sum()

layouts = [(False, False, False), (True, False, False), (True, True, False), (True, True, True), (False, False, True)]
count = 0
for group_size, dtype, layout, rows in itertools.product((128, 8), (torch.float8_e4m3fn, torch.int8), layouts, (5, 8)):
    for fused in (False, True) if layout == (True, True, True) and group_size == 128 else (False,):
        if group_size == 8 and layout == (False, False, True):
            continue  # row-major powers of two need the second version, which has no groups of 8
        groups = 6 if group_size == 128 else 8  # the first version leaves bytes unwritten where there are not 4 to fill
        x = torch.randn(rows, groups * group_size * (2 if fused else 1)).bfloat16()
        torch._dynamo.reset()
        args = (x, group_size, dtype, *layout, fused)
        told = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)(*args)
        found = run(*args)
        length = (rows + 3) // 4 * 4
        shape, strides = {{
            (False, False): ((rows, groups), (groups, 1)),
            (True, False): ((rows, groups), (1, rows)),
            (True, True): ((rows, 2 if layout[2] else groups), (1, length)),
        }}[layout[:2]]
        for q, s, total in (told, found):
            assert (q.shape, q.dtype) == ((rows, groups * group_size), dtype)
            assert (s.shape, s.stride()) == (shape, strides)
            assert s.dtype == (torch.int32 if layout == (True, True, True) else torch.float32)
        assert torch.equal(told[0].view(torch.uint8), found[0].view(torch.uint8)) and torch.equal(told[1], found[1])
        count += 1
print(count)
"""


@pytest.mark.parametrize("declared", [True, False])
def test_it_compiles_without_a_break_and_allocates_what_sglang_does(fresh: Callable[..., str], declared: bool):
    assert fresh(COMPILED.format(declared=declared)).split()[-1] == "40"
