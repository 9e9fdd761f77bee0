"""Random numbers: the device's sequence repeats, and neither it nor the CPU's disturbs the other."""

from __future__ import annotations

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
