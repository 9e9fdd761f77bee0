"""What `simulate()` can be told: which values it takes, what they do, and that a refused one changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from garbage import collect

from fxpatch.errors import SimulatorError
from fxpatch.simulator.graph import limits
from fxpatch.simulator.memory import ledger

SIZES = [
    (1 << 40, 1 << 40),
    ("2 TB", None),
    ("16 GiB", 16 << 30),
    ("16GiB", 16 << 30),
    ("1.5 GiB", 3 << 29),
    ("200 GB", 200 * 10**9),
    ("80000 MB", 80_000 * 10**6),
    ("90000 MiB", 90_000 << 20),
    ("9000000 KiB", 9_000_000 << 10),
    ("9000000 KB", 9_000_000_000),
    ("99999999999 B", 99_999_999_999),
]


@pytest.mark.parametrize(("memory", "nbytes"), SIZES)
def test_sizes_of_memory(simulate: Callable[..., None], memory: object, nbytes: int | None) -> None:
    if nbytes is None:
        with pytest.raises(SimulatorError, match=re.escape(f"memory={memory!r}")):
            simulate(memory=memory)
    else:
        simulate(memory=memory)
        assert torch.musa.mem_get_info()[1] == nbytes


@pytest.mark.parametrize(
    "memory", [0, -1, 1.5, True, "", "GiB", "0 GiB", "0.0001 B", "-1 GiB", "1 gib", "1 GiB extra", b"1"]
)
def test_what_is_no_size(simulate: Callable[..., None], memory: object) -> None:
    simulate(memory="64 GiB")
    with pytest.raises(SimulatorError) as caught:
        simulate(memory=memory, strict=True)
    assert caught.value.seen == f"memory={memory!r}"
    assert "'2 GiB'" in caught.value.expected
    assert ledger.limit == 64 << 30
    assert not limits.strict


def test_less_memory_than_is_in_use(musa: str, simulate: Callable[..., None]) -> None:
    x = torch.ones(1000, device=musa)
    with pytest.raises(SimulatorError, match=r"while tensors and graph pools hold \d+ bytes"):
        simulate(memory=512)
    assert ledger.limit is None
    assert x.sum() == 1000


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "3"])
def test_what_is_no_number_of_graphs(simulate: Callable[..., None], count: object) -> None:
    with pytest.raises(SimulatorError, match=re.escape(f"max_live_graphs={count!r}")):
        simulate(max_live_graphs=count, strict=True)
    assert limits.max_live_graphs is None
    assert not limits.strict


@pytest.mark.parametrize("strict", [1, None, "yes"])
def test_what_is_neither_true_nor_false(simulate: Callable[..., None], strict: object) -> None:
    with pytest.raises(SimulatorError, match=re.escape(f"strict={strict!r}")):
        simulate(strict=strict)


def test_unknown_settings_are_named(simulate: Callable[..., None]) -> None:
    with pytest.raises(SimulatorError, match=r"no setting colour, size") as caught:
        simulate(size=3, colour=1, strict=True)
    assert caught.value.expected == "memory, max_live_graphs, strict"
    assert not limits.strict


def test_settings_left_out_stay_as_they_are(simulate: Callable[..., None]) -> None:
    simulate(memory="64 GiB", max_live_graphs=3)
    simulate(strict=True)
    simulate()
    assert (ledger.limit, limits.max_live_graphs, limits.strict) == (64 << 30, 3, True)
    simulate(memory=None)
    assert (ledger.limit, limits.max_live_graphs, limits.strict) == (None, 3, True)


def test_settings_are_taken_before_the_device_is_there(fresh: Callable[..., str]) -> None:
    fresh("""
        import torch
        from fxpatch.errors import SimulatorError
        from fxpatch.simulator import simulate
        try:
            simulate("npu", memory="lots")
        except SimulatorError:
            assert torch._C._get_privateuse1_backend_name() == "privateuseone"
        npu = simulate("npu", memory="1 MiB", max_live_graphs=1, strict=True)
        try:
            torch.ones(1 << 20, device="npu")
        except torch.OutOfMemoryError as error:
            assert str(error).startswith("NPU out of memory. Tried to allocate 4.00 MiB."), error
        else:
            raise AssertionError
        assert npu.mem_get_info() == (1 << 20, 1 << 20)
    """)


# -- live graphs ----------------------------------------------------------------------------------


def capture(musa: str) -> tuple[object, torch.Tensor]:
    g = torch.musa.MUSAGraph()
    with torch.musa.graph(g):
        y = torch.ones(3, device=musa) + 1
    return g, y


def test_one_graph_too_many(musa: str, simulate: Callable[..., None]) -> None:
    collect()
    simulate(max_live_graphs=2)
    kept = [capture(musa) for _ in range(2)]
    with pytest.raises(torch.AcceleratorError, match="MUSA error: out of resources: 2 graphs are live") as caught:
        capture(musa)
    assert "simulate(max_live_graphs=...)" in str(caught.value)
    assert not torch.musa.is_current_stream_capturing()
    for g, y in kept:
        g.replay()
        assert y.tolist() == [2, 2, 2]
    kept[0][0].reset()
    capture(musa)
    simulate(max_live_graphs=None)
    kept += [capture(musa) for _ in range(5)]
    simulate(max_live_graphs=1)  # those that are there stay
    for g, y in kept[1:]:
        g.replay()
        assert y.tolist() == [2, 2, 2]


def test_a_graph_that_is_gone_makes_room(musa: str, simulate: Callable[..., None]) -> None:
    collect()
    simulate(max_live_graphs=1)
    for _ in range(5):
        g, _ = capture(musa)
        del g, _


def test_a_graph_counts_once_it_is_instantiated(musa: str, simulate: Callable[..., None]) -> None:
    collect()
    simulate(max_live_graphs=1)
    lazy = [torch.musa.MUSAGraph(keep_graph=True) for _ in range(2)]
    for g in lazy:
        with torch.musa.graph(g):
            pass
    lazy[0].instantiate()
    lazy[0].instantiate()
    for start in (lazy[1].instantiate, lazy[1].replay):
        with pytest.raises(torch.AcceleratorError, match="out of resources"):
            start()
    lazy[0].reset()
    lazy[1].replay()


def test_a_failed_capture_does_not_count(musa: str, simulate: Callable[..., None]) -> None:
    collect()
    simulate(max_live_graphs=1)

    def fails() -> None:
        with torch.musa.graph(torch.musa.MUSAGraph()):
            torch.ones(1, device=musa).item()

    for _ in range(3):
        with pytest.raises(RuntimeError, match="not permitted"):
            fails()
    capture(musa)
