"""Random numbers: the device's sequence repeats, and neither it nor the CPU's disturbs the other."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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


def test_the_states_of_all_devices_are_one(musa: str) -> None:
    states = torch.musa.get_rng_state_all()
    assert len(states) == 1
    want = torch.rand(4, device=musa)
    torch.musa.set_rng_state_all(states)
    assert torch.equal(torch.rand(4, device=musa), want)
    with pytest.raises(RuntimeError, match="invalid device ordinal 1"):
        torch.musa.set_rng_state_all([*states, *states])
    with pytest.raises((RuntimeError, TypeError), match="ByteTensor"):
        torch.musa.set_rng_state(torch.ones(3))


def test_seeds(musa: str) -> None:
    """`torch.manual_seed` and `torch.seed` seed both; the device's own functions leave the CPU alone."""
    assert torch.manual_seed(11).initial_seed() == torch.musa.initial_seed() == 11
    assert torch.seed() == torch.musa.initial_seed()
    torch.manual_seed(11)
    of_cpu = torch.get_rng_state()
    torch.musa.seed()
    assert torch.musa.initial_seed() != 11
    torch.musa.seed_all()
    torch.musa.manual_seed(12)
    torch.musa.manual_seed_all(13)
    assert torch.musa.initial_seed() == 13
    assert torch.equal(torch.get_rng_state(), of_cpu)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("preserve", [True, False])
def test_checkpointing_repeats_the_dropout(musa: str, reentrant: bool, preserve: bool) -> None:
    """The gradient is zero exactly where the output is, and what comes after draws as if nothing had been repeated."""

    def dropout(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * 1, 0.5)

    torch.manual_seed(3)
    x = torch.ones(200, device=musa, requires_grad=True)
    y = checkpoint(dropout, x, use_reentrant=reentrant, preserve_rng_state=preserve)
    after = torch.musa.get_rng_state()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y) is preserve
    assert torch.equal(torch.musa.get_rng_state(), after) is preserve


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_draws_from_the_same_sequence(musa: str, backend: str) -> None:
    """It repeats after a seed, advances, and neither disturbs the CPU nor is disturbed."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.dropout(x, 0.5), backend=backend, fullgraph=True)
    x = torch.ones(200, device=musa)
    torch.manual_seed(3)
    of_cpu = torch.get_rng_state()
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), of_cpu)
    torch.musa.manual_seed(3)
    torch.rand(9)
    assert torch.equal(compiled(x), first)
    state = torch.musa.get_rng_state()
    again = compiled(x)
    assert torch.equal(again, second)
    torch.musa.set_rng_state(state)
    assert torch.equal(compiled(x), second)
    if backend == "aot_eager":  # Inductor has a generator of its own, seeded from the device's
        torch.musa.set_rng_state(state)
        assert torch.equal(F.dropout(x, 0.5), second)


DRAWS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "rand": lambda x, g: torch.rand(4, device=x.device, generator=g),
    "randn": lambda x, g: torch.randn(4, device=x.device, generator=g),
    "randint": lambda x, g: torch.randint(9, (4,), device=x.device, generator=g),
    "randperm": lambda x, g: torch.randperm(4, device=x.device, generator=g),
    "normal": lambda x, g: torch.normal(x, x, generator=g),
    "normal_": lambda x, g: x.normal_(generator=g),
    "uniform_": lambda x, g: x.uniform_(generator=g),
    "bernoulli": lambda x, g: torch.bernoulli(x, generator=g),
    "multinomial": lambda x, g: torch.multinomial(x, 2, generator=g),
    "init": lambda x, g: torch.nn.init.trunc_normal_(x, generator=g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_takes_the_devices_generator_and_no_other(musa: str, name: str) -> None:
    (generator,) = torch.musa.default_generators
    draw, x = DRAWS[name], torch.full((4,), 0.5, device=musa)
    generator.manual_seed(5)
    want = draw(x.clone(), generator)
    generator.manual_seed(5)
    assert torch.equal(draw(x.clone(), generator), want)
    for other in (torch.Generator(), torch.default_generator):
        with pytest.raises(RuntimeError, match="Expected a 'musa' device type for generator but found 'cpu'"):
            draw(x.clone(), other)


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
