"""Models and graphs that hold devices and tensors in every place where a graph can hold them."""

from __future__ import annotations

from typing import Any

import torch


class Model(torch.nn.Module):
    """Tied parameters, submodules, buffers, a constant, and devices in arguments, keywords, strings and results."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.rest = torch.nn.Sequential(torch.nn.GELU(), torch.nn.LayerNorm(4), torch.nn.LSTM(4, 4, batch_first=True))
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("offset", torch.ones(4), persistent=False)
        self.device = torch.device(device)
        self.to(device)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.second(self.first(x)) * self.scale + self.offset
        table = torch.arange(x.shape[0], device=self.device)
        here = y.to("cpu").to(device=self.device).to(str(self.device))
        return {
            "y": self.rest(here.unsqueeze(0))[0],
            "table": table[:, None] + torch.zeros(2, dtype=torch.int64, device=x.device),
            "more": (here[..., 1:3].sum(-1), [y.dtype, slice(None, 2), 1.5, float("inf"), 1 + 2j, None, "musa:0"]),
        }


class Plain(torch.nn.Module):
    """Linear layers with a literal device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0))
        self.device = torch.device(device)
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(self.linear(x)) + self.shift
        return y + torch.ones(3, device=self.device, dtype=torch.float64).to(x.dtype)


def traced(model: torch.nn.Module) -> torch.fx.GraphModule:
    """A graph of it, with factories and sizes in it."""

    class Tracer(torch.fx.Tracer):
        proxy_buffer_attributes = True

    graph = Tracer().trace(model)
    return torch.fx.GraphModule(model, graph)


def with_literal(device: torch.device) -> torch.fx.GraphModule:
    """A graph that puts `x` and a new tensor on a literal device."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    ones = graph.call_function(torch.ones, (3,), {"device": device})
    moved = graph.call_method("to", (x, device))
    graph.output((graph.call_function(torch.add, (moved, ones)), {"where": [device]}))
    return torch.fx.GraphModule({}, graph)


def assert_same(found: Any, wanted: Any, to: str | None = None) -> None:
    """Equal trees: tensors close (on the device `to`, where it is another), devices as mapped, all else equal."""
    if isinstance(wanted, torch.Tensor):
        assert found.device.type == (to or wanted.device.type)
        torch.testing.assert_close(found.cpu(), wanted.cpu())
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key], to)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, to)
    else:
        assert type(found) is type(wanted)
        assert found == wanted
