"""Has the device a code generator, and do its kernels compute what eager computes?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, NotApplicable, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect_close, run_all
from fxpatch.doctor.probes.presence import device_module, needs_device, not_the_cpu
from fxpatch.patching import Target

# Read only. Seen in torch 2.11, 2.13, 2.15.
_INIT = Target("torch._inductor.codegen.common", "init_backend_registration", "")
_SCHEDULING = Target("torch._inductor.codegen.common", "get_scheduling_for_device", "device")
_WRAPPER = Target("torch._inductor.codegen.common", "get_wrapper_codegen_for_device", "device, ...")
_OVERRIDES = Target("torch._inductor.codegen.common", "get_device_op_overrides", "device")
_INTERFACE = Target("torch._dynamo.device_interface", "get_interface_for_device", "device")
_GPU_TYPES = Target("torch._inductor.utils", "GPU_TYPES")
_MANAGER = Target("torch._inductor.cudagraph_trees", "get_manager", "device_index, create_if_none_exists")
_HOOKS = ("Scheduling", "PythonWrapperCodegen", "CppWrapperCodegen", "WrapperFxCodegen")


def _registration(subject: Subject) -> str:
    importlib.import_module("torch._inductor.compile_fx")  # vendors register when Inductor is used, not before
    _INIT.resolve()()
    device = subject.device
    asked: dict[str, Callable[[], object]] = {
        "register_backend_for_device (scheduling)": lambda: _SCHEDULING.resolve()(device),
        "register_backend_for_device (wrapper)": lambda: _WRAPPER.resolve()(device),
        "register_interface_for_device": lambda: _INTERFACE.resolve()(device),
        "register_device_op_overrides": lambda: _OVERRIDES.resolve()(device),
    }
    missing = [name for name, ask in asked.items() if not _there(ask)]
    gpu = device in _GPU_TYPES.resolve()
    if missing:
        hooks = [name for name in _HOOKS if hasattr(device_module(subject), name)]
        silent = ""
        if hooks and len(hooks) < len(_HOOKS):
            lacking = [name for name in _HOOKS if name not in hooks]
            silent = f"; the device module has {', '.join(hooks)} and not {', '.join(lacking)}: ignored silently"
        raise Broken(f"nobody has called {', '.join(missing)}{silent}")
    return "code generator, wrapper, interface and operator overrides" + (
        "; in GPU_TYPES, so Triton has to be there" if gpu else ""
    )


def _there(ask: Callable[[], object]) -> bool:
    try:
        return ask() is not None
    except (KeyError, NotImplementedError):  # how the last two say that there is none
        return False


def _pointwise(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).relu().where(x > 0, -x)


def _reduction(x: torch.Tensor) -> Any:
    return x.softmax(-1).sum(0), x.amax(1)


def _matmul(x: torch.Tensor) -> torch.Tensor:
    return x @ x.t() + 1


def _indexing(x: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(3, device=x.device) * 2
    return x[rows, :5] * 2


KERNELS: dict[str, Callable[[torch.Tensor], Any]] = {
    "pointwise": _pointwise,
    "reduction": _reduction,
    "matmul": _matmul,
    "indexing": _indexing,
}


def _settings() -> Any:
    """What is asked is compiled now. Without a precompiled header: it takes longer than it saves for a few kernels."""
    config: Any = importlib.import_module("torch._inductor.config")
    return config.patch(fx_graph_cache=False, cpp_cache_precompile_headers=False)


def _kernels(subject: Subject) -> str:
    needs_device(subject)
    host = torch.linspace(-2, 2, 8 * 16).reshape(8, 16)

    def check(function: Callable[[torch.Tensor], Any]) -> None:
        torch.compiler.reset()
        x = host.to(subject.device)
        got = torch.compile(function, backend="inductor", fullgraph=True)(x)
        expect_close(got, function(x), "the result, against eager,")
        expect_close(got, function(host), "the result, against the CPU,")

    with _settings():
        return run_all({name: partial(check, f) for name, f in KERNELS.items()})


def _reduce_overhead(subject: Subject) -> str:
    not_the_cpu(subject, "there is no launch overhead to reduce on the CPU")
    needs_device(subject)
    importlib.import_module("torch._inductor.compile_fx")
    if not _there(lambda: _SCHEDULING.resolve()(subject.device)):
        raise NotApplicable("Inductor has no code generator for the device: see the line `inductor-registration`")
    x = torch.linspace(-2, 2, 8 * 16).reshape(8, 16).to(subject.device)
    with _settings():
        compiled = torch.compile(_pointwise, mode="reduce-overhead")
        for _ in range(3):
            expect_close(compiled(x), _pointwise(x), "the result of mode='reduce-overhead', against eager,")
    if _MANAGER.resolve()(int(device_module(subject).current_device()), False) is None:
        raise NotApplicable(
            f"torch captures CUDA graphs only: mode='reduce-overhead' captures nothing on {subject.device}, and tells "
            "only a log; fxpatch.PiecewiseRunner captures"
        )
    return "captures, and gives what eager gives"


def _index(subject: Subject) -> str:
    not_the_cpu(subject, "the CPU has no index")
    importlib.import_module("torch._inductor.compile_fx")
    _INIT.resolve()()
    wrapper = _WRAPPER.resolve()(subject.device)
    if wrapper is None:
        raise NotApplicable("Inductor has no code generator for the device: see the line `inductor-registration`")
    line = _allocation(wrapper, torch.device(subject.device, 1))
    guard = f"on one of {_count(subject)} devices"
    if f"{subject.device}:1" in line or "index=1" in line or f"'{subject.device}', 1" in line:
        return f"generated code allocates with the index: {line}"
    if _needs_guard(subject.device):
        return "generated code allocates under a device guard"
    if _count(subject) < 2:
        return "generated code allocates on the current device, and there is one"
    raise Differs(f"generated code for device 1 allocates on the current device, {guard}: {line}")


def _allocation(wrapper: Any, device: torch.device) -> str:
    """The line that a wrapper writes for a buffer; torch 2.11 to 2.15."""
    lowered: Any = importlib.import_module("torch._inductor.graph").GraphLowering
    virtualized: Any = importlib.import_module("torch._inductor.virtualized")
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    with virtualized.V.set_graph_handler(lowered(gm)):
        made = wrapper.create(False, None, None)
        return str(made.make_allocation("buf0", device, torch.float32, (4,), (1,)))


def _needs_guard(device: str) -> bool:
    """Whether Inductor enters a device guard around the device's code; torch 2.11 to 2.15."""
    return bool(importlib.import_module("torch._inductor.utils").device_need_guard(device))


def _count(subject: Subject) -> int:
    return int(device_module(subject).device_count())


PROBES = (
    Probe(
        name="inductor-registration",
        stage="inductor",
        title="Inductor knows the device",
        run=_registration,
        why="Inductor needs a backend, a device interface and operator overrides; without one of them it fails deep "
        "inside: KeyError: 'musa', AssertionError, No interface for device musa (out-of-tree catalogue A5)",
        todo="vendor: fxpatch.register_inductor(); until then compile with backend='aot_eager', or use PiecewiseRunner",
        limit_s=40.0,
    ),
    Probe(
        name="inductor-kernels",
        stage="inductor",
        title="Inductor's kernels are right",
        run=_kernels,
        why="one kernel of each kind, against eager and the CPU: a code generator taken over from another device fails "
        "on some kinds only (out-of-tree catalogue A5c)",
        todo="compile that function alone with TORCH_COMPILE_DEBUG=1, and compare the generated kernel",
        limit_s=60.0,
    ),
    Probe(
        name="inductor-index",
        stage="inductor",
        title="Inductor keeps the index",
        run=_index,
        why="the default wrapper allocates device='musa' without the index: with two devices the buffer goes to the "
        "current one (out-of-tree catalogue S7)",
        todo="vendor: override make_allocation in the wrapper, or make the device guard real (GPU_TYPES, "
        "DeviceOpOverrides.device_guard)",
        limit_s=40.0,
    ),
    Probe(
        name="reduce-overhead",
        stage="inductor",
        title="mode='reduce-overhead'",
        run=_reduce_overhead,
        why="cudagraph trees capture CUDA only; elsewhere mode='reduce-overhead' compiles and captures nothing, "
        "silently (out-of-tree catalogue S10; torch/_inductor/cudagraph_utils.py)",
        todo="use fxpatch.PiecewiseRunner, or torch.compile(backend='piecewise')",
        limit_s=60.0,
    ),
)
