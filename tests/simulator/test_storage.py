"""Device memory: views share it, the last holder frees it, and nothing points to memory that is gone."""

from __future__ import annotations

import itertools
import resource
import threading

import pytest
import torch
from garbage import collect

from fxpatch.errors import SimulatorError
from fxpatch.simulator.memory import ledger


@pytest.fixture
def x(musa: str) -> torch.Tensor:
    """0..5 as a 2x3 float tensor on the device."""
    return torch.arange(6.0, device=musa).view(2, 3)


def live() -> tuple[int, int]:
    collect()
    return ledger.blocks.current, ledger.allocated.current


def test_views_share_memory_and_keep_it(x: torch.Tensor) -> None:
    views = [x[0], x.t(), x.detach(), x.data, x.as_strided((3,), (2,)), x.view(torch.int32), x.unfold(1, 2, 1), x.real]
    assert {v.untyped_storage().data_ptr() for v in views} == {x.untyped_storage().data_ptr()}
    row = x[1]
    del x, views
    assert row.tolist() == [3, 4, 5]


def test_writes_show_through_views(x: torch.Tensor) -> None:
    column = x.t()[1]
    column.mul_(10)
    x[0].zero_()
    assert x.tolist() == [[0, 0, 0], [3, 40, 5]]
    assert x._version > 0


def test_a_thousand_cycles_leave_nothing_behind(musa: str) -> None:
    def cycle() -> None:
        weight = torch.randn(64, 64, device=musa, requires_grad=True)
        y = (weight @ weight.t())[1:].softmax(-1)
        y.sum().backward()
        torch.add(y.detach(), 1, out=torch.empty(0, device=musa))
        y.cpu()

    for _ in range(50):
        cycle()
    before, resident = live(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        cycle()
    assert live() == before
    # one cycle takes over 100 kB: a leak of one tensor per cycle would show as 16 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 8_000


def test_memory_is_freed_when_the_last_view_goes(musa: str) -> None:
    before = live()
    x = torch.ones(1000, device=musa)
    assert live() == (before[0] + 1, before[1] + 4096)
    view = x[10:]
    del x
    assert live() == (before[0] + 1, before[1] + 4096)
    del view
    assert live() == before


def test_memory_saved_for_backward_is_kept(musa: str) -> None:
    x = torch.full((1000,), 2.0, device=musa, requires_grad=True)
    y = (x * 3).pow(2)  # saves a tensor that only C++ holds
    collect()
    torch.full((1000,), 7.0, device=musa)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.cpu().eq(36).all()


def test_addresses_are_unique_among_the_living(musa: str) -> None:
    tensors = [torch.empty(n, device=musa) for n in range(1, 200)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_empty_tensors(musa: str) -> None:
    x = torch.empty(0, 3, device=musa)
    assert x.device == torch.device(musa, 0)
    assert x.sum().item() == 0
    assert torch.cat([x, torch.ones(1, 3, device=musa)]).shape == (1, 3)
    assert (x @ torch.ones(3, 4, device=musa)).shape == (0, 4)
    assert x.cpu().shape == (0, 3)
    assert torch.ones(0, 3, device=musa, requires_grad=True).sum().backward() is None


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_dtypes_make_the_round_trip(musa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1, 0]).to(dtype)
    back = x.to(musa).cpu()
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_strides_and_offsets_make_the_round_trip(musa: str) -> None:
    x = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    assert x.to(musa).stride() == x.stride()
    assert torch.equal(x.to(musa)[1:, :, ::2].cpu(), x[1:, :, ::2])
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert image.to(musa).is_contiguous(memory_format=torch.channels_last)


def test_growing(x: torch.Tensor) -> None:
    alone = x.clone()
    assert alone.resize_(10).shape == (10,)
    assert alone[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert alone.resize_(2, 2).tolist() == [[0, 1], [2, 3]]
    tail = torch.arange(6.0, device=x.device)[2:]
    assert tail.resize_(4).tolist() == [2, 3, 4, 5]
    with pytest.raises(SimulatorError, match="shares its memory"):
        tail.view(-1).resize_(100)


def test_out_arguments_are_resized(x: torch.Tensor) -> None:
    out = torch.empty(0, device=x.device)
    assert torch.add(x, x, out=out) is out
    assert out.tolist() == [[0, 2, 4], [6, 8, 10]]
    with pytest.warns(UserWarning, match="was resized"):
        small = torch.add(x, 1, out=torch.empty(2, device=x.device))
    assert small.tolist() == [[1, 2, 3], [4, 5, 6]]
    buffer = torch.empty(4, 3, device=x.device)
    torch.add(x, x, out=buffer[:2])
    assert buffer[:2].tolist() == out.tolist()


def test_set(x: torch.Tensor) -> None:
    y = torch.empty(0, device=x.device)
    y.set_(x)
    y[0, 0] = 9
    assert x[0, 0] == 9
    y.set_(x.untyped_storage(), 1, (2,), (2,))
    assert y.tolist() == [1, 3]
    assert torch.empty(0, device=x.device).set_(x.untyped_storage()).shape == (6,)


def test_in_place_geometry(x: torch.Tensor) -> None:
    assert x.t_().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert x.unsqueeze_(0).shape == (1, 3, 2)
    assert x.squeeze_().swapaxes_(0, 1).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_copies_both_ways(x: torch.Tensor) -> None:
    host = torch.empty(2, 3)
    host.copy_(x)
    assert host.tolist() == x.tolist()
    x.copy_(torch.ones(3), non_blocking=True)
    assert x.eq(1).all()
    assert x.to("cpu", non_blocking=True).eq(1).all()
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(x.device) is x
    assert x.to(x.device, copy=True).data_ptr() != x.data_ptr()


def test_host_memory_is_pinned_by_copying(musa: str) -> None:
    x = torch.arange(3.0)
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    assert not x.is_pinned()
    assert pinned.to(musa, non_blocking=True).tolist() == [0, 1, 2]
    assert not pinned.to(musa).is_pinned()
    (batch,) = torch.utils.data.DataLoader(x, batch_size=3, pin_memory=True)
    assert batch.is_pinned()


def test_the_host_cannot_look_inside(x: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="can't convert musa:0 device type tensor to numpy"):
        x.numpy()
    assert x[1, 2].item() == 5
    assert repr(x) == "tensor([[0., 1., 2.],\n        [3., 4., 5.]], device='musa:0')"


def test_conjugation_is_lazy_and_ends(musa: str) -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    conjugated = z.to(musa).conj()
    assert conjugated.is_conj()
    for got, want in ((conjugated, z.conj()), (conjugated + 1, z.conj() + 1), (conjugated.imag, z.conj().imag)):
        assert torch.equal(got.cpu(), want)
    assert torch.equal(conjugated.resolve_conj().cpu(), z.conj().resolve_conj())


def test_there_is_one_device(musa: str) -> None:
    for make in (
        lambda: torch.empty(2, device="musa:1"),
        lambda: torch.ones(2).to("musa:1"),
        lambda: torch.randperm(2, device="musa:1"),
        lambda: torch.musa.set_device(1),
    ):
        with pytest.raises(RuntimeError, match="invalid device ordinal 1"):
            make()


def test_sparse_tensors_are_refused_in_words(x: torch.Tensor) -> None:
    with pytest.raises(SimulatorError, match="no memory for"):
        x.to_sparse()


def test_threads_allocate_and_free_at_once(musa: str) -> None:
    before = live()

    def work() -> None:
        for n in range(200):
            torch.ones(n + 1, device=musa).add_(1).sum().item()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live() == before
