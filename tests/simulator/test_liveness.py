"""Memory that a graph reads and does not own: NaN where it was freed, an error where replays are checked, and no error
in any order of replays that a device would get right."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from garbage import collect
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxpatch.simulator import Graph
from fxpatch.simulator.memory import ledger


@pytest.fixture
def graph(musa: str) -> Graph:
    """An empty graph."""
    made: Graph = torch.musa.MUSAGraph()
    return made


@pytest.fixture
def strict(simulate: Callable[..., None]) -> None:
    """Every replay is checked."""
    simulate(strict=True)


def test_a_freed_input_is_read_as_nan(musa: str, graph: Graph) -> None:
    x, scale = torch.ones(3, device=musa), torch.full((3,), 2.0, device=musa)
    with torch.musa.graph(graph):
        y = x * scale
    graph.replay()
    assert y.tolist() == [2, 2, 2]
    before = torch.musa.memory_allocated()
    del x
    assert torch.musa.memory_allocated() == before - 512  # the device may give it to somebody else
    graph.replay()
    assert y.isnan().all()


def test_a_freed_index_is_read_as_it_was(musa: str, graph: Graph) -> None:
    index, table = torch.tensor([2, 0], device=musa), torch.arange(3.0, device=musa)
    with torch.musa.graph(graph):
        y = table[index]
    del index
    collect()
    graph.replay()  # a wild index would end the process
    assert y.tolist() == [2, 0]


def test_memory_freed_under_any_mode_is_freed(musa: str, graph: Graph) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
            raise AssertionError(func)

    held = [torch.ones(3, device=musa) for _ in range(3)]
    with torch.musa.graph(graph):
        y = held[0] + held[1] + held[2]
    before = torch.musa.memory_allocated()
    with FakeTensorMode():
        held.pop()
    with Refuse():
        held.pop()
    torch.func.vmap(lambda z: (held.pop(), z)[1])(torch.ones(2, device=musa))
    assert torch.musa.memory_allocated() == before - 3 * 512
    graph.replay()
    assert y.isnan().all()


def test_strict_names_what_was_freed(musa: str, graph: Graph, strict: None) -> None:
    x, y = torch.ones(2, 3, device=musa), torch.zeros(3, device=musa)
    with torch.musa.graph(graph):
        z = x.sum(0)
        y.copy_(z)
    graph.replay()
    del y
    with pytest.raises(
        RuntimeError, match=r"aten::copy_ was captured with a tensor of shape \(3,\) that has been freed"
    ):
        graph.replay()
    del x
    with pytest.raises(
        RuntimeError, match=r"no longer owned: aten::sum\S* was captured with a tensor of shape \(2, 3\)"
    ):
        graph.replay()


def test_strict_lets_views_and_autograd_hold(musa: str, graph: Graph, strict: None) -> None:
    x = torch.ones(2, 3, device=musa)
    view = x[1]
    with torch.musa.graph(graph):
        y = x + 1
    del x
    graph.replay()
    assert y.eq(2).all()
    assert view.eq(1).all()


def test_check_input_liveness_is_for_one_graph(musa: str, graph: Graph) -> None:
    other, x = torch.musa.MUSAGraph(), torch.ones(3, device=musa)
    with torch.musa.graph(graph, check_input_liveness=True):
        x + 1
    with torch.musa.graph(other):
        y = x + 1
    del x
    with pytest.raises(RuntimeError, match="Keep the tensor as long as the graph, or capture again"):
        graph.replay()
    other.replay()
    assert y.isnan().all()
    graph.reset()
    x = torch.ones(3, device=musa)
    with torch.musa.graph(graph):
        y = x + 1
    del x
    graph.replay()  # a new capture, and not checked
    assert y.isnan().all()


def test_what_has_no_memory_cannot_be_freed(musa: str, graph: Graph, strict: None) -> None:
    x, empty = torch.ones(3, device=musa), torch.ones(0, device=musa)
    with torch.musa.graph(graph):
        y = torch.cat([empty, x])
    del empty
    graph.replay()
    assert y.tolist() == [1, 1, 1]


def test_host_scalars_and_temporaries_of_the_capture_are_no_inputs(musa: str, graph: Graph, strict: None) -> None:
    x = torch.ones(3, device=musa)
    with torch.musa.graph(graph):
        y = ((x + torch.tensor(2.0)) * 3).relu() - torch.zeros(3, device=musa)
    collect()
    graph.replay()
    assert y.tolist() == [9, 9, 9]


# -- graphs of one pool ---------------------------------------------------------------------------


def test_strict_names_what_another_graph_has_overwritten(musa: str, strict: None) -> None:
    pool, (a, b, c) = torch.musa.graph_pool_handle(), (torch.musa.MUSAGraph() for _ in range(3))
    x = torch.ones(3, device=musa)
    with torch.musa.graph(a, pool=pool):
        first = x + 1
    with torch.musa.graph(b, pool=pool):
        second = first * 10
    where = first.data_ptr()
    del first
    with torch.musa.graph(c, pool=pool):
        third = x * 7
    assert third.data_ptr() == where
    for _ in range(2):
        a.replay()
        b.replay()
        assert second.tolist() == [20, 20, 20]
        c.replay()
        assert third.tolist() == [7, 7, 7]
        with pytest.raises(RuntimeError, match="memory that another graph has overwritten: aten::mul") as caught:
            b.replay()
        assert "Replay graphs of one pool in the order in which they were captured" in str(caught.value)


def test_strict_lets_a_graph_update_what_another_made(musa: str, strict: None) -> None:
    pool, (a, b, c) = torch.musa.graph_pool_handle(), (torch.musa.MUSAGraph() for _ in range(3))
    x = torch.ones(3, device=musa)
    with torch.musa.graph(a, pool=pool):
        state = x + 1
    with torch.musa.graph(b, pool=pool):
        y = state * 2
    with torch.musa.graph(c, pool=pool):
        state.add_(1)
    a.replay()
    for order, want in ((b, 4), (c, 4), (b, 6), (c, 6), (c, 6), (b, 10)):
        order.replay()
        assert y.tolist() == [want] * 3


def test_strict_across_pools(musa: str, strict: None) -> None:
    a, b = torch.musa.MUSAGraph(), torch.musa.MUSAGraph()
    x = torch.ones(3, device=musa)
    with torch.musa.graph(a):
        y = x + 1
    with torch.musa.graph(b):
        z = y * 2
    for value in (1.0, 3.0):
        x.fill_(value)
        a.replay()
        b.replay()
        assert z.tolist() == [2 * (value + 1)] * 3
    a.reset()
    b.replay()  # y holds its memory
    del y
    with pytest.raises(RuntimeError, match="no longer owned"):
        b.replay()


def link(y: torch.Tensor, n: int) -> torch.Tensor:
    """Three temporaries, whose values are nobody else's."""
    return (y * 1.37 + 0.11).sub(n * 0.77).mul(0.9).add(n)


def chain(musa: str, links: int) -> tuple[list[Graph], list[torch.Tensor], torch.Tensor]:
    """Graphs of one pool, each of which reads what the one before it made."""
    pool, x = torch.musa.graph_pool_handle(), torch.ones(8, device=musa)
    graphs, outputs = [], [x]
    for n in range(links):
        graphs.append(torch.musa.MUSAGraph())
        with torch.musa.graph(graphs[-1], pool=pool):
            outputs.append(link(outputs[-1], n))
    return graphs, outputs[1:], x


def test_strict_raises_just_where_what_is_read_is_wrong(musa: str, strict: None) -> None:
    """A later graph's output lies where an earlier one has its temporaries. In any order of replays, each either
    computes what a model over plain tensors has, or raises; and it raises only if what it would read is not that."""
    graphs, outputs, x = chain(musa, 4)
    raised = 0

    @settings(settings.default, max_examples=settings.default.max_examples // 5)
    @given(order=st.lists(st.integers(0, 3), max_size=16))
    @example(order=[0, 2])
    def in_any_order(order: list[int]) -> None:
        nonlocal raised
        x.fill_(1)
        model = [torch.ones(8)] * 5
        for n in (0, 1, 2, 3, *order):
            x.add_(0.5)
            model[0] = model[0] + 0.5
            upstream = x if n == 0 else outputs[n - 1]
            if torch.allclose(upstream.cpu(), model[n]):
                graphs[n].replay()
                model[n + 1] = link(model[n], n)
                torch.testing.assert_close(outputs[n].cpu(), model[n + 1])
            else:
                raised += 1
                with pytest.raises(RuntimeError, match="another graph has overwritten"):
                    graphs[n].replay()

    in_any_order()
    assert raised


def test_a_graph_that_refreshes_what_it_reads_depends_on_nobody(musa: str, strict: None) -> None:
    graphs, outputs, x = chain(musa, 3)
    last = torch.musa.MUSAGraph()
    with torch.musa.graph(last, pool=graphs[0].pool()):
        outputs[2].copy_(x)
        outputs[2].add_(1)
        y = outputs[2] * 10
    for g in (*graphs, graphs[0], last):
        g.replay()
    assert y.tolist() == [20] * 8


def test_a_small_temporary_in_the_place_of_a_large_one(musa: str, strict: None) -> None:
    pool, (a, b, c) = torch.musa.graph_pool_handle(), (torch.musa.MUSAGraph() for _ in range(3))
    x = torch.ones(1000, device=musa)
    with torch.musa.graph(a, pool=pool):
        large = x + 1
        where = large.data_ptr()
        del large
        small = x[:1] + 1
    assert small.data_ptr() == where
    with torch.musa.graph(b, pool=pool):
        behind = x[:1] * 5
    assert where < behind.data_ptr() < where + 4000
    with torch.musa.graph(c, pool=pool):
        y = behind + 1
    for g in (a, b, c):
        g.replay()
    assert y.item() == 6
    a.replay()
    assert behind.item() == 2
    with pytest.raises(RuntimeError, match="another graph has overwritten"):
        c.replay()


def test_strict_finds_nothing_in_the_order_of_capture(musa: str, strict: None) -> None:
    """Outputs that are dropped, as long as each round replays in the order in which the graphs were captured."""
    pool, x, graphs = torch.musa.graph_pool_handle(), torch.ones(8, device=musa), []
    y = x
    for n in range(6):
        graphs.append(torch.musa.MUSAGraph())
        with torch.musa.graph(graphs[-1], pool=pool):
            y = y.exp().log() + n  # what the one before made is free after this, and the next takes its place
    for _, g in itertools.product(range(3), graphs):
        g.replay()
    torch.testing.assert_close(y.cpu(), torch.full((8,), 16.0))


def test_strict_checks_cost_no_memory(musa: str, strict: None) -> None:
    collect()
    before = ledger.in_pools, torch.musa.memory_allocated()
    graphs, outputs, x = chain(musa, 3)
    for g in graphs:
        g.replay()
    del graphs, g, outputs, x
    collect()
    assert (ledger.in_pools, torch.musa.memory_allocated()) == before
