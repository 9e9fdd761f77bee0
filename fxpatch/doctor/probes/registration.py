"""Is the device there, and does it have the names that torch asks for?"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import expect, in_words, listed, run_all
from fxpatch.doctor.probes.presence import device_module, needs_accelerator, not_the_cpu
from fxpatch.privateuse1 import is_private

_REGISTER = "torch._register_device_module"

ASKED_FOR: dict[str, tuple[str, ...]] = {
    "torch/_utils.py (indices of devices)": ("is_available", "device_count", "current_device"),
    "torch/random.py (manual_seed)": ("_is_in_bad_fork", "manual_seed_all", "manual_seed"),
    "torch/random.py (fork_rng)": ("get_rng_state", "set_rng_state"),
    "torch/utils/checkpoint.py": ("device", "_initialized"),
    "torch/amp/autocast_mode.py": ("get_amp_supported_dtype",),
    "torch/distributed (FSDP, DDP)": ("is_initialized", "set_device", "current_stream", "stream", "Stream", "Event"),
    "benchmarks and every engine": ("synchronize", "get_device_name", "get_device_properties"),
    "every engine (memory)": (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "reset_peak_memory_stats",
        "empty_cache",
        "mem_get_info",
    ),
}
"""Who asks the device module for what; read in torch 2.13."""


def _registration(subject: Subject) -> str:
    not_the_cpu(subject, "torch brings the CPU itself")
    name = subject.device
    try:
        torch._C.device(name)
    except RuntimeError as error:
        raise Broken(f"torch knows no device {name!r}: {in_words(error)}") from error
    module = device_module(subject)
    if module is None:
        raise Broken(f"PrivateUse1 is named {name!r}, and torch.{name} does not exist", todo=f"call {_REGISTER}()")
    if not hasattr(module, "is_available"):
        raise Broken(f"torch.{name} has no is_available()", todo="give the device module that function")
    available, count = bool(module.is_available()), int(module.device_count())
    if not available or count < 1:
        raise Broken(
            f"torch.{name}.is_available() is {available}, and device_count() is {count}",
            todo="check the driver, the card (the vendor's own tool lists it) and the variable that hides devices",
        )
    if is_private(subject.device):
        _members_named_after(name)
    return (
        f"{count} device{'s' * (count > 1)}, on {'PrivateUse1' if is_private(subject.device) else 'a key of its own'}"
    )


def _members_named_after(name: str) -> None:
    """What `torch.utils.generate_methods_for_privateuse1_backend` gives tensors and modules."""
    wanted = {torch.Tensor: (name, f"is_{name}"), torch.nn.Module: (name,)}
    missing = [f"{owner.__name__}.{each}" for owner, names in wanted.items() for each in names if not _has(owner, each)]
    if missing:
        raise Broken(
            f"missing: {', '.join(missing)}",
            why="code written for .cuda() and is_cuda has no counterpart here",
            todo="call torch.utils.generate_methods_for_privateuse1_backend() after naming the backend",
        )


def _has(owner: Any, name: str) -> bool:
    return any(name in vars(base) for base in owner.__mro__)


def _identity(subject: Subject) -> str:
    not_the_cpu(subject, "torch.cpu is torch's own module")
    module = device_module(subject)
    if not isinstance(module, ModuleType):
        raise Broken(f"torch.{subject.device} is a {type(module).__qualname__}, not a module")
    name = getattr(module, "__name__", None)
    if not isinstance(name, str) or getattr(torch, name.rsplit(".", 1)[-1], None) is not module:
        raise Broken(f"torch.{subject.device} calls itself {name!r}, and is not found again by that name")
    return f"a module, {name}"


def _surface(subject: Subject) -> str:
    not_the_cpu(subject, "torch.cpu is torch's own module")
    module = device_module(subject)
    missing = {asker: [name for name in names if not hasattr(module, name)] for asker, names in ASKED_FOR.items()}
    lacking = [f"{', '.join(names)} (asked by {asker})" for asker, names in missing.items() if names]
    if lacking:
        raise Broken(f"torch.{subject.device} lacks {listed(lacking)}")
    return f"all {sum(map(len, ASKED_FOR.values()))} names that torch and engines ask for"


def _accelerator(subject: Subject) -> str:
    needs_accelerator(subject)
    module, api = device_module(subject), torch.accelerator

    def current() -> None:
        found = api.current_accelerator()
        expect(None if found is None else found.type, subject.device, "torch.accelerator.current_accelerator()")

    def counts() -> None:
        expect(api.device_count(), int(module.device_count()), "torch.accelerator.device_count()")
        expect(api.current_device_index(), int(module.current_device()), "torch.accelerator.current_device_index()")

    def stream() -> None:
        expect(api.current_stream().device.type, subject.device, "the device of torch.accelerator.current_stream()")

    def memory() -> None:
        api.reset_peak_memory_stats()
        held = torch.ones(1 << 16, device=subject.device)
        if api.memory_allocated() < held.nbytes or api.max_memory_allocated() < held.nbytes:
            raise Broken(
                f"torch.accelerator.memory_allocated() is {api.memory_allocated()} with {held.nbytes} bytes held"
            )

    return run_all(
        {
            "current_accelerator": current,
            "device_count": counts,
            "current_stream": stream,
            "synchronize": api.synchronize,
            "memory_allocated": memory,
            "memory_stats": api.memory_stats,
            "empty_cache": api.empty_cache,
        }
    )


def _tensors(subject: Subject) -> str:
    needs_accelerator(subject)
    host = torch.arange(12.0).reshape(3, 4)

    def there_and_back() -> None:
        there = host.to(subject.device)
        expect(there.device.type, subject.device, "the device of x.to(device)")
        expect(there.cpu().tolist(), host.tolist(), "a tensor that went there and back")

    def arithmetic() -> None:
        there = host.to(subject.device)
        got = ((there + 1) * 2 - there.t().reshape(3, 4)).sum(0)
        expect(got.tolist(), ((host + 1) * 2 - host.t().reshape(3, 4)).sum(0).tolist(), "(x + 1) * 2 - x.t(), summed")

    def backward() -> None:
        leaf = host.to(subject.device).requires_grad_()
        (leaf * leaf).sum().backward()
        assert leaf.grad is not None
        expect(leaf.grad.device.type, subject.device, "the device of a gradient")
        expect(leaf.grad.tolist(), (2 * host).tolist(), "the gradient of x * x")

    return run_all({"there and back": there_and_back, "arithmetic": arithmetic, "backward": backward})


PROBES = (
    Probe(
        name="registration",
        stage="device",
        title="device is registered and there",
        run=_registration,
        why="torch finds an out-of-tree device by the name of PrivateUse1 and its module; without one of them every "
        "use fails (torch/utils/backend_registration.py)",
        todo="import the vendor's package first; `import torch_<device>` by itself shows what it stumbles over",
        installs=False,
    ),
    Probe(
        name="device-module",
        stage="device",
        title="device module knows its name",
        run=_identity,
        why="Dynamo looks a device module up as torch.<end of __name__> and guards on it as a module: 'has no "
        "attribute __name__', 'MODULE_MATCH is used' (out-of-tree catalogue A11; torch/_dynamo/variables/torch.py)",
        todo="fxpatch.install() puts a real module in its place; vendor: register a module whose __name__ is "
        "torch.<device>",
    ),
    Probe(
        name="device-module-surface",
        stage="device",
        title="device module is complete",
        run=_surface,
        why="torch and engines ask the device module by name; what is missing fails late, or silently does nothing "
        "(torch.manual_seed only warns: torch/random.py)",
        todo="vendor: add these functions to the device module, in torch.cuda's names and units",
        installs=False,
    ),
    Probe(
        name="tensors",
        stage="device",
        title="tensors compute",
        run=_tensors,
        why="a first look at copies, kernels and autograd before anything is compiled",
        todo="mend this first: run the three lines with the vendor's blocking launches and debug log turned on",
        installs=False,
    ),
    Probe(
        name="accelerator-api",
        stage="device",
        title="torch.accelerator answers",
        run=_accelerator,
        why="engines move from torch.cuda to torch.accelerator, whose functions ask C++ hooks: 'Allocator for musa is "
        "not a DeviceAllocator' (out-of-tree catalogue A8; vllm-ascend#14188)",
        todo="vendor: implement at::PrivateUse1HooksInterface and c10::DeviceAllocator; until then ask torch.<device>",
        installs=False,
    ),
)
