"""`torch.compile(backend="piecewise")`: the same results, in pieces, each distinct one compiled once."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from fxpatch.errors import SplitError
from fxpatch.piecewise.backend import piecewise


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x).relu()
        return torch.nn.functional.softmax(x, -1) + x


def counting(compiled: list[str]) -> Callable[..., Any]:
    def compile_piece(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(str(gm.graph))
        return gm.forward

    return compile_piece


@pytest.mark.parametrize("device", ["cpu", "musa"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_gives_what_eager_gives(musa: str, device: str, dynamic: bool) -> None:
    model = torch.nn.Sequential(*[Block() for _ in range(4)]).to(device)
    compiled: list[str] = []
    options = {"split": ["softmax"], "compiler": counting(compiled)}
    run = torch.compile(model, backend=piecewise, fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for n in (3, 5):
            x = torch.randn(n, 8, device=device)
            torch.testing.assert_close(run(x).cpu(), model(x).cpu())
    assert len(compiled) == 3 * (1 if dynamic else 2), "the first, the last, and all between"
    torch._dynamo.reset()


def test_torch_finds_it_by_its_name() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="piecewise")
    assert found.value == "fxpatch.piecewise.backend:piecewise"


def test_options_that_there_are_not() -> None:
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(TypeError, match="has the options split and compiler, not sizes"):
        piecewise(gm, [torch.ones(2)], options={"sizes": [2]})
    with pytest.raises(SplitError, match="seen: 'no::such'"):
        piecewise(gm, [torch.ones(2)], options={"split": ["no::such"]})
