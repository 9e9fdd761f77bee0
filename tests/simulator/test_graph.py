"""Stream capture: it records and computes nothing, a replay computes into fixed memory, and the impossible raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from garbage import collect

from fxpatch.errors import SimulatorError
from fxpatch.simulator import Graph, capturing
from fxpatch.simulator.memory import ledger


@pytest.fixture
def graph(musa: str) -> Graph:
    """An empty graph."""
    made: Graph = torch.musa.MUSAGraph()
    return made


def test_outputs_are_poison_until_replay(musa: str, graph: Graph) -> None:
    x = torch.ones(3, device=musa)
    with torch.musa.graph(graph):
        outputs = [x + 1, (x + 1).long(), x > 0, (x + 1).bfloat16(), torch.empty(3, device=musa), x.to(torch.complex64)]
    assert all(torch.isnan(outputs[n]).all() for n in (0, 3, 4, 5))
    assert outputs[1].tolist() == [0x5A5A5A5A5A5A5A5A] * 3
    graph.replay()
    assert outputs[0].tolist() == outputs[1].tolist() == outputs[3].tolist() == [2, 2, 2]
    assert outputs[2].all()


def test_capture_leaves_what_it_writes_alone(musa: str, graph: Graph) -> None:
    cache, counter = torch.zeros(4, device=musa), torch.zeros((), dtype=torch.long, device=musa)
    with torch.musa.graph(graph):
        cache[1:3].copy_(torch.full((2,), 5.0, device=musa))
        counter.add_(1)
        cache[0] = 7.0
    assert cache.tolist() == [0, 0, 0, 0]
    for n in (1, 2, 3):
        graph.replay()
        assert counter.item() == n
    assert cache.tolist() == [7, 5, 5, 0]


def test_replay_reads_and_writes_fixed_addresses(musa: str, graph: Graph) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU()).to(musa)
    static = torch.zeros(2, 4, device=musa)
    with torch.no_grad(), torch.musa.graph(graph):
        y = net(static)
    address = y.data_ptr()
    for seed in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)).to(musa)
        static.copy_(x)
        graph.replay()
        torch.testing.assert_close(y, net(x))
        assert y.data_ptr() == address
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, net(static))


@pytest.mark.parametrize("captured", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("replayed", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_capture_and_replay_in_any_grad_mode(
    musa: str, graph: Graph, captured: Callable[[], Any], replayed: Callable[[], Any]
) -> None:
    x = torch.ones(3, device=musa)
    with captured(), torch.musa.graph(graph):
        x.add_(1)
        y = x * 2
        y.mul_(x)
    for want in (8, 18):
        with replayed():
            graph.replay()
        assert y.tolist() == [want] * 3


def test_views_and_shapes_within_a_capture(musa: str, graph: Graph) -> None:
    x = torch.arange(6.0, device=musa)
    with torch.musa.graph(graph):
        a, b = x.view(2, 3).unbind(0)
        total = torch.stack([a, b]).t_().sum(1) + torch.arange(3, device=musa)
        values, indices = total.sort(descending=True)
        parts = torch.split_with_sizes_copy(x, [2, 4])
    graph.replay()
    assert total.tolist() == [3, 6, 9]
    assert values.tolist() == [9, 6, 3]
    assert indices.tolist() == [2, 1, 0]
    assert parts[1].tolist() == [2, 3, 4, 5]


def test_a_training_step_is_captured_whole(musa: str, graph: Graph) -> None:
    def step(net: torch.nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()
        optimizer.step()

    nets, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3)).to(musa))
        optimizers.append(torch.optim.SGD(nets[-1].parameters(), lr=0.1, momentum=0.9))
    x = torch.randn(5, 1, 4, 4).to(musa)
    for net, optimizer in zip(nets, optimizers, strict=True):
        step(net, x, optimizer)  # warm up: allocates gradients and momenta
    with torch.musa.graph(graph):
        step(nets[0], x, optimizers[0])
    for _ in range(3):
        graph.replay()
        step(nets[1], x, optimizers[1])
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_replays_draw_new_random_numbers(musa: str, graph: Graph) -> None:
    x = torch.ones(100, device=musa)
    state = torch.musa.get_rng_state()
    with torch.musa.graph(graph):
        y, z = F.dropout(x), torch.rand(100, device=musa)
    assert torch.equal(torch.musa.get_rng_state(), state)
    torch.musa.manual_seed(1)
    want = [F.dropout(x), torch.rand(100, device=musa)]
    torch.musa.manual_seed(1)
    graph.replay()
    assert torch.equal(y, want[0])
    assert torch.equal(z, want[1])
    graph.replay()
    assert not torch.equal(z, want[1])


def test_host_scalars_are_baked_in(musa: str, graph: Graph) -> None:
    x, scale = torch.ones(2, device=musa), torch.tensor(3.0)
    with torch.musa.graph(graph):
        y = x * scale
    scale.fill_(100)
    graph.replay()
    assert y.tolist() == [3, 3]


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "from the host": lambda x: torch.tensor([1.0], device=x.device),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask_put": lambda x: x.index_put_((x > 0,), x),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.musa.synchronize(),
    "current stream": lambda x: torch.musa.current_stream().synchronize(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_waits_for_the_host_is_refused(musa: str, graph: Graph, what: str) -> None:
    x = torch.ones(3, device=musa)

    def body() -> None:
        with torch.musa.graph(graph):
            x + 1
            REFUSED[what](x)

    with pytest.raises(RuntimeError, match="MUSA error: operation not permitted when stream is capturing"):
        body()
    assert capturing() is None
    assert not torch.musa.is_current_stream_capturing()
    assert graph.launches == 0
    assert (x + 1).tolist() == [2, 2, 2]


def test_one_value_at_a_mask_needs_no_count(musa: str, graph: Graph) -> None:
    x = torch.tensor([1.0, -1.0], device=musa)
    with torch.musa.graph(graph):
        x[x < 0] = 0.0
    graph.replay()
    assert x.tolist() == [1, 0]


def test_mistakes_are_named(musa: str, graph: Graph) -> None:
    for asked in (graph.replay, graph.pool, graph.instantiate, lambda: graph.debug_dump("")):
        with pytest.raises(RuntimeError, match="wants a captured graph, and nothing has been captured"):
            asked()
    with pytest.raises(RuntimeError, match="is not being captured"):
        graph.capture_end()
    with pytest.raises(ValueError, match="one of global, thread_local, relaxed, not 'lax'"):
        graph.capture_begin(capture_error_mode="lax")
    with torch.musa.graph(graph):
        assert capturing() is graph
        assert torch.musa.is_current_stream_capturing()
        with pytest.raises(RuntimeError, match="already being captured"):
            torch.musa.MUSAGraph().capture_begin()
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        graph.capture_begin()
    with pytest.raises(RuntimeError, match="is not being captured"):
        graph.capture_end()
    graph.reset()
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        graph.replay()
    with torch.musa.graph(graph):
        pass


def test_an_operators_own_error_stays_its_own(musa: str, graph: Graph) -> None:
    x = torch.ones(2, 3, device=musa)
    with pytest.raises(RuntimeError, match=r"same reduction dim|cannot be multiplied"), torch.musa.graph(graph):
        x @ x


def test_an_operator_of_unknown_shape_is_refused(musa: str, graph: Graph) -> None:
    with torch.library._scoped_library("simulator_graph_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.define("double_(Tensor(a!) x) -> ()")
        library.impl("double", lambda x: x * 2, "CPU")
        library.impl("double_", lambda x: x.mul_(2) and None, "CPU")
        x = torch.ones((), device=musa)
        with torch.musa.graph(graph):
            torch.ops.simulator_graph_test.double_(x)
        graph.replay()
        assert x.item() == 2
        with pytest.raises(SimulatorError, match="register_fake"), torch.musa.graph(torch.musa.MUSAGraph()):
            torch.ops.simulator_graph_test.double(x)


def test_kernels_that_differ_from_their_meta_kernels(musa: str, graph: Graph) -> None:
    x = torch.randn(4, 3, device=musa)
    norm = torch.nn.BatchNorm1d(3).to(musa).eval()  # two outputs that the CPU kernel leaves empty
    with torch.musa.graph(graph):
        y = norm(x)
    graph.replay()
    torch.testing.assert_close(y, norm(x))
    other = torch.musa.MUSAGraph()
    with torch.musa.graph(other):
        F.embedding_bag(torch.zeros(2, 2, dtype=torch.long, device=musa), x, mode="sum")
    with pytest.raises(SimulatorError, match="cannot be replayed"):
        other.replay()


def test_a_graph_keeps_its_memory_and_gives_it_back(musa: str, graph: Graph) -> None:
    collect()
    before = ledger.blocks.current, ledger.in_pools
    x = torch.ones(10, device=musa)
    with torch.musa.graph(graph):
        y = x.exp().log().add(1)
    collect()
    assert ledger.blocks.current == before[0] + 2  # x and y; what lies between is free, for the next graph of the pool
    clutter = [torch.full((10,), 9.0, device=musa) for _ in range(50)]
    graph.replay()
    assert y.tolist() == [2] * 10
    del clutter, x, y
    graph.reset()
    collect()
    assert ledger.blocks.current == before[0]
    assert ledger.in_pools == before[1]


def test_no_mode_sees_into_a_replay(musa: str, graph: Graph) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    seen: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.eye(4, device=musa) * 2
    with torch.musa.graph(graph):
        x.mul_(2)
        y = x @ x
    with Watch(), FlopCounterMode(display=False) as flops, torch.autocast("cpu", dtype=torch.bfloat16):
        graph.replay()
    assert not seen
    assert flops.get_total_flops() == 0
    assert y.diagonal().tolist() == [16] * 4
    with FakeTensorMode():
        graph.replay()
    assert y.diagonal().tolist() == [64] * 4

    def loss(z: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return z.sum()

    torch.func.grad(loss)(torch.ones(2, device=musa))
    assert y.diagonal().tolist() == [256] * 4


def test_a_replay_in_a_compiled_function_breaks_the_graph(musa: str, graph: Graph) -> None:
    x = torch.ones(2, device=musa)
    with torch.musa.graph(graph):
        y = x + 1

    def replays(z: torch.Tensor) -> torch.Tensor:
        z = z * 2
        graph.replay()
        return z + y

    assert torch.compile(replays, backend="aot_eager")(x).tolist() == [4, 4]


def test_growing_within_a_capture_keeps_the_contents(musa: str, graph: Graph) -> None:
    x = torch.arange(3.0, device=musa)
    with torch.musa.graph(graph):
        y = (x + 1).resize_(4)
        y[3:] = 7
    for start in (0.0, 10.0):
        x.copy_(torch.arange(3.0) + start)
        graph.replay()
        assert y.tolist() == [start + 1, start + 2, start + 3, 7]


def test_a_result_that_the_kernel_conjugates(musa: str, graph: Graph) -> None:
    a, b = torch.randn(3, 3, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)
    want = torch.linalg.solve_ex(a, b, left=False).result
    there = a.to(musa), b.to(musa)
    with torch.musa.graph(graph):
        got = torch.linalg.solve_ex(*there, left=False).result
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(got.cpu(), want)


def test_lists_of_outputs(musa: str, graph: Graph) -> None:
    x, outs = torch.ones(2, device=musa), [torch.zeros(2, device=musa), torch.zeros(2, device=musa)]
    with torch.musa.graph(graph):
        torch.ops.aten._foreach_add.Scalar_out([x, x * 2], 1, out=outs)
    graph.replay()
    assert [t.tolist() for t in outs] == [[2, 2], [3, 3]]


def test_copies_within_a_capture(musa: str, graph: Graph) -> None:
    x = torch.ones(3, device=musa)
    with torch.musa.graph(graph):
        y = torch.cat([torch.tensor([], device=musa), x * 2])  # nothing crosses: a key-value cache starts like this
        assert torch.ones(0, device=musa).cpu().numel() == 0
    graph.replay()
    assert y.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="must match"), torch.musa.graph(torch.musa.MUSAGraph()):
        x.copy_(torch.ones(4, device=musa))


def test_draws_that_take_a_generator_are_captured(musa: str, graph: Graph) -> None:
    p = torch.full((64,), 0.5, device=musa)
    with torch.musa.graph(graph):
        drawn = torch.randperm(64, device=musa), F.rrelu(-p, training=True), torch.poisson(p * 9), F.dropout(p)
    torch.manual_seed(1)
    graph.replay()
    first = [t.clone() for t in drawn]
    assert sorted(first[0].tolist()) == list(range(64))
    graph.replay()
    assert not any(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))
    torch.manual_seed(1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))
