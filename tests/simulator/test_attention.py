"""Attention is fused where the CPU fuses it, with the CPU's bits, in every mode; and composed where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = "aten::_scaled_dot_product_fused_attention_overrideable"


class Seen(TorchDispatchMode):
    """The operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    """Three float32 tensors [2, 4, 16, 8] on the CPU that want gradients."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 16, 8, generator=random).requires_grad_() for _ in range(3)]


def gradients(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], where: str) -> list[torch.Tensor]:
    """The result and the gradients of its sum of squares, on the CPU."""
    leaves = [x.detach().to(where).requires_grad_() for x in inputs]
    result = function(*leaves)
    result.square().sum().backward()
    return [result.detach().cpu(), *(x.grad.cpu() for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_cpus_bits(musa: str, qkv: list[torch.Tensor], dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype) for x in qkv]
    want, got = gradients(causal, inputs, "cpu"), gradients(causal, inputs, musa)
    assert len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(causal(*(x.to(musa) for x in inputs)).cpu(), want[0])


def test_grouped_heads_have_the_cpus_bits(musa: str, qkv: list[torch.Tensor]) -> None:
    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    inputs = [qkv[0].detach(), *(x.detach()[:, :2] for x in qkv[1:])]
    want, got = gradients(grouped, inputs, "cpu"), gradients(grouped, inputs, musa)
    assert len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with Seen() as seen, torch.no_grad():
        grouped(*(x.to(musa) for x in inputs))
    assert FUSED in seen.names


def test_what_is_fused(musa: str, qkv: list[torch.Tensor]) -> None:
    q, k, v = (x.detach().to(musa) for x in qkv)
    with Seen() as plain, torch.no_grad():
        causal(q, k, v)
    assert FUSED in plain.names
    bias = torch.zeros(16, 16, device=musa, requires_grad=True)
    with Seen() as others:
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    with others, torch.no_grad():
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        F.scaled_dot_product_attention(q[0], k[0], v[0])
        with sdpa_kernel(SDPBackend.MATH):
            causal(q, k, v)
    assert FUSED not in others.names


@pytest.mark.parametrize("shape", [(16, 16), (2, 1, 1, 16), (1, 4, 16, 16)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_have_the_cpus_bits(
    musa: str, qkv: list[torch.Tensor], shape: tuple[int, ...], kind: torch.dtype
) -> None:
    random = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    mask = random > 0.3 if kind is torch.bool else random

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device))

    want, got = gradients(masked, qkv, "cpu"), gradients(masked, qkv, musa)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_mask_that_wants_a_gradient_gets_it(musa: str, qkv: list[torch.Tensor]) -> None:
    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    inputs = [*qkv, torch.zeros(16, 16)]
    want, got = gradients(biased, inputs, "cpu"), gradients(biased, inputs, musa)
    assert len(got) == 5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_it_can_be_captured(musa: str, qkv: list[torch.Tensor]) -> None:
    q, k, v = (x.detach().to(musa) for x in qkv)
    graph = torch.musa.MUSAGraph()
    with torch.no_grad(), torch.musa.graph(graph):
        result = causal(q, k, v)
    graph.replay()
    assert torch.equal(result.cpu(), causal(*qkv))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_it_can_be_mapped(musa: str, qkv: list[torch.Tensor]) -> None:
    inputs = [x.detach().expand(3, *x.shape) for x in qkv]
    got = torch.func.vmap(causal)(*(x.to(musa) for x in inputs))
    torch.testing.assert_close(got.cpu(), torch.func.vmap(causal)(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(musa: str, qkv: list[torch.Tensor], backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(causal, backend=backend, fullgraph=True, dynamic=dynamic)
    want, got = gradients(causal, qkv, "cpu"), gradients(compiled, qkv, musa)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
