"""Memory statistics and the device's limit: counts are those of a model, and a full device leaves nothing half done."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from garbage import collect
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpatch.simulator.memory import Ledger, ledger

KIB, MIB = 1 << 10, 1 << 20


def in_use() -> tuple[int, int, int]:
    """Blocks, bytes of live tensors, bytes of pools."""
    collect()
    return ledger.blocks.current, torch.musa.memory_allocated(), ledger.in_pools


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "counted"), [(0, 0), (1, 512), (512, 512), (513, 1024), (4000, 4096), (MIB + 1, MIB + 512)]
)
def test_tensors_count_in_multiples_of_512_bytes(musa: str, nbytes: int, counted: int) -> None:
    before, blocks = torch.musa.memory_allocated(), ledger.blocks.current
    x = torch.empty(nbytes, dtype=torch.uint8, device=musa)
    assert torch.musa.memory_allocated() - before == counted
    assert ledger.blocks.current - blocks == (counted > 0)
    y = x.view(-1)
    del x
    assert torch.musa.memory_allocated() - before == counted
    del y
    assert torch.musa.memory_allocated() == before


def test_what_only_reads_geometry_takes_nothing(musa: str) -> None:
    x = torch.ones(6, 4, device=musa)
    before = torch.musa.memory_stats()["allocation.all.allocated"]
    kept = [x.t(), x[1:], x.expand(3, 6, 4), x.detach(), x.view(torch.int32), x.unbind(), x.split(2), x.diagonal()]
    x.transpose_(0, 1)
    assert torch.musa.memory_stats()["allocation.all.allocated"] == before
    assert len(kept) == 8


class _Model:
    """The device as its documentation has it, without knowing how it is done."""

    def __init__(self) -> None:
        self.live: list[int] = []
        self.reserved = self.peak = self.peak_reserved = self.taken = self.given = 0

    @property
    def allocated(self) -> int:
        return sum(self.live)

    def take(self, nbytes: int) -> None:
        size = (nbytes + 511) // 512 * 512
        self.live.append(size)
        self.taken += size
        self.reserved = max(self.reserved, self.allocated)
        self.peak, self.peak_reserved = max(self.peak, self.allocated), max(self.peak_reserved, self.reserved)

    def give_back(self, index: int) -> None:
        self.given += self.live.pop(index % len(self.live))

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak(self) -> None:
        self.peak, self.peak_reserved = self.allocated, self.reserved


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 10_000)),
        st.tuples(st.just("give_back"), st.integers(0, 100)),
        st.tuples(st.sampled_from(["empty_cache", "reset_peak"]), st.just(0)),
    ),
    max_size=40,
)


@settings(settings.default, max_examples=settings.default.max_examples // 5)
@given(steps=steps)
def test_statistics_are_those_of_a_model(musa: str, steps: list[tuple[str, int]]) -> None:
    torch.musa.empty_cache()
    torch.musa.reset_peak_memory_stats()
    before = torch.musa.memory_stats()
    model, tensors = _Model(), []
    for action, number in steps:
        if action == "take":
            tensors.append(torch.empty(number, dtype=torch.uint8, device=musa))
            model.take(number)
        elif action == "give_back":
            if tensors:
                del tensors[number % len(tensors)]
                model.give_back(number)
        elif action == "empty_cache":
            torch.musa.empty_cache()
            model.empty_cache()
        else:
            torch.musa.reset_peak_memory_stats()
            model.reset_peak()
        now = {name: value - before[name] for name, value in torch.musa.memory_stats().items()}
        assert now["allocation.all.current"] == len(model.live)
        assert now["allocated_bytes.all.current"] == model.allocated
        assert now["allocated_bytes.all.peak"] == model.peak
        assert now["allocated_bytes.all.allocated"] == model.taken
        assert now["allocated_bytes.all.freed"] == model.given
        assert now["reserved_bytes.all.current"] == model.reserved
        assert now["reserved_bytes.all.peak"] == model.peak_reserved


def test_totals_can_be_reset(musa: str) -> None:
    x = torch.empty(1000, device=musa)
    torch.musa.reset_accumulated_memory_stats()
    y = torch.empty(100, device=musa)
    del x
    stats = torch.musa.memory_stats()
    assert (stats["allocation.all.allocated"], stats["allocation.all.freed"]) == (1, 1)
    assert (stats["allocated_bytes.all.allocated"], stats["allocated_bytes.all.freed"]) == (512, 4096)
    assert y.numel() == 100


def test_torch_accelerator_answers_the_same(musa: str) -> None:
    x = torch.empty(1000, device=musa)
    assert torch.accelerator.memory_allocated() == torch.musa.memory_allocated() > 0
    assert torch.accelerator.memory_reserved() == torch.musa.memory_reserved()
    assert torch.accelerator.max_memory_allocated() == torch.musa.max_memory_allocated()
    assert torch.accelerator.max_memory_reserved() == torch.musa.max_memory_reserved()
    del x
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    assert torch.musa.max_memory_allocated() == torch.musa.memory_allocated()
    assert torch.musa.max_memory_reserved() == torch.musa.memory_reserved() == torch.accelerator.memory_reserved()
    stats = torch.accelerator.memory_stats()
    assert stats["allocated_bytes.all.current"] == torch.musa.memory_allocated()


def test_memory_of_graphs_counts(musa: str) -> None:
    before = in_use()
    reserved = torch.musa.memory_reserved()
    g, x = torch.musa.MUSAGraph(), torch.ones(1000, device=musa)
    with torch.musa.graph(g):
        y = x + 1
    assert in_use() == (before[0] + 2, before[1] + 2 * 4096, before[2] + 2 * MIB)
    del x, y
    assert torch.musa.memory_allocated() == before[1]
    torch.musa.empty_cache()
    assert torch.musa.memory_reserved() == before[1] + before[2] + 2 * MIB <= reserved + 2 * MIB
    g.reset()
    assert in_use() == before


def cycle(musa: str) -> None:
    """What a program does: a step of training, out= arguments, a graph, copies."""
    weight = torch.randn(16, 16, device=musa, requires_grad=True)
    loss = F.layer_norm((weight @ weight.t())[1:].softmax(-1), (16,)).square().sum()
    loss.backward()
    with torch.no_grad():
        weight.sub_(weight.grad)
    torch.add(weight.detach(), 1, out=torch.empty(0, device=musa)).cpu()
    torch.arange(10, device=musa).resize_(20)


def test_cycles_in_several_threads_leave_the_counts_as_they_were(musa: str) -> None:
    cycle(musa)
    before, errors = in_use(), []

    def work(with_graphs: bool) -> None:
        try:
            for n in range(40):
                cycle(musa)
                if with_graphs and n % 4 == 0:
                    g, x = torch.musa.MUSAGraph(), torch.ones(100, device=musa)
                    with torch.musa.graph(g):
                        y = (x + n).exp().log()
                    g.replay()
                    torch.testing.assert_close(y.cpu(), torch.full((100,), 1.0 + n))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert in_use() == before


def test_a_collection_in_the_middle_of_a_count_loses_nothing() -> None:
    """A block may die inside the allocator's own code: whatever line of it is interrupted, the counts add up."""
    import sys

    own, outer = Ledger(), 512
    own.limit = 1 << 20
    own.take(4 * outer)
    own.give_back(2 * outer)
    pending: list[Callable[[], None]] = []

    def interrupt(frame: object, event: str, _arg: object) -> object:
        if event == "line" and pending:
            pending.pop()()
        return interrupt

    before = sys.gettrace()
    for line in range(12):  # the interruption comes at the first, second ... line
        for outside in (lambda: own.take(outer), own.empty_cache, lambda: own.take_segment(outer)):
            own.take(outer)
            skipped = [lambda: None] * line
            pending[:] = [lambda: own.give_back(outer), *skipped]
            sys.settrace(interrupt)  # type: ignore[arg-type]
            try:
                outside()
            finally:
                sys.settrace(before)
            if pending:
                own.give_back(outer)
                pending.clear()
    live = own.allocated.current
    assert live == (2 + 12) * outer
    own.empty_cache()
    assert own.reserved.current == live + own.in_pools
    assert own.in_pools == 12 * outer


def test_what_is_reserved_stays_under_the_limit() -> None:
    own = Ledger()
    own.limit = 8 * MIB
    own.take(6 * MIB)
    own.give_back(6 * MIB)
    assert own.reserved.current == 6 * MIB
    own.take_segment(4 * MIB)  # 2 MiB are free: 2 of what is cached make room
    assert own.reserved.current == 8 * MIB
    own.take(4 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        own.take(512)
    own.give_back_segment(4 * MIB)
    assert own.reserved.current == 4 * MIB


# -- the limit ------------------------------------------------------------------------------------


def test_a_full_device_says_so_and_goes_on(musa: str, room: Callable[[int], None]) -> None:
    room(4 * MIB)
    kept = torch.ones(MIB // 2, device=musa)
    refused = torch.musa.memory_stats()["num_ooms"]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.ones(MIB, device=musa)
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    assert message.startswith("MUSA out of memory. Tried to allocate 4.00 MiB. Device 0 has a total capacity of ")
    assert "of which 2.00 MiB is free" in message
    assert "is allocated by PyTorch" in message
    assert message.endswith("The capacity is that of simulate(memory=...).")
    assert torch.musa.memory_stats()["num_ooms"] == refused + 1
    more = torch.ones(MIB // 2, device=musa)
    assert more.cpu().sum() == kept.cpu().sum() == MIB // 2


def test_to_the_last_byte(musa: str, room: Callable[[int], None]) -> None:
    room(1024)
    a = torch.empty(512, dtype=torch.uint8, device=musa)
    b = torch.empty(1, dtype=torch.uint8, device=musa)
    assert torch.musa.mem_get_info()[0] == 0
    assert torch.empty(0, device=musa).numel() == 0
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, dtype=torch.uint8, device=musa)
    a.add_(1)  # in place, and views: nothing more is needed
    assert a[:1].view(1, 1).shape == (1, 1)
    del b
    assert torch.empty(1, device=musa).numel() == 1


def test_what_is_cached_makes_room(musa: str, room: Callable[[int], None]) -> None:
    room(4 * MIB)
    x = torch.empty(3 * MIB, dtype=torch.uint8, device=musa)
    del x
    assert torch.musa.mem_get_info()[0] == MIB
    y = torch.empty(4 * MIB, dtype=torch.uint8, device=musa)
    assert torch.musa.mem_get_info()[0] == 0
    del y
    g = torch.musa.MUSAGraph()
    with torch.musa.graph(g):  # a segment takes 2 MiB of it
        torch.ones(3, device=musa)
    assert torch.musa.mem_get_info() == (2 * MIB, ledger.total)


def test_free_and_total(musa: str, simulate: Callable[..., None]) -> None:
    torch.musa.empty_cache()
    reserved = torch.musa.memory_reserved()
    simulate(memory="3 GiB")
    assert torch.musa.mem_get_info() == torch.accelerator.get_memory_info() == (3 * KIB * MIB - reserved, 3 * KIB * MIB)
    assert torch.musa.get_device_properties().total_memory == 3 * KIB * MIB
    simulate(memory=None)
    free, total = torch.musa.mem_get_info()
    assert total > 3 * KIB * MIB or total == torch.musa.get_device_properties().total_memory
    assert total - free == reserved


ALLOCATING: dict[str, Callable[[torch.Tensor], object]] = {
    "functional": lambda x: x + 1,
    "with two results": lambda x: x.sort(),
    "out": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "from the host": lambda x: torch.ones(x.shape).to(x.device),
    "conversion": lambda x: x.double(),
    "contiguous": lambda x: x.view(2, -1).t().contiguous(),
    "random": lambda x: torch.rand_like(x),
    "list": lambda x: torch._foreach_add([x, x], 1),
    "growing": lambda x: torch.empty(1, device=x.device).resize_(len(x)),
    "storage": lambda x: x.untyped_storage().clone(),
    "deepcopy": lambda x: __import__("copy").deepcopy(x),
}


@pytest.mark.parametrize("what", ALLOCATING)
def test_whatever_allocates_is_refused_and_leaves_no_count(musa: str, room: Callable[[int], None], what: str) -> None:
    x = torch.arange(float(MIB), device=musa)
    room(MIB)
    before = in_use()
    with pytest.raises(torch.OutOfMemoryError, match="MUSA out of memory"):
        ALLOCATING[what](x)
    assert in_use() == before
    assert x[-1].item() == MIB - 1


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_refusal_leaves_arguments_as_they_were(musa: str, room: Callable[[int], None]) -> None:
    x = torch.arange(float(MIB), device=musa)
    out, small = torch.full((3,), 7.0, device=musa), torch.full((2,), 5.0, device=musa)
    values, indices = torch.empty(0, device=musa), torch.empty(0, dtype=torch.long, device=musa)
    room(2 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        torch.add(x, 1, out=out)
    assert out.tolist() == [7, 7, 7]
    with pytest.raises(torch.OutOfMemoryError):
        small.resize_(MIB)
    assert small.tolist() == [5, 5]
    with pytest.raises(torch.OutOfMemoryError):
        torch.sort(x, out=(values, indices))
    assert not values.numel()
    assert not indices.numel()
    parameter = torch.nn.Parameter(x)
    with pytest.raises(torch.OutOfMemoryError):
        (parameter * 2).sum().backward()
    assert parameter.grad is None


def test_a_full_device_within_a_capture(musa: str, room: Callable[[int], None]) -> None:
    g, x = torch.musa.MUSAGraph(), torch.ones(MIB, device=musa)
    room(3 * MIB)
    before = in_use()

    def fill() -> None:
        with torch.musa.graph(g):
            y = x[:100] + 1  # a segment of 2 MiB
            y + x[:1] + (x + 1)[:100]  # and one of 20

    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 MiB is held by graph pools"):
        fill()
    assert not torch.musa.is_current_stream_capturing()
    assert in_use() == before
    with torch.musa.graph(g):
        y = x[:100] + 1
    g.replay()
    assert y.eq(2).all()
