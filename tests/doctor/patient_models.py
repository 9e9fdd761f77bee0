"""Models for the probes that ask about a model's operators: one that is healthy, and one for each fault.

The operators are a vendor's, `oot::`: they are defined where they are imported, with a kernel for the device.
"""

from __future__ import annotations

from typing import Any

import torch

Call = tuple[Any, tuple[Any, ...]]
library = torch.library.Library("oot", "DEF")
library.define("scale(Tensor x) -> Tensor")
library.define("narrow(Tensor x) -> Tensor")
library.define("unknown(Tensor x) -> Tensor")
library.define("fill(Tensor x, Tensor out) -> Tensor")
library.define("store(Tensor x, Tensor out) -> ()")


def _fill(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.copy_(x)
    return x * 2


for name, kernel in {
    "scale": lambda x: (x * 2).contiguous(),
    "narrow": lambda x: (x * 2).to(torch.float16),
    "unknown": lambda x: x * 2,
    "fill": _fill,
    "store": lambda x, out: out.copy_(x) and None,
}.items():
    library.impl(name, kernel, "PrivateUse1")
for name in ("scale", "narrow"):
    torch.library.register_fake(f"oot::{name}", lambda x: torch.empty_like(x), lib=library)
torch.library.register_fake("oot::fill", lambda x, out: torch.empty_like(x), lib=library)


def forget_a_write() -> None:
    """A fake kernel for an operator that returns nothing and hides what it writes: SGLang's mistake."""
    torch.library.register_fake("oot::store", lambda x, out: None, lib=library)


def healthy() -> Call:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.norm = torch.nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.linear(x)).relu().t().softmax(-1)
            return torch.ops.oot.scale(y.contiguous()) + torch.arange(3, device=x.device) * y[:, :1]

    return Model(), (torch.randn(3, 4),)


def wrong_dtype() -> Call:
    return lambda x: torch.ops.oot.narrow(x), (torch.ones(3),)


def no_fake() -> Call:
    return lambda x: torch.ops.oot.unknown(x), (torch.ones(3),)


def hidden_write() -> Call:
    return lambda x: torch.ops.oot.fill(x, torch.zeros_like(x)), (torch.ones(3),)


def wrong_strides() -> Call:
    return lambda x: torch.ops.oot.scale(x.t()), (torch.ones(3, 4),)
