"""Hypothesis strategies for the calls of an operator, from the record of its fake kernel.

@given(call=calls(record, device="musa"))
def test_my_operator(call): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

from fake_kernels.drawing import Draw
from fake_kernels.kernel import Call, FakeKernel

T = TypeVar("T")


class HypothesisDraw(Draw):
    """Chooses as Hypothesis does: what fails shrinks to the first options and the plainest sizes."""

    def __init__(self, draw: st.DrawFn, device: str = "cpu", smallest: int = 0) -> None:
        super().__init__(device, smallest)
        self._draw = draw

    def _choose(self, options: Sequence[T]) -> T:
        return self._draw(st.sampled_from(list(options)))


@st.composite
def calls(draw: st.DrawFn, record: FakeKernel, *, device: str = "cpu") -> Call:
    """Arguments that the operator accepts, made on `device`."""
    return record.arguments(HypothesisDraw(draw, device))


@st.composite
def draws(draw: st.DrawFn, *, device: str = "cpu", smallest: int = 0) -> HypothesisDraw:
    """What `FakeKernel.arguments` takes. Its choices are made as it is used: inside the test."""
    return HypothesisDraw(draw, device, smallest)
