"""Operators whose older builds hide what they write: the record for that schema is taken, and shadowed."""

from __future__ import annotations

import pytest
import torch

from fake_kernels import FakeKernel, Registry, Shadowed
from fake_kernels.conformance import check
from fake_kernels.declare import declare
from fake_kernels.drawing import RandomDraw
from fake_kernels.library import find, load
from fake_kernels.shadow import shadow_of

OTHERS = [record for record in load() if find(record.op) is not record]


def test_there_are_some() -> None:
    """The per-token-group quantisation family, as sgl_kernel's builds for MUSA and XPU have it."""
    names = {record.op.removeprefix("sgl_kernel::sgl_per_token_") for record in OTHERS}
    assert {"group_quant_8bit", "group_quant_8bit_v2", "group_quant_fp8"} <= names


@pytest.mark.parametrize("record", OTHERS, ids=lambda record: record.op)
def test_it_is_shadowed_where_its_schema_is_the_one_registered(record: FakeKernel, musa: str) -> None:
    with declare([record.schema], {record.op: record.reference}):
        registry = Registry([find(record.op), record])
        assert isinstance(registry.settle()[record.op], Shadowed)
        made = shadow_of(record.op)
        assert made is not None
        check(record, device=musa, calls=3)
        args, kwargs = record.arguments(RandomDraw(0, musa, smallest=1))
        assert not kwargs
        torch.library.opcheck(made.op, args, test_utils=["test_faketensor", "test_aot_dispatch_dynamic"])
        registry.undo()
        assert shadow_of(record.op) is None
