"""`simulate(..., without=...)`: a device that lacks what some real device lacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpatch.errors import SimulatorError
from fxpatch.simulator import gaps, simulate


def test_a_gap_has_a_name_and_says_what_is_missing(musa: str) -> None:
    assert set(gaps.GAPS) == {"autocast", "inductor", "module_to"}
    with pytest.raises(SimulatorError, match=r"without=autocasts, graphs") as caught:
        simulate(musa, without=("autocasts", "graphs"))
    assert caught.value.expected == "some of autocast, module_to, inductor"


def test_what_a_device_has_cannot_be_taken_away_later(musa: str) -> None:
    with pytest.raises(SimulatorError, match=r"'musa' is simulated already") as caught:
        simulate(musa, without=("autocast",))
    assert caught.value.seen == "without=(autocast)"
    assert caught.value.expected == "without=(), as the first time"
    assert simulate(musa) is simulate(musa, without=()) is torch.musa


@pytest.mark.slow
def test_what_is_left_out_is_not_there(fresh: Callable[..., str]) -> None:
    fresh("""
        import torch
        from fxpatch.simulator import simulate
        from fxpatch.errors import SimulatorError
        module = simulate("musa", without=("autocast", "inductor"))
        assert simulate("musa") is simulate("musa", without=("inductor", "autocast")) is module
        try:
            simulate("musa", without=())
        except SimulatorError as error:
            assert error.expected == "without=(autocast, inductor), as the first time"
        else:
            raise AssertionError
        assert not torch._C._dispatch_has_backend_fallback("AutocastPrivateUse1")
        import torch._inductor.compile_fx
        from torch._inductor.codegen.common import get_scheduling_for_device
        assert get_scheduling_for_device("musa") is None
    """)
