"""Inductor. Device memory is host memory, so Inductor's C++ code generator for the CPU serves the device as it is;
only the code around the kernels differs: each is called through `graph.launch`, where a capture sees it.

Importing this module imports Inductor: `simulate()` leaves that to the first compilation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.device_interface import DeviceInterface
from torch._inductor import config
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpu_device_op_overrides import CpuDeviceOpOverrides
from torch._inductor.codegen.wrapper import PythonWrapperCodegen, SubgraphPythonWrapperCodegen
from torch._inductor.custom_graph_pass import CustomGraphModulePass
from torch._inductor.virtualized import V

from fxpatch.privateuse1 import private_type
from fxpatch.repair.inductor import register_inductor
from fxpatch.simulator import device_module, memory_stats, streams


class Interface(DeviceInterface):
    """What Dynamo and Inductor ask about the device."""

    device = device_module.device
    Stream = streams.Stream
    Event = streams.Event
    is_available = staticmethod(device_module.is_available)
    device_count = staticmethod(device_module.device_count)
    current_device = staticmethod(device_module.current_device)
    set_device = staticmethod(device_module.set_device)
    synchronize = staticmethod(device_module.synchronize)
    memory_allocated = staticmethod(memory_stats.memory_allocated)
    is_bf16_supported = staticmethod(device_module.is_bf16_supported)
    current_stream = staticmethod(streams.current_stream)
    set_stream = staticmethod(streams.set_stream)
    stream = staticmethod(streams.stream)

    class Worker:
        """The same questions from a compile worker."""

        current_device = staticmethod(device_module.current_device)
        set_device = staticmethod(device_module.set_device)
        get_device_properties = staticmethod(device_module.get_device_properties)

    @staticmethod
    def exchange_device(device: int) -> int:
        device_module.set_device(device)
        return 0

    maybe_exchange_device = exchange_device

    @staticmethod
    def get_raw_stream(device_idx: int) -> int:
        return 0

    @staticmethod
    def get_compute_capability(device: Any = None) -> str:
        return ""


_REINDEX = "_try_reindex_pointwise_for_reduction"  # of torch._inductor.scheduler.Scheduler; torch 2.13, 2.15


class Scheduling(CppScheduling):
    """The CPU's C++ generator. Shared code asks Inductor which generator is at work, by device name, and is told
    `config.cuda_backend` for every name Inductor does not know; so that is the truth while one of our kernels is made.
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        if hasattr(scheduler, _REINDEX):
            # torch tries it on whatever is not called "cpu", and the loops of the C++ generator have another form;
            # on this scheduler and not by its setting, which other threads would not see
            setattr(scheduler, _REINDEX, lambda *_: False)

    def codegen_node(self, node: Any) -> Any:
        with config.patch(cuda_backend="cpp"):
            return super().codegen_node(node)

    def codegen_template(self, *args: Any, **options: Any) -> Any:
        with config.patch(cuda_backend="cpp"):
            return super().codegen_template(*args, **options)


class _Launches:
    """Calls device kernels through `launch`. Where torch writes the call itself, it knows its own devices only."""

    def _generate_kernel_call_helper(self, kernel_name: str, call_args: list[str], **options: Any) -> None:
        device = options.get("device") or V.graph.get_current_device_or_throw()
        if device.type == private_type():
            self.writeline(f"_launch({', '.join((kernel_name, *call_args))})")  # type: ignore[attr-defined]
        else:
            super()._generate_kernel_call_helper(kernel_name, call_args, **options)  # type: ignore[misc]


class Wrapper(_Launches, PythonWrapperCodegen):
    """The Python around a graph's kernels."""

    @staticmethod
    def create(
        is_subgraph: bool,
        subgraph_name: str | None,
        parent_wrapper: PythonWrapperCodegen | None,
        partition_signatures: Any = None,
    ) -> PythonWrapperCodegen:
        if is_subgraph:
            assert subgraph_name is not None
            assert parent_wrapper is not None
            return SubgraphWrapper(subgraph_name, parent_wrapper, partition_signatures)
        return Wrapper()

    def write_header(self) -> None:
        super().write_header()
        self.header.writeline("from fxpatch.simulator.graph import launch as _launch")


class SubgraphWrapper(_Launches, SubgraphPythonWrapperCodegen):
    """The same for a graph inside a graph."""


class Version(CustomGraphModulePass):
    """Changes nothing; says which code wrote a compiled artifact. The cache key knows the graph, and the pass of the
    device, but not the class that writes the code around the kernels."""

    def __call__(self, module: torch.fx.GraphModule) -> None:
        """Nothing."""

    def uuid(self) -> str:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def register() -> None:
    """Registers the device with Inductor and Dynamo, through the door that vendors use."""
    register_inductor(
        private_type(),
        scheduling=Scheduling,
        wrapper=Wrapper,
        interface=Interface,
        op_overrides=CpuDeviceOpOverrides(),
        custom_pass=Version(),
    )
