"""A graph from its first replay to its last: poison before, random numbers of its own, inputs updated in place, the
life cycle of `torch.cuda.CUDAGraph`, and the same under another device's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpatch.simulator import Graph


@pytest.fixture
def graph(musa: str) -> Graph:
    """An empty graph."""
    made: Graph = torch.musa.MUSAGraph()
    return made


DTYPES = sorted({t for t in vars(torch).values() if isinstance(t, torch.dtype) and "q" not in str(t)}, key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_of_every_dtype(musa: str, graph: Graph, dtype: torch.dtype) -> None:
    with torch.musa.graph(graph):
        x = torch.empty(4, dtype=dtype, device=musa)
    data = x.view(torch.uint8).cpu().tolist()
    if dtype is torch.bool:
        assert data == [1] * 4
    elif (dtype.is_floating_point or dtype.is_complex) and dtype is not torch.float4_e2m1fn_x2:
        host = x.cpu()
        wide = host.to(torch.complex64) if dtype.is_complex else host.to(torch.float32)
        assert wide.isnan().all()
    else:
        assert data == [0x5A] * 4 * dtype.itemsize


def test_a_poisoned_index_raises_and_reads_nothing(musa: str, graph: Graph) -> None:
    table, other = torch.ones(10, 4, device=musa), torch.musa.MUSAGraph()
    with torch.musa.graph(graph):
        index = torch.ones(3, device=musa).long()
    for read in (lambda: table[index], lambda: table.index_select(0, index), lambda: F.embedding(index, table)):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            read()
    with torch.musa.graph(other):
        rows = F.embedding(index, table)
    with pytest.raises(IndexError, match="out of range"):
        other.replay()
    graph.replay()
    other.replay()
    assert rows.eq(1).all()


def test_a_replay_that_fails_can_be_repeated(musa: str, graph: Graph) -> None:
    table, index = torch.arange(10.0, device=musa), torch.tensor([99], device=musa)
    with torch.musa.graph(graph):
        y = table.index_select(0, index) + 1
    with pytest.raises(IndexError):
        graph.replay()
    assert not torch.is_inference_mode_enabled()
    index.fill_(3)
    graph.replay()
    assert y.tolist() == [4]


draws = st.lists(st.sampled_from(["replay", "eager", "on the host"]), max_size=8)


@settings(settings.default, max_examples=settings.default.max_examples // 10)
@given(order=draws)
def test_replays_and_eager_calls_draw_from_one_sequence(musa: str, order: list[str]) -> None:
    x = torch.ones(16, device=musa)

    def draw() -> list[torch.Tensor]:
        return [F.dropout(x), torch.rand(3, device=musa), torch.randn_like(x), torch.randperm(5, device=musa)]

    g = torch.musa.MUSAGraph()
    torch.manual_seed(0)
    with torch.musa.graph(g):
        static = draw()
    torch.musa.manual_seed(7)
    got = []
    for kind in order:
        if kind == "on the host":
            torch.rand(3)  # a sequence of its own
            continue
        if kind == "replay":
            g.replay()
        got.append([t.clone() for t in (static if kind == "replay" else draw())])
    torch.musa.manual_seed(7)
    for drawn in got:
        for a, b in zip(drawn, draw(), strict=True):
            assert torch.equal(a, b)


def test_inputs_are_refilled_in_place(musa: str, graph: Graph) -> None:
    """The loop of an engine: pad a batch into static buffers, replay, slice."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    tokens, lengths = torch.zeros(8, 4, device=musa), torch.zeros(1, dtype=torch.long, device=musa)
    cache = torch.zeros(8, 4, device=musa)
    there = weight.to(musa)
    with torch.musa.graph(graph):
        mask = torch.arange(8, device=musa)[:, None] < lengths
        cache.copy_(torch.where(mask, tokens @ there, cache))
        out = cache.sum(0)
    host_cache = torch.zeros(8, 4)
    for n in (3, 8, 1):
        batch = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
        tokens[:n].copy_(batch)
        lengths.fill_(n)
        graph.replay()
        host_cache[:n] = batch @ weight
        torch.testing.assert_close(out.cpu(), host_cache.sum(0))
        torch.testing.assert_close(cache.cpu(), host_cache)


def test_keep_graph_leaves_the_instantiation_to_the_caller(musa: str) -> None:
    x = torch.ones(2, device=musa)
    for by_hand in (True, False):
        g = torch.musa.MUSAGraph(keep_graph=True)
        with torch.musa.graph(g):
            y = x + 1
        if by_hand:
            g.instantiate()
        g.replay()
        assert y.tolist() == [2, 2]


def test_a_dump_lists_the_launches(musa: str, graph: Graph, tmp_path: Path) -> None:
    x = torch.ones(2, device=musa)
    graph.enable_debug_mode()
    with torch.musa.graph(graph):
        (x + 1).relu_().view(1, 2).neg()
    graph.debug_dump(str(tmp_path / "graph.txt"))
    assert (tmp_path / "graph.txt").read_text() == "0\taten::add.Tensor\n1\taten::relu_\n2\taten::neg\n"


def test_a_graph_is_captured_anew_after_reset(musa: str, graph: Graph) -> None:
    x = torch.ones(2, device=musa)
    with torch.musa.graph(graph):
        y = x + 1
    first = graph.pool()
    graph.replay()
    graph.reset()
    with torch.musa.graph(graph):
        z = x * 5
    assert graph.pool() != first
    y.zero_()
    graph.replay()
    assert (y.tolist(), z.tolist()) == ([0, 0], [5, 5])


def test_an_empty_graph(musa: str, graph: Graph) -> None:
    with torch.musa.graph(graph):
        pass
    graph.replay()
    assert graph.launches == 0
    assert torch.musa.memory_snapshot(graph.pool()) == []


def test_a_subclass_is_a_graph(musa: str) -> None:
    class Counting(torch.musa.MUSAGraph):
        replays = 0

        def replay(self) -> None:
            self.replays += 1
            super().replay()

    g, x = Counting(), torch.ones(2, device=musa)
    with torch.musa.graph(g):
        y = x + 1
    g.replay()
    assert (g.replays, y.tolist()) == (1, [2, 2])


@pytest.mark.slow
def test_under_another_name_and_after_a_fork(fresh: Callable[..., str]) -> None:
    fresh("""
        import os, torch
        from fxpatch.simulator import simulate
        npu = simulate("npu")
        assert torch.npu.NPUGraph.__name__ == "NPUGraph" and torch.npu.NPUGraph.__module__ == "torch.npu"
        assert not hasattr(torch.npu, "MUSAGraph")
        x, g = torch.ones(3, device="npu"), torch.npu.NPUGraph()
        with torch.npu.graph(npu_graph=g, pool=torch.npu.graph_pool_handle(), stream=torch.npu.Stream()):
            y = x + 1
        g.replay()
        assert y.tolist() == [2, 2, 2]
        try:
            with torch.npu.graph(torch.npu.NPUGraph()):
                x.cpu()
        except torch.AcceleratorError as error:
            assert str(error).startswith("NPU error: operation not permitted when stream is capturing: "), error
        else:
            raise AssertionError
        linear = torch.npu.make_graphed_callables(torch.nn.Linear(3, 1).to("npu"), (x,))
        linear(x).backward()
        assert linear.weight.grad.tolist() == [[1, 1, 1]]
        child = os.fork()
        if child == 0:  # a device does not survive it, and a graph is of the device
            for work in (g.replay, torch.npu.NPUGraph().capture_begin):
                try:
                    work()
                except RuntimeError as error:
                    assert "Cannot re-initialize NPU in forked subprocess" in str(error)
                else:
                    os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)
