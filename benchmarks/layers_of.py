"""The models that benchmarks/piecewise.py measures: decoders whose attention is a splitting operator, and a diffusion
transformer of diffusers' own."""

from __future__ import annotations

import torch
from torch import nn

LIBRARY = torch.library.Library("bench_piecewise", "FRAGMENT")
LIBRARY.define("nothing(Tensor q, Tensor(a!) out) -> ()")
LIBRARY.impl("nothing", lambda q, out: None, "CompositeExplicitAutograd")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out) -> ()")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    shape = (1, q.shape[0], -1, 64)
    heads = [each.view(shape).transpose(1, 2) for each in (q, k, v)]
    found = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    out.copy_(found.transpose(1, 2).reshape(q.shape))


LIBRARY.impl("attention", attend, "CompositeExplicitAutograd")
SPLIT = ["bench_piecewise::attention", "bench_piecewise::nothing"]


class Empty(nn.Module):
    """A graph piece and a splitting operator that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.linear(x)
        out = torch.empty_like(q)
        torch.ops.bench_piecewise.nothing.default(q, out)
        return x + out


class Decoder(nn.Module):
    """A pre-norm decoder layer on tokens `[n, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        seen = torch.empty_like(q)
        torch.ops.bench_piecewise.attention.default(q, k, v, seen)
        x = x + self.out(seen)
        gate, up = self.up(self.second(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def decoder(depth: int, width: int) -> nn.Module:
    """`depth` equal layers."""
    torch.manual_seed(depth)
    return nn.Sequential(*[Decoder(width) for _ in range(depth)]).eval()


def diffusion_transformer(depth: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """diffusers' DiT, and an example of eight noisy latents `[8, 4, 16, 16]`."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(depth)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=depth, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(8, 4, 16, 16),
        "timestep": torch.arange(8),
        "class_labels": torch.arange(8),
    }
    return model.eval(), example
