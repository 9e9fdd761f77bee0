"""What `torch.<name>` answers. torch asks a device module for seeding, sharing, loading, autocast and checkpointing,
and users ask it what they ask `torch.cuda`.

It is a real module with a `__name__`, because Dynamo guards on it, and its functions are plain Python, so that Dynamo
traces them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator import capture, fork, graphed_callables, memory_stats, rng, streams
from fxpatch.simulator import graph as graphs
from fxpatch.simulator.memory import ledger
from fxpatch.simulator.storage import check_index, on_device, the_device


@dataclass(frozen=True)
class DeviceProperties:
    """What there is to know about the device."""

    name: str
    total_memory: int
    multi_processor_count: int


class device:
    """`with torch.musa.device(0): ...`; there is one device, so this only checks the index."""

    def __init__(self, device: Any) -> None:
        self.idx = _index(device)

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class device_of(device):
    """The device of a tensor, if it is on this one."""

    def __init__(self, obj: torch.Tensor) -> None:
        super().__init__(obj.device if on_device(obj) else None)


def build(name: str) -> ModuleType:
    """The module to be registered as `torch.<name>`."""
    module = ModuleType(f"torch.{name}", f"The simulated accelerator {name!r}, in the manner of torch.cuda.")
    for member in _PUBLIC:
        setattr(module, member.__name__, member)
    graph_class = type(f"{name.upper()}Graph", (graphs.Graph,), {"__module__": module.__name__})
    vars(module).update(
        {
            graph_class.__name__: graph_class,
            "graph": type("graph", (graphs.graph,), {"__module__": module.__name__}),
            "default_generators": (rng.default_generator,),
            "_is_in_bad_fork": fork.bad,
            "_initialized": True,  # torch.utils.checkpoint saves the random state of devices that say so
        }
    )
    return module


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return fork.used() and not fork.bad()


def init() -> None:
    """Uses the device. Nobody has to call this: whatever needs the device does as much."""
    fork.initialize()


def device_count() -> int:
    return 1


def current_device() -> int:
    return _index(None)


def set_device(device: Any) -> None:
    _index(device)


def synchronize(device: Any = None) -> None:
    """Every launch has finished already; in a capture, waiting is an error."""
    _index(device)
    if capture.active() is not None:  # on whatever stream
        capture.spoil(capture.UNSUPPORTED, "synchronizing the device")


def get_device_properties(device: Any = None) -> DeviceProperties:
    _index(device)
    return DeviceProperties(f"Simulated {private_type()}", ledger.total, torch.get_num_threads())


def get_device_name(device: Any = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    _index(device)
    return (1, 0)


def manual_seed(seed: int) -> None:
    rng.default_generator.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def seed() -> None:
    rng.default_generator.seed()


def seed_all() -> None:
    seed()


def initial_seed() -> int:
    return rng.default_generator.initial_seed()


def get_rng_state(device: Any = None) -> torch.Tensor:
    _index(device)
    fork.initialize()
    return rng.default_generator.get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    """The states of all devices: one."""
    return [get_rng_state()]


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    _index(device)
    rng.default_generator.set_state(new_state)


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def _index(device: Any) -> int:
    fork.check()
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, int):
        device = torch.device(private_type(), max(device, 0))  # a negative index means the current device
    if device is not None:
        if device.type != private_type():
            raise ValueError(f"expected a {private_type()} device, but got {device}")
        check_index(device)
    return the_device().index


_PUBLIC = (
    device,
    device_of,
    is_available,
    is_initialized,
    init,
    device_count,
    current_device,
    set_device,
    synchronize,
    get_device_properties,
    get_device_name,
    get_device_capability,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    initial_seed,
    get_rng_state,
    get_rng_state_all,
    set_rng_state,
    set_rng_state_all,
    is_bf16_supported,
    get_amp_supported_dtype,
    *memory_stats.PUBLIC,
    graphs.graph_pool_handle,
    graphs.is_current_stream_capturing,
    graphed_callables.make_graphed_callables,
    streams.Stream,
    streams.Event,
    streams.current_stream,
    streams.default_stream,
    streams.set_stream,
    streams.stream,
)
