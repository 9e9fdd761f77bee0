"""`make_graphed_callables`: what is graphed computes what it computed before, forward and backward, and learns so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from garbage import collect
from torch import nn

from fxpatch.simulator.memory import ledger


def on_host(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(n))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got.detach().cpu(), want.detach().cpu())


def test_a_function(musa: str) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y).sin().sum(-1)

    samples = tuple(torch.zeros(3, 4, device=musa, requires_grad=True) for _ in range(2))
    graphed = torch.musa.make_graphed_callables(f, samples)
    for n in range(3):
        hosts = [on_host(n, 3, 4).requires_grad_(), on_host(n + 9, 3, 4).requires_grad_()]
        there = [x.detach().to(musa).requires_grad_() for x in hosts]
        want, got = f(*hosts), graphed(*there)
        same(got, want)
        (want * 3).sum().backward()
        (got * 3).sum().backward()
        for x, y in zip(there, hosts, strict=True):
            same(x.grad, y.grad)


def test_calls_replay_and_do_not_run_the_function(musa: str) -> None:
    calls = []

    def f(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    graphed = torch.musa.make_graphed_callables(f, (torch.zeros(2, device=musa),), num_warmup_iters=2)
    assert len(calls) == 3
    assert graphed(torch.ones(2, device=musa)).tolist() == [2, 2]
    assert len(calls) == 3


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p)])
def test_training_a_graphed_module_is_training_it_on_the_cpu(musa: str, make: Callable[..., Any]) -> None:
    host, device = net(), net().to(musa)
    torch.musa.make_graphed_callables(device, (torch.zeros(5, 4, device=musa),))
    optimizers = make(host.parameters()), make(device.parameters())
    for step in range(5):
        x = on_host(step, 5, 4)
        for model, optimizer, batch in ((host, optimizers[0], x), (device, optimizers[1], x.to(musa))):
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(model(batch), batch).backward()
            optimizer.step()
    for a, b in zip(device.parameters(), host.parameters(), strict=True):
        same(a, b)


def test_a_tuple_runs_in_order_and_shares_a_pool(musa: str) -> None:
    hosts = [net(1), net(2), nn.ReLU()]
    devices = [net(1).to(musa), net(2).to(musa), nn.ReLU().to(musa)]
    pool = torch.musa.graph_pool_handle()
    samples = tuple((torch.zeros(5, 4, device=musa, requires_grad=n > 0),) for n in range(3))
    graphed = torch.musa.make_graphed_callables(tuple(devices), samples, pool=pool)
    assert isinstance(graphed, tuple)
    assert graphed[0] is devices[0]
    assert torch.musa.memory_snapshot(pool)
    for step in range(3):
        x = on_host(step, 5, 4)
        want = hosts[2](hosts[1](hosts[0](x)))
        got = graphed[2](graphed[1](graphed[0](x.to(musa))))
        same(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        for ours, theirs in zip(devices, hosts, strict=True):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                same(a.grad, b.grad)
                a.grad = b.grad = None


def test_structures_of_tensors(musa: str) -> None:
    def f(pair: dict[str, torch.Tensor], rest: list[torch.Tensor]) -> dict[str, Any]:
        return {"sum": pair["a"] + pair["b"], "rest": (rest[0] * 2, [rest[1].argmax()])}

    def arguments(n: int, device: str) -> tuple[Any, Any]:
        a, b, c, d = (on_host(n + i, 3).to(device) for i in range(4))
        return {"a": a, "b": b}, [c, d]

    graphed = torch.musa.make_graphed_callables(f, arguments(0, musa))
    want, got = f(*arguments(7, "cpu")), graphed(*arguments(7, musa))
    same(got["sum"], want["sum"])
    same(got["rest"][0], want["rest"][0])
    assert got["rest"][1][0].item() == want["rest"][1][0].item()
    with pytest.raises(RuntimeError, match="a graphed callable takes the arguments it was captured with"):
        graphed(*arguments(7, musa)[:1])


def test_inputs_without_gradients(musa: str) -> None:
    frozen = net().to(musa).requires_grad_(False)
    torch.musa.make_graphed_callables(frozen, (torch.zeros(2, 4, device=musa),))
    out = frozen(torch.ones(2, 4, device=musa))
    assert not out.requires_grad
    same(out, net()(torch.ones(2, 4)))
    with torch.no_grad():
        same(frozen(torch.zeros(2, 4, device=musa)), net()(torch.zeros(2, 4)))


def test_an_input_that_is_not_used(musa: str) -> None:
    def first(x: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        return x * 2

    samples = tuple(torch.zeros(2, device=musa, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"(?i)not have been used"):
        torch.musa.make_graphed_callables(first, samples)
    assert not torch.musa.is_current_stream_capturing()
    graphed = torch.musa.make_graphed_callables(first, samples, allow_unused_input=True)
    x, y = (torch.ones(2, device=musa, requires_grad=True) for _ in range(2))
    graphed(x, y).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]
    assert y.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_a_module_in_the_other_mode_runs_as_it_did(musa: str, training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(musa).train(training)
    eager = model.forward
    torch.musa.make_graphed_callables(model, (torch.zeros(2, 4, device=musa),))
    x = torch.ones(2, 4, device=musa)
    model.train(not training)
    assert model(x).grad_fn.name() != "GraphedBackward"
    assert model(input=x).shape == (2, 4)
    model.train(training)
    assert model(x).grad_fn.name() == "GraphedBackward"
    if not training:
        same(model(x), eager(x))
    else:
        assert not torch.equal(model(x).detach().clone(), model(x).detach())  # dropout draws anew


def test_gradients_lie_where_the_graph_writes_them(musa: str) -> None:
    """As on CUDA (pytorch/pytorch#181723): a parameter's first gradient is the graph's own buffer, into which the next
    replay writes. Who accumulates gradients finds that out here."""
    model = nn.Linear(1, 1, bias=False).to(musa)
    torch.musa.make_graphed_callables(model, (torch.zeros(1, 1, device=musa),))
    for value in (1.0, 10.0):
        model(torch.full((1, 1), value, device=musa)).sum().backward()
    assert model.weight.grad.item() == 20  # not 11: zero_grad() between replays, with set_to_none=True
    model.zero_grad(set_to_none=True)
    model(torch.full((1, 1), 3.0, device=musa)).sum().backward()
    assert model.weight.grad.item() == 3


def test_parameters_are_read_where_they_are(musa: str) -> None:
    model = nn.Linear(2, 2).to(musa)
    torch.musa.make_graphed_callables(model, (torch.zeros(1, 2, device=musa),))
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.fill_(3)
    assert model(torch.ones(1, 2, device=musa)).tolist() == [[5, 5]]


def test_mistakes_are_named(musa: str) -> None:
    make, x = torch.musa.make_graphed_callables, torch.zeros(1, 2, device=musa)
    with pytest.raises(RuntimeError, match="every argument of a graphed callable is a tensor"):
        make(lambda a, b: a * b, (x, 3))
    hooked = nn.Linear(2, 2).to(musa)
    handle = hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="graphed before hooks are registered"):
        make(hooked, (x,))
    handle.remove()
    make(hooked, (x,))
    buffered = nn.Linear(2, 2).to(musa)
    buffered.register_buffer("b", torch.zeros(1, device=musa, requires_grad=True))
    with pytest.raises(RuntimeError, match="only parameters of a graphed module may want a gradient"):
        make(buffered, (x,))
    with torch.autocast(musa, dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast cache"):
        make(nn.Linear(2, 2).to(musa), (x,))
    with pytest.raises(ValueError, match="zip"):
        make((torch.sin, torch.cos), ((x,),))


def test_a_function_that_waits_for_the_host_leaves_no_capture(musa: str) -> None:
    collect()
    before = ledger.in_pools
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        torch.musa.make_graphed_callables(lambda x: x * x.sum().item(), (torch.ones(2, device=musa),))
    assert not torch.musa.is_current_stream_capturing()
    collect()
    assert ledger.in_pools == before


def test_there_is_no_second_derivative(musa: str) -> None:
    graphed = torch.musa.make_graphed_callables(torch.sin, (torch.zeros(2, device=musa, requires_grad=True),))
    x = torch.ones(2, device=musa, requires_grad=True)
    (gradient,) = torch.autograd.grad(graphed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_goes_back_with_the_callable(musa: str) -> None:
    collect()
    before = ledger.in_pools, torch.musa.memory_allocated()
    model = net().to(musa)
    torch.musa.make_graphed_callables(model, (torch.zeros(2, 4, device=musa),))
    model(torch.ones(2, 4, device=musa)).sum().backward()
    assert ledger.in_pools > before[0]
    del model
    collect()
    assert (ledger.in_pools, torch.musa.memory_allocated()) == before


def test_strict_replays_find_nothing_wrong(musa: str, simulate: Callable[..., None]) -> None:
    simulate(strict=True)
    models = tuple(net(n).to(musa) for n in range(3))
    samples = tuple((torch.zeros(2, 4, device=musa, requires_grad=n > 0),) for n in range(3))
    torch.musa.make_graphed_callables(models, samples)
    optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1)
    for step in range(4):
        x = on_host(step, 2, 4).to(musa)
        for model in models:
            x = model(x)
        if step % 2:
            optimizer.zero_grad()
            x.sum().backward()
            optimizer.step()
