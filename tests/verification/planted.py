"""Models, and backends that are wrong in a known place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

WIDTH = 8


class Block(nn.Module):
    """A layer of a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.SiLU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Network(nn.Module):
    """Equal layers; counts its calls in a buffer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        for layer in self.layers:
            x = layer(x)
        return x


def network(depth: int = 3) -> Network:
    """With the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        return Network(depth).eval()


def rows(n: int = 4) -> torch.Tensor:
    """The same rows every time."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))


def _off(graph: torch.fx.Graph, node: Node) -> None:
    with graph.inserting_after(node):
        wrong = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.01))
    node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)


def wrong_at(place: int, least: int = 0) -> Callable[..., Any]:
    """A backend of Dynamo's graph that computes the silu with this number wrong, and right what has fewer, or not at
    least so many."""

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        silus = [node for node in gm.graph.nodes if node.target is torch.nn.functional.silu]
        if len(silus) > place and len(silus) >= least:
            _off(gm.graph, silus[place])
            gm.recompile()
        return gm.forward

    return backend


def wrong_backward(place: int) -> Callable[..., Any]:
    """A backend whose forward is right, and whose gradient is wrong at the silu with this number, counted from the
    model's beginning."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def backward(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        silus = [node for node in gm.graph.nodes if node.target is torch.ops.aten.silu_backward.default]
        if len(silus) > place:
            _off(gm.graph, silus[::-1][place])
            gm.recompile()
        return make_boxed_func(gm.forward)

    def forward(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(gm.forward)

    return aot_autograd(fw_compiler=forward, bw_compiler=backward)


def wrong_decomposition() -> Callable[..., Any]:
    """A backend that takes layer_norm apart in the wrong way: with n - 1 in the place of n."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def layer_norm(
        x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean = x.mean(-1, keepdim=True)
        scale = (x.var(-1, keepdim=True, correction=1) + eps).rsqrt()
        return (x - mean) * scale * weight + bias, mean, scale

    return aot_autograd(
        fw_compiler=lambda gm, _: make_boxed_func(gm.forward),
        decompositions={torch.ops.aten.native_layer_norm.default: layer_norm},
    )
