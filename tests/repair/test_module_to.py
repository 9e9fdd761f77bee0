"""`Module.to(device)` moves parameters in place, as on CUDA; a device that lacks the operator for it is repaired."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpatch.repair import module_to

TIED = """
    import torch
    from torch import nn

    def moved():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(2))
        model[1].weight = model[0].weight
        tied = model[0].weight
        optimizer = torch.optim.SGD(list(model[:2].parameters()), lr=0.1)
        model.to("musa")
        return model, tied, optimizer
"""
KEPT = (
    TIED
    + """
    def check():
        model, tied, optimizer = moved()
        assert model[0].weight is tied is model[1].weight and tied.is_musa
        model(torch.randn(3, 4, device="musa")).sum().backward()
        before = tied.detach().clone()
        optimizer.step()
        assert not torch.equal(tied, before)
        model.cpu()
        assert model[0].weight is tied and tied.is_cpu and tied.grad.is_cpu
    """
)


def test_the_simulated_device_keeps_them(fresh: Callable[..., str]) -> None:
    fresh(
        KEPT
        + """
    import fxpatch
    fxpatch.simulate("musa")
    check()
    with fxpatch.install("musa") as installation:
        assert "the device says" in installation.outcomes["module-to-in-place"].reason
    """
    )


def test_a_device_that_lacks_the_operator_is_repaired(fresh: Callable[..., str]) -> None:
    """Without the repair the tie is lost without a word; with it all is kept; after uninstall() all is as before."""
    fresh(
        KEPT
        + """
    import fxpatch
    fxpatch.simulate("musa", without=("module_to",))
    model, tied, optimizer = moved()
    assert model[0].weight is not model[1].weight
    with fxpatch.install("musa") as installation:
        assert type(installation.outcomes["module-to-in-place"]).__name__ == "Applied"
        check()
    assert moved()[0][0].weight is not moved()[1]
    """
    )


@pytest.mark.parametrize(
    ("moving", "reason"),
    [
        (module_to.Moving(private=False, module=True, registered=False), "torch moves parameters"),
        (module_to.Moving(private=True, module=True, registered=True), "the device says"),
        (module_to.Moving(private=True, module=False, registered=False), "may still register"),
        (module_to.Moving(private=True, module=True, registered=False), "says nothing"),
    ],
)
def test_when_it_is_needed(moving: module_to.Moving, reason: str) -> None:
    assert reason in module_to.PATCH.decide(moving).reason


def test_only_dense_tensors_change_places(musa: str) -> None:
    dense, sparse = torch.ones(2, device=musa), torch.ones(2).to_sparse()
    assert torch._has_compatible_shallow_copy_type(torch.ones(2), dense)
    assert not torch._has_compatible_shallow_copy_type(sparse, dense)
    assert not torch._has_compatible_shallow_copy_type(torch.ones(2, device="meta"), dense)
