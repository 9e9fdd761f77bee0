"""A module of somebody else's pipeline, run in pieces: equal, and otherwise as it was."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpatch.engines.whole_module import run_in_pieces
from fxpatch.errors import AlreadyInstalledError, InputError

ROOT = Path(__file__).resolve().parents[2]


class Denoiser(torch.nn.Module):
    """As a pipeline calls one: by keywords, with a time that all rows share, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        found = self.outer(torch.tanh(self.inner(sample) + timestep))
        found = found if encoder is None else found + encoder.mean(1)
        return {"sample": found} if return_dict else (found,)


def built(device: str) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().to(device)


def call(module: torch.nn.Module, n: int, device: str, time: float = 0.5) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(n)
    sample, encoder = torch.randn(n, 4, generator=drawn), torch.randn(n, 3, 4, generator=drawn)
    with torch.no_grad():
        return module(
            sample=sample.to(device),
            timestep=torch.tensor(time).to(device),
            encoder=encoder.to(device),
            return_dict=False,
        )[0]


OPTIONS: dict[str, Any] = {"dynamic": {"sample": 0, "encoder": 0}, "sizes": [2, 4], "compiler": "eager"}


@pytest.mark.parametrize("first", [1, 3])
def test_calls_are_replayed(musa: str, first: int) -> None:
    """Also where the first call, which is the example, has one row only."""
    module = built(musa)
    with run_in_pieces(module, **OPTIONS) as attached:
        for n in (first, 1, 2, 3, 4, 1):
            for time in (0.5, 0.25):
                expected = call(built("cpu"), n, "cpu", time)
                torch.testing.assert_close(call(module, n, musa, time).cpu(), expected, rtol=1e-5, atol=1e-6)
        assert attached.runner is not None
        assert attached.runner.counts == {"captured": 12}


def test_results_can_be_kept(musa: str) -> None:
    """As a solver with a history does; with clone_outputs=False this test fails, and says so."""
    reference, module = built("cpu"), built(musa)
    for clones in (True, False):
        with run_in_pieces(module, **OPTIONS, clone_outputs=clones):
            kept = [call(module, 4, musa, time) for time in (0.1, 0.9)]
            equal = torch.allclose(kept[0].cpu(), call(reference, 4, "cpu", 0.1), atol=1e-6)
            assert equal == clones
        assert "forward" not in vars(module)
        kept.clear()


def test_it_stays_the_module_that_it_was(musa: str) -> None:
    module = built(musa)
    before, signature, names = dict(vars(module)), inspect.signature(module.forward), dict(module.named_parameters())
    hooked: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: hooked.append("before")),
        module.register_forward_hook(lambda *_: hooked.append("after")),
        module.inner.register_forward_hook(lambda *_: None),
    ]
    attached = run_in_pieces(module, **OPTIONS)
    assert inspect.signature(module.forward) == signature
    assert dict(module.named_parameters()).keys() == names.keys()
    call(module, 3, musa)
    call(module, 9, musa)  # which goes to the original function
    assert hooked == ["before", "after"] * 2
    with pytest.raises(AlreadyInstalledError, match="Calls of this Denoiser go through a runner already"):
        run_in_pieces(module, **OPTIONS)
    attached.undo()
    attached.undo()
    for handle in handles:
        handle.remove()
    assert vars(module).keys() == before.keys()
    torch.testing.assert_close(call(module, 3, musa).cpu(), call(built("cpu"), 3, "cpu"), rtol=1e-5, atol=1e-6)


def test_a_forward_that_somebody_has_replaced_comes_back(musa: str) -> None:
    module = built(musa)
    own = module.forward

    def theirs(sample: torch.Tensor, timestep: torch.Tensor, encoder: Any = None, return_dict: bool = True) -> Any:
        return tuple(2 * each for each in own(sample, timestep, encoder, return_dict=False))

    module.forward = theirs  # type: ignore[assignment]
    with run_in_pieces(module, **OPTIONS):
        doubled = call(module, 3, musa)
    assert module.forward is theirs
    torch.testing.assert_close(doubled.cpu(), 2 * call(built("cpu"), 3, "cpu"), rtol=1e-5, atol=1e-6)


def test_a_call_of_another_form_is_an_error(musa: str) -> None:
    module = built(musa)
    with run_in_pieces(module, **OPTIONS):
        call(module, 3, musa)
        with pytest.raises(InputError, match="This call is not the one that was prepared"):
            module(sample=torch.randn(3, 4).to(musa), timestep=torch.tensor(0.5).to(musa), return_dict=False)


@pytest.mark.slow
def test_the_example() -> None:
    done = subprocess.run(
        [sys.executable, "examples/diffusers_pipeline.py", "--layers", "1", "--steps", "3", "--compiler", "eager"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"OK: 4 pictures on musa, (\d+) of \1 steps replayed; at most [01] of 255 levels", done.stdout)
