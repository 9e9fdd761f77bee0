"""Inductor on the simulated device: the CPU's results, forward and backward, static and dynamic, and inside graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own use of it, at import
]

Op = Callable[..., torch.Tensor]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high))


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(musa: str, op: Op, *inputs: torch.Tensor, compiled: Op | None = None, vary: tuple[int, ...] = ()) -> Op:
    """Compares a compiled `op` on the device with the eager one on the CPU; returns the compiled one.

    `vary`: the inputs whose first two sizes are dynamic.
    """
    compiled = compiled or torch.compile(op, fullgraph=True)
    here = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    there = [x.to(musa).requires_grad_(x.is_floating_point()) for x in inputs]
    for n in vary:
        torch._dynamo.mark_dynamic(there[n], (0, 1))
    want, got = op(*here), compiled(*there)
    assert got.device.type == musa
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-4)
    if want.requires_grad:
        want.square().sum().backward()
        got.square().sum().backward()
        for x, y in zip(here, there, strict=True):
            if x.grad is not None:
                assert y.grad is not None
                torch.testing.assert_close(y.grad.cpu(), x.grad, atol=1e-4, rtol=1e-3)
    return compiled


def attention(x: torch.Tensor, w: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Embedding, normalization, projections, causal attention, gather, and a reduction."""
    h = F.layer_norm(F.embedding(ids, table) + x, (8,))
    q, k, v = (h @ w).chunk(3, -1)
    heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
    h = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    picked = h[:, ids[0] % 3]
    return picked.softmax(-1).cumsum(1).sum(0)


def test_transformer_operators_with_static_and_dynamic_shapes(musa: str) -> None:
    weights = (randn(8, 24), randn(10, 8))
    check(musa, attention, randn(2, 6, 8), *weights, ints(10, 2, 6))
    torch._dynamo.reset()
    compiled = check(musa, attention, randn(2, 6, 8), *weights, ints(10, 2, 6), vary=(0, 3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 9), (4, 7)):
            inputs = (randn(batch, length, 8), *weights, ints(10, batch, length))
            check(musa, attention, *inputs, compiled=compiled, vary=(0, 3))


def test_vision_operators(musa: str) -> None:
    def op(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.batch_norm(F.conv2d(x, w, padding=1), None, None, training=True))
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
        return F.conv_transpose2d(F.interpolate(F.group_norm(x, 2), scale_factor=2, mode="bilinear"), v)

    check(musa, op, randn(2, 3, 8, 8), randn(4, 3, 3, 3), randn(4, 2, 3, 3))


def test_scatters_sorts_and_masks(musa: str) -> None:
    def op(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        x = x.clone().index_put_((i[0],), x[:3], accumulate=True)
        x = torch.zeros_like(x).scatter_add(1, i.expand(8, -1), x[:, :3])
        top = x.topk(2).values + x.sort(-1).values[:, :2] + torch.arange(2, device=x.device)
        return torch.where(top > 0, top, torch.full((), 0.5, device=x.device)).amax(0)

    check(musa, op, randn(8, 8), ints(8, 1, 3))


def test_a_graph_within_a_graph(musa: str) -> None:
    def op(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.sin() * 2, lambda t: t.cos(), (x,))

    compiled = torch.compile(op, fullgraph=True)
    for x in (torch.ones(4), -torch.ones(4)):
        torch.testing.assert_close(compiled(x.to(musa)).cpu(), op(x))


def test_host_and_device_in_one_graph(musa: str) -> None:
    def op(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * scale
        return y, (y.sum(0).cpu() + 1).sqrt()

    x, scale = randn(4, 8).abs(), torch.tensor(3.0)
    device, host = torch.compile(op, fullgraph=True)(x.to(musa), scale)
    assert (device.device.type, host.device.type) == (musa, "cpu")
    torch.testing.assert_close((device.cpu(), host), op(x, scale))


def test_in_place_and_random(musa: str) -> None:
    @torch.compile(fullgraph=True)
    def op(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return F.dropout(x)

    x = torch.ones(1000, device=musa)
    torch.manual_seed(1)
    first = op(x)
    assert x.eq(2).all()
    assert set(first.tolist()) == {0, 4}
    torch.manual_seed(1)
    assert torch.equal(op(x), first * 2)
    assert not torch.equal(op(x), first * 4)


def test_an_index_out_of_bounds_raises(musa: str) -> None:
    compiled = torch.compile(lambda x, i: x[i] * 2, fullgraph=True)
    x = torch.ones(4, 3, device=musa)
    assert compiled(x, torch.tensor([3, -1], device=musa)).eq(2).all()
    with pytest.raises(RuntimeError, match="index out of bounds"):
        compiled(x, torch.tensor([3, 4], device=musa))


def test_compiled_kernels_are_captured(musa: str) -> None:
    op = torch.compile(attention, fullgraph=True)
    inputs = [t.to(musa) for t in (randn(2, 6, 8), randn(8, 24), randn(10, 8), ints(10, 2, 6))]
    with torch.no_grad():
        op(*inputs)
        static = [torch.zeros_like(t) for t in inputs]
        graph = torch.musa.MUSAGraph()
        with torch.musa.graph(graph):
            y = op(*static)
        assert torch.isnan(y).all()
        assert graph.launches > 1
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        torch.testing.assert_close(y, attention(*inputs), atol=1e-5, rtol=1e-4)


def test_a_training_step(musa: str) -> None:
    def step(net: torch.nn.Module, x: torch.Tensor, compiled: bool) -> list[torch.Tensor]:
        def loss(x: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(net(x), torch.arange(len(x), device=x.device) % 3)

        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        run = torch.compile(loss, fullgraph=True) if compiled else loss
        for _ in range(3):
            optimizer.zero_grad()
            run(x).backward()
            optimizer.step()
        return [p.detach().cpu() for p in net.parameters()]

    x, results = randn(6, 1, 8, 8), []
    for device, compiled in (("cpu", False), (musa, True)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(72, 3))
        results.append(step(net.to(device), x.to(device), compiled))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)
