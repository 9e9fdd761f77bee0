"""`acme::swiglu`: silu of the first half of the last dimension, times the second half.

The kernel here is written in torch, and serves the CPU and the device. The one in assembly is registered by Acme's
backend, under the same name, and has to do the same.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


@torch.library.custom_op("acme::swiglu", mutates_args=())
def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return (F.silu(gate) * value).contiguous()


@swiglu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    torch._check(x.shape[-1] % 2 == 0, lambda: f"swiglu halves the last dimension, and it is {x.shape[-1]}")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _keep_input(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
    gate, value = ctx.saved_tensors[0].chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return torch.cat([grad * value * (sigmoid + silu * (1 - sigmoid)), grad * silu], dim=-1)


swiglu.register_autograd(_backward, setup_context=_keep_input)


class SwiGLU(torch.nn.Module):
    """The feed-forward block of a decoder layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * hidden, bias=False)
        self.down = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.up(x)))
