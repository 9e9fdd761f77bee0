"""Random numbers: do they follow the seed, can their state be kept, and do they leave the CPU's sequence alone?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fxpatch.doctor.probe import Broken, NotApplicable, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, run_all
from fxpatch.doctor.probes.presence import device_module, needs_accelerator

_N = 1024
DRAWS: dict[str, Callable[[str], torch.Tensor]] = {
    "rand": lambda device: torch.rand(_N, device=device),
    "randn": lambda device: torch.randn(_N, device=device),
    "randint": lambda device: torch.randint(0, 1 << 20, (_N,), device=device),
    "randperm": lambda device: torch.randperm(_N, device=device),
    "uniform_": lambda device: torch.empty(_N, device=device).uniform_(-1, 1),
    "bernoulli_": lambda device: torch.empty(_N, device=device).bernoulli_(0.5),
    "multinomial": lambda device: torch.multinomial(torch.ones(_N, device=device), _N // 2),
    "dropout": lambda device: torch.nn.functional.dropout(torch.ones(_N, device=device), 0.5),
}


def _seed(subject: Subject) -> str:
    needs_accelerator(subject)

    def drawn(draw: Callable[[str], torch.Tensor], seed: int) -> list[float]:
        torch.manual_seed(seed)
        values: list[float] = draw(subject.device).cpu().tolist()
        return values

    def check(draw: Callable[[str], torch.Tensor]) -> None:
        first = drawn(draw, 1)
        if drawn(draw, 1) != first:
            raise Differs("the same seed gives other numbers")
        if drawn(draw, 2) == first:
            raise Differs("another seed gives the same numbers")
        torch.manual_seed(1)
        draw(subject.device)
        if draw(subject.device).cpu().tolist() == first:
            raise Differs("the second draw repeats the first")

    run_all({name: partial(check, f) for name, f in DRAWS.items()})
    values = torch.rand(1 << 14, device=subject.device).cpu()
    mean = float(values.mean())
    if not (float(values.min()) >= 0 and float(values.max()) < 1 and abs(mean - 0.5) < 0.02):
        raise Broken(f"torch.rand gives values from {float(values.min())} to {float(values.max())}, {mean} on average")
    return f"{len(DRAWS)} ways to draw follow torch.manual_seed"


def _state(subject: Subject) -> str:
    needs_accelerator(subject)
    module, device = device_module(subject), subject.device

    def kept() -> None:
        state = module.get_rng_state()
        first = torch.rand(_N, device=device).cpu()
        module.set_rng_state(state)
        expect(torch.rand(_N, device=device).cpu().tolist(), first.tolist(), "a draw after set_rng_state()")

    def forked() -> None:
        torch.manual_seed(3)
        want = torch.rand(_N, device=device).cpu()
        torch.manual_seed(3)
        with torch.random.fork_rng(devices=range(module.device_count()), device_type=device):
            torch.rand(7, device=device)
            torch.manual_seed(99)
        expect(torch.rand(_N, device=device).cpu().tolist(), want.tolist(), "a draw after fork_rng()")

    def seeded() -> None:
        module.manual_seed_all(5)
        first = torch.rand(_N, device=device).cpu()
        module.manual_seed_all(5)
        expect(torch.rand(_N, device=device).cpu().tolist(), first.tolist(), "a draw after manual_seed_all()")
        expect(int(module.initial_seed()), 5, "initial_seed()")

    return run_all({"get and set": kept, "fork_rng": forked, "manual_seed_all": seeded})


def _generator(subject: Subject) -> str:
    needs_accelerator(subject)
    device = subject.device
    try:
        generator = torch.Generator(device=device)
    except NotImplementedError as error:
        if subject.simulated:
            raise NotApplicable("only C++ can give a backend a torch.Generator; a simulated device has none") from error
        raise
    expect(generator.device.type, device, "the device of a generator")

    def drawn() -> list[float]:
        values: list[float] = torch.rand(_N, device=device, generator=generator).cpu().tolist()
        return values

    def follows_its_seed() -> None:
        first = generator.manual_seed(7) and drawn()
        if drawn() == first:
            raise Differs("the second draw repeats the first")
        generator.manual_seed(7)
        expect(drawn(), first, "a draw after generator.manual_seed()")

    def keeps_its_state() -> None:
        state = generator.get_state()
        first = drawn()
        generator.set_state(state)
        expect(drawn(), first, "a draw after generator.set_state()")

    def apart() -> None:
        torch.manual_seed(0)
        want = torch.rand(_N, device=device).cpu().tolist()
        torch.manual_seed(0)
        drawn()
        expect(torch.rand(_N, device=device).cpu().tolist(), want, "a draw without it, after one with it")

    return run_all({"seed": follows_its_seed, "state": keeps_its_state, "apart from the default": apart})


def _apart_from_the_cpu(subject: Subject) -> str:
    needs_accelerator(subject)
    device = subject.device

    def cpu_untouched(draw: Callable[[str], torch.Tensor]) -> None:
        before = torch.random.get_rng_state()
        draw(device)
        if not torch.equal(torch.random.get_rng_state(), before):
            raise Differs("a draw on the device moves the CPU's sequence")

    def device_untouched() -> None:
        torch.manual_seed(4)
        want = torch.rand(_N, device=device).cpu().tolist()
        torch.manual_seed(4)
        torch.rand(_N)
        expect(torch.rand(_N, device=device).cpu().tolist(), want, "a draw on the device, after one on the CPU")

    checks: dict[str, Callable[[], object]] = {name: partial(cpu_untouched, f) for name, f in DRAWS.items()}
    run_all({**checks, "the other way round": device_untouched})
    return "draws on the device and on the CPU do not move each other"


PROBES = (
    Probe(
        name="rng-seed",
        stage="runtime",
        title="random numbers follow the seed",
        run=_seed,
        why="torch.manual_seed reaches a custom device through _is_in_bad_fork and manual_seed_all of its module, and "
        "only warns without them: runs cannot be repeated (torch/random.py)",
        todo="vendor: both functions in the device module, and every random kernel on the default generator",
        installs=False,
    ),
    Probe(
        name="rng-state",
        stage="runtime",
        title="random state can be kept",
        run=_state,
        why="checkpointing and fork_rng save and restore the state through the device module: dropout differs between "
        "forward and recomputation without it (out-of-tree catalogue A7)",
        todo="vendor: get_rng_state, set_rng_state, manual_seed_all and initial_seed in the device module",
        installs=False,
    ),
    Probe(
        name="rng-generator",
        stage="runtime",
        title="generators on the device",
        run=_generator,
        why="samplers and diffusion pipelines take torch.Generator(device): it needs the hook getNewGenerator "
        "(out-of-tree catalogue A7)",
        todo="vendor: implement PrivateUse1HooksInterface::getNewGenerator",
        installs=False,
    ),
    Probe(
        name="rng-apart",
        stage="runtime",
        title="apart from the CPU's numbers",
        run=_apart_from_the_cpu,
        why="a kernel that falls back to the CPU draws from the CPU's sequence: data order and initialisation then "
        "depend on what ran on the device",
        todo="vendor: random operators that fall back to the CPU must take the device's generator",
        installs=False,
    ),
)
