"""Graph pools: what a block is, whose memory is handed out again, and how long a pool lives.

The first half holds the allocator against a model that knows one thing: which bytes are taken. The second half looks at
pools as a program does: through graphs, addresses and what is read at them.
"""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from garbage import collect
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fxpatch.simulator import Graph, pools
from fxpatch.simulator.memory import ledger
from fxpatch.simulator.pools import Pool, Range

MIB = 1 << 20
SEGMENTS = [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB)]
SEGMENTS += [(10 * MIB + 1, 12 * MIB), (21 * MIB, 22 * MIB)]

sizes = st.one_of(
    st.integers(0, 5000),
    st.integers(0, MIB),
    st.sampled_from([512, 513, MIB - 512, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB, 11 * MIB]),
)


class PoolMachine(RuleBasedStateMachine):
    """Random blocks are taken and given back; the model is the list of those that are out."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.before = ledger.in_pools, ledger.blocks.current, ledger.allocated.current
        self.pool = Pool((0, 0))
        self.out: dict[int, Range] = {}
        self.numbers = itertools.count()

    @rule(target=blocks, nbytes=sizes)
    def take(self, nbytes: int) -> int:
        fitting = [stop - start for segment in self.pool.segments() for start, stop in segment.free]
        held_before = sum(segment.nbytes for segment in self.pool.segments())
        block = self.pool.take(nbytes)
        size = block.stop - block.start
        assert size >= max(nbytes, 512)
        assert size % 512 == block.start % 512 == 0
        if sum(segment.nbytes for segment in self.pool.segments()) == held_before:
            # best fit: what was cut is the smallest free range of its kind of segment that holds the block
            was = size + max((b - a for a, b in block.segment.free if a == block.stop), default=0)
            kind = block.segment.nbytes == 2 * MIB
            same = [
                b - a
                for segment in self.pool.segments()
                for a, b in segment.free
                if (segment.nbytes == 2 * MIB) == kind and b - a >= max(nbytes, 512) and a != block.stop
            ]
            assert was in fitting
            assert all(was <= other for other in same)
        else:
            assert block.start == 0
        number = next(self.numbers)
        self.out[number] = block
        return number

    @rule(number=consumes(blocks))
    def give_back(self, number: int) -> None:
        self.out.pop(number).give_back()

    @invariant()
    def what_is_free_and_what_is_taken_fill_each_segment(self) -> None:
        segments = self.pool.segments()
        for segment in segments:
            taken = sorted((b.start, b.stop) for b in self.out.values() if b.segment is segment)
            assert segment.free == sorted(segment.free)
            assert all(left[1] < right[0] for left, right in itertools.pairwise(segment.free))  # else they were joined
            everything = sorted(taken + segment.free)
            assert [a for a, _ in everything] == [0, *(b for _, b in everything[:-1])]
            assert everything[-1][1] == segment.nbytes

    @invariant()
    def the_counts_are_those_of_the_blocks(self) -> None:
        in_pools, count, allocated = self.before
        assert ledger.in_pools - in_pools == sum(segment.nbytes for segment in self.pool.segments())
        assert ledger.blocks.current - count == len(self.out)
        assert ledger.allocated.current - allocated == sum(b.stop - b.start for b in self.out.values())

    def teardown(self) -> None:
        while self.out:
            self.out.popitem()[1].give_back()
        assert all(segment.free == [(0, segment.nbytes)] for segment in self.pool.segments())
        del self.pool
        assert (ledger.in_pools, ledger.blocks.current, ledger.allocated.current) == self.before


def test_a_pool_hands_out_each_byte_once(musa: str) -> None:
    collect()
    gc.disable()  # what other tests left behind is not to change the counts in between
    try:
        run_state_machine_as_test(
            PoolMachine, settings=settings(settings.default, max_examples=settings.default.max_examples // 10)
        )
    finally:
        gc.enable()


@pytest.mark.parametrize(("nbytes", "segment"), SEGMENTS)
def test_segments_have_the_sizes_of_the_cuda_allocator(nbytes: int, segment: int) -> None:
    assert Pool((0, 0)).take(nbytes).segment.nbytes == segment


def test_a_rest_too_small_to_be_useful_stays_with_its_block() -> None:
    pool = Pool((0, 0))
    medium = pool.take(19 * MIB // 2)  # of 20 MiB: the rest is cut off
    large = pool.take(15 * MIB + 512)  # of 16 MiB: it is not
    assert medium.stop - medium.start == 19 * MIB // 2
    assert large.stop - large.start == 16 * MIB
    small = pool.take(2000)
    assert small.stop - small.start == 2048
    assert [b - a for a, b in small.segment.free] == [2 * MIB - 2048]


# -- pools of graphs ------------------------------------------------------------------------------


def graphs(count: int) -> list[Graph]:
    return [torch.musa.MUSAGraph() for _ in range(count)]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """What lies at a tensor's address, whoever owns it by now: a pointer that a kernel kept."""
    storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), torch.device("cpu"), tensor.nbytes)
    return torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)


def test_outputs_keep_their_addresses(musa: str) -> None:
    (g,) = graphs(1)
    x = torch.ones(100, device=musa)
    with torch.musa.graph(g):
        y = x * 2
        z = y + 1
    where = y.data_ptr(), z.data_ptr()
    for value in (1.0, 5.0):
        x.fill_(value)
        g.replay()
        assert (y.data_ptr(), z.data_ptr()) == where
        assert (raw(y)[0], raw(z)[0]) == (2 * value, 2 * value + 1)
    (segment,) = torch.musa.memory_snapshot(g.pool())
    assert segment["address"] <= min(where) <= max(where) < segment["address"] + segment["total_size"]


def test_what_a_capture_frees_it_hands_out_again(musa: str) -> None:
    (g,) = graphs(1)
    x = torch.ones(1000, device=musa)
    with torch.musa.graph(g):
        y = x + 1
        where = y.data_ptr()
        z = y * 3
        del y
        reused = z - 1
    assert reused.data_ptr() == where
    assert z.data_ptr() != where
    g.replay()
    assert (z[0], reused[0]) == (6, 5)


def test_a_chain_of_temporaries_needs_room_for_two(musa: str) -> None:
    (g,) = graphs(1)
    x = torch.ones(64, 1024, device=musa)  # 256 KiB: eight fill a segment
    with torch.musa.graph(g):
        y = x
        for _ in range(50):
            y = y + 1
    assert sum(segment["total_size"] for segment in torch.musa.memory_snapshot(g.pool())) == 2 * MIB
    g.replay()
    assert y.eq(51).all()


def test_a_stale_tensor_is_overwritten_by_the_next_graph_of_the_pool(musa: str) -> None:
    pool, (a, b) = torch.musa.graph_pool_handle(), graphs(2)
    x = torch.ones(100, device=musa)
    with torch.musa.graph(a, pool=pool):
        first = x + 1
    stale, where = raw(first), first.data_ptr()
    a.replay()
    assert stale.eq(2).all()
    del first
    with torch.musa.graph(b, pool=pool):
        second = x * 70
    assert second.data_ptr() == where
    a.replay()
    assert stale.eq(2).all()
    b.replay()
    assert stale.eq(70).all()
    a.replay()
    assert second.eq(2).all()  # and the other way round: nothing tells b that a wrote there


def test_what_is_held_is_never_handed_out(musa: str) -> None:
    pool, made = torch.musa.graph_pool_handle(), graphs(4)
    x = torch.ones(100, device=musa)
    outputs = []
    for n, g in enumerate(made):
        with torch.musa.graph(g, pool=pool):
            outputs.append((x + n)[10:20])  # a view holds all of it
    for g in reversed(made):
        g.replay()
    assert [y.tolist() for y in outputs] == [[1.0 + n] * 10 for n in range(4)]


def test_what_autograd_holds_is_never_handed_out(musa: str) -> None:
    pool, (a, b) = torch.musa.graph_pool_handle(), graphs(2)
    x = torch.full((100,), 3.0, device=musa, requires_grad=True)
    with torch.musa.graph(a, pool=pool):
        loss = (x * 2).square().sum()  # square saves x * 2, which only C++ holds
    with torch.musa.graph(b, pool=pool):
        other = torch.zeros(100, device=musa)
    a.replay()
    b.replay()
    loss.backward()
    assert x.grad is not None
    assert x.grad.eq(24).all()
    assert not other.any()


def test_pools_do_not_share(musa: str) -> None:
    (a, b), x = graphs(2), torch.ones(100, device=musa)
    with torch.musa.graph(a):
        x + 1
    with torch.musa.graph(b):
        x + 1
    assert a.pool() != b.pool()
    ranges = [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.musa.memory_snapshot(a.pool()) + torch.musa.memory_snapshot(b.pool())
    ]
    assert len(ranges) == 2
    (_, end), (start, _) = sorted(ranges)
    assert end <= start
    assert ranges[0][0] <= x.data_ptr() < ranges[0][1] or not any(s <= x.data_ptr() < e for s, e in ranges)


def test_names_of_pools(musa: str) -> None:
    (g,) = graphs(1)
    handles = [torch.musa.graph_pool_handle() for _ in range(3)]
    assert len(set(handles)) == 3
    assert all(first == 0 and second > 0 for first, second in handles)  # torch's: a user's begins with 0 ...
    with torch.musa.graph(g):
        pass
    assert g.pool()[0] > 0  # ... and a graph's own ends with it
    assert g.pool()[1] == 0
    other = torch.musa.MUSAGraph()
    with torch.musa.graph(other, pool=g.pool()):
        pass
    assert other.pool() == g.pool()


@pytest.mark.parametrize("wrong", [3, "pool", [0, 1], (1,), (1, 2, 3), ("a", "b"), Graph.pool])
def test_a_pool_that_is_none_is_refused_and_leaves_no_capture(musa: str, wrong: object) -> None:
    (g,) = graphs(1)
    with pytest.raises(TypeError, match="pool is what graph_pool_handle"), torch.musa.graph(g, pool=wrong):
        pass
    assert not torch.musa.is_current_stream_capturing()
    with torch.musa.graph(g):
        assert torch.musa.is_current_stream_capturing()


def test_a_pool_lives_as_long_as_its_graphs(musa: str) -> None:
    collect()
    before, pool = ledger.in_pools, torch.musa.graph_pool_handle()
    a, b = graphs(2)
    x = torch.ones(100, device=musa)
    for g in (a, b):
        with torch.musa.graph(g, pool=pool):
            x + 1
    assert ledger.in_pools == before + 2 * MIB
    a.reset()
    collect()
    assert ledger.in_pools == before + 2 * MIB
    torch.musa.empty_cache()
    assert ledger.in_pools == before + 2 * MIB  # graphs own it, free or not
    b.reset()
    assert ledger.in_pools == before
    assert torch.musa.memory_snapshot(pool) == []


def test_a_tensor_outlives_the_graph_that_made_it(musa: str) -> None:
    collect()
    before = ledger.in_pools
    (g,) = graphs(1)
    x = torch.ones(100, device=musa)
    with torch.musa.graph(g):
        y = x + 1
    g.replay()
    del g
    collect()
    assert y.eq(2).all()
    assert ledger.in_pools == before + 2 * MIB
    del y
    assert ledger.in_pools == before


def test_memory_goes_back_when_graphs_are_garbage(musa: str) -> None:
    collect()
    before = ledger.in_pools, torch.musa.memory_allocated(), len(pools.all_pools())

    def make() -> None:
        g, x = torch.musa.MUSAGraph(), torch.ones(1000, device=musa)
        with torch.musa.graph(g):
            y = x.exp().sum(0, keepdim=True)
        cycle = [g, x, y]
        cycle.append(cycle)

    for _ in range(20):
        make()
    collect()
    assert (ledger.in_pools, torch.musa.memory_allocated(), len(pools.all_pools())) == before


def test_an_event_of_a_capture_keeps_no_graph(musa: str) -> None:
    collect()
    before, event = ledger.in_pools, torch.musa.Event()
    (g,) = graphs(1)
    with torch.musa.graph(g):
        torch.ones(3, device=musa)
        event.record()
    del g
    collect()
    assert ledger.in_pools == before
    assert event.query()


def test_a_snapshot_shows_blocks_and_gaps(musa: str) -> None:
    (g,) = graphs(1)
    x = torch.ones(1000, device=musa)
    with torch.musa.graph(g):
        a = x + 1
        b = a + 1
        c = b + 1
        del b
    (segment,) = torch.musa.memory_snapshot(g.pool())
    states = [(block["address"] - segment["address"], block["size"], block["state"]) for block in segment["blocks"]]
    assert states == [
        (0, 4096, "active_allocated"),
        (4096, 4096, "inactive"),
        (8192, 4096, "active_allocated"),
        (12288, 2 * MIB - 12288, "inactive"),
    ]
    assert segment["segment_pool_id"] == g.pool()
    assert segment["allocated_size"] == segment["active_size"] == 8192
    assert (a.data_ptr(), c.data_ptr()) == (segment["address"], segment["address"] + 8192)
    assert segment in torch.musa.memory_snapshot()


def test_a_failed_capture_gives_its_memory_back(musa: str) -> None:
    collect()
    before = ledger.in_pools
    (g,) = graphs(1)

    def fails() -> None:
        with torch.musa.graph(g):
            torch.ones(3, device=musa).item()

    with pytest.raises(RuntimeError):
        fails()
    collect()
    assert ledger.in_pools == before


def test_tensors_of_every_size_and_shape_come_from_the_pool(musa: str) -> None:
    (g,) = graphs(1)
    x = torch.arange(24.0, device=musa).view(2, 3, 4)
    with torch.musa.graph(g):
        results = [
            torch.empty(0, device=musa),
            x[:0] + 1,
            x.permute(2, 0, 1) + 1,
            x.sum(),
            x.expand(5, 2, 3, 4).clone(),
            (x + 1)[1:, ::2],
            torch.zeros(3 * MIB, device=musa, dtype=torch.uint8),
        ]
    g.replay()
    host = torch.arange(24.0).view(2, 3, 4)
    wanted = [
        torch.empty(0),
        host[:0] + 1,
        host.permute(2, 0, 1) + 1,
        host.sum(),
        host.expand(5, 2, 3, 4).clone(),
        (host + 1)[1:, ::2],
        torch.zeros(3 * MIB, dtype=torch.uint8),
    ]
    for got, want in zip(results, wanted, strict=True):
        assert got.stride() == want.stride()
        assert torch.equal(got.cpu(), want)
    spans = [(s["address"], s["address"] + s["total_size"]) for s in torch.musa.memory_snapshot(g.pool())]
    for got in results[2:]:  # what has no bytes has no address
        assert any(start <= got.untyped_storage().data_ptr() < stop for start, stop in spans)
