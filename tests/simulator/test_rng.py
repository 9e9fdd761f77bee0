"""Random numbers: the device's sequence repeats, and neither it nor the CPU's disturbs the other."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F


def test_manual_seed_repeats_the_sequence(musa: str) -> None:
    torch.manual_seed(3)
    first = [torch.rand(4, device=musa), F.dropout(torch.ones(50, device=musa)), torch.randperm(9, device=musa)]
    torch.manual_seed(3)
    again = [torch.rand(4, device=musa), F.dropout(torch.ones(50, device=musa)), torch.randperm(9, device=musa)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_device_draws_leave_the_cpu_sequence_alone(musa: str) -> None:
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    torch.randn(7, device=musa)
    F.dropout(torch.ones(50, device=musa))
    torch.nn.init.normal_(torch.empty(3, device=musa))
    assert torch.equal(torch.rand(4), want)


def test_cpu_draws_leave_the_device_sequence_alone(musa: str) -> None:
    torch.musa.manual_seed(3)
    want = torch.rand(4, device=musa)
    torch.musa.manual_seed(3)
    torch.rand(100)
    assert torch.equal(torch.rand(4, device=musa), want)


def test_state_is_saved_and_restored(musa: str) -> None:
    state = torch.musa.get_rng_state()
    want = torch.rand(4, device=musa)
    torch.musa.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=musa), want)
    with torch.random.fork_rng(device_type=musa):
        torch.rand(10, device=musa)
    after = torch.rand(4, device=musa)
    torch.musa.set_rng_state(state)
    torch.rand(4, device=musa)
    assert torch.equal(torch.rand(4, device=musa), after)
    torch.musa.manual_seed_all(7)
    assert torch.musa.initial_seed() == 7


def test_only_the_devices_generator_is_taken(musa: str) -> None:
    (generator,) = torch.musa.default_generators
    generator.manual_seed(5)
    want = torch.rand(4, device=musa, generator=generator)
    torch.musa.manual_seed(5)
    assert torch.equal(torch.rand(4, device=musa), want)
    with pytest.raises(RuntimeError, match="Expected a 'musa' device type for generator but found 'cpu'"):
        torch.rand(4, device=musa, generator=torch.Generator())


def test_threads_that_draw_at_once_keep_to_their_own_sequences(musa: str) -> None:
    def on_the_device() -> None:
        while not done.is_set():
            F.dropout(torch.ones(20_000, device=musa))
            torch.randn(20_000, device=musa)

    torch.manual_seed(5)
    want = [torch.rand(100) for _ in range(3_000)]
    torch.manual_seed(5)
    done = threading.Event()
    other = threading.Thread(target=on_the_device)
    other.start()
    got = [torch.rand(100) for _ in range(3_000)]
    done.set()
    other.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_custom_operator_that_draws(musa: str) -> None:
    library = torch.library.Library("fxpatch_draws", "DEF")
    library.define("noise(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    library.impl("noise", torch.rand_like, "CPU")
    x = torch.ones(4, device=musa)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    first, second = torch.ops.fxpatch_draws.noise(x), torch.ops.fxpatch_draws.noise(x)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(torch.ops.fxpatch_draws.noise(x), first)


def test_dropout(musa: str) -> None:
    x = torch.ones(1_000, device=musa, requires_grad=True)
    y = F.dropout(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert 650 < y.count_nonzero().item() < 850
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)
    assert F.dropout(x, 1.0).count_nonzero().item() == 0
    assert torch.equal(torch.native_dropout(x, 0.5, False)[0], x)
    assert F.dropout(torch.ones(0, device=musa)).numel() == 0
