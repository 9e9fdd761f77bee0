"""What can be wrong with a device, one function for each kind: it makes this process's simulated `musa` so.

Planted where a vendor would have made the mistake: in a kernel, in the device module, in a registration, in the class
in the place of `torch.device`. Nothing of it can be taken back: each runs in a process that is thrown away.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import re
import time
import types
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "musa"
_libraries: list[torch.library.Library] = []


def module() -> Any:
    return getattr(torch, DEVICE)


def replace(name: str, value: Any) -> Callable[[], None]:
    """The device module's attribute of that dotted name is another one."""

    def plant() -> None:
        owner = module()
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return plant


def remove(name: str) -> Callable[[], None]:
    return lambda: delattr(module(), name)


def kernel(operator: str, wrong: Callable[..., Any]) -> Callable[[], None]:
    """The device's kernel of an ATen operator is another one. `wrong` gets and returns CPU tensors."""

    def on_the_device(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), (args, kwargs))
        return wrong(*args, **kwargs).to(DEVICE)

    return raw_kernel(operator, on_the_device)


def raw_kernel(operator: str, wrong: Callable[..., Any]) -> Callable[[], None]:
    def plant() -> None:
        library = torch.library.Library("aten", "IMPL")
        library.impl(operator, wrong, "PrivateUse1", allow_override=True)
        _libraries.append(library)

    return plant


def namespace_for_a_module() -> None:
    """A device module that is no module, and has no name: one that loads lazily, say."""
    members = {name: value for name, value in vars(torch.musa).items() if name != "__name__"}
    torch.musa = types.SimpleNamespace(**members)  # type: ignore[attr-defined]


def raises(text: str) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise RuntimeError(text)

    return function


# -- FX ------------------------------------------------------------------------------------------------------------


def regex_over_generated_code() -> None:
    """What SGLang did: srt/utils, `_patch_fx_codegen`; it rewrites strings as well."""
    original = torch.fx.graph.CodeGen._gen_python_code

    def _gen_python_code(self: Any, *args: Any, **kwargs: Any) -> Any:
        code = original(self, *args, **kwargs)
        rewritten = re.sub(r"\bdevice\(type='(\w+)', index=(\d+)\)", r"torch.device('\1:\2')", code.src)
        return dataclasses.replace(code, src=rewritten, globals={**code.globals, "torch": torch})

    _gen_python_code.__globals__["__name__"] = "sglang_like"
    torch.fx.graph.CodeGen._gen_python_code = _gen_python_code  # type: ignore[method-assign]


# -- compilers -----------------------------------------------------------------------------------------------------


def kernels_off_by_one() -> None:
    """Generated code calls kernels through `launch`."""
    from fxpatch.simulator import graph

    def launch(function: Callable[..., object], *args: Any) -> None:
        function(*args)
        args[-1].add_(1) if isinstance(args[-1], torch.Tensor) else None
        for each in args[-2:-1]:
            each.add_(1) if isinstance(each, torch.Tensor) else None

    graph.launch = launch


# -- numbers -------------------------------------------------------------------------------------------------------


def narrowing_copies() -> None:
    """int64 goes through float32 on its way to the device."""
    from fxpatch.simulator import kernels

    def _to_copy(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if tensor.dtype is torch.int64 and tensor.device.type == "cpu":
            tensor = tensor.to(torch.float32)
            options["dtype"] = options.get("dtype") or torch.int64
        return kernels._to_copy(tensor, **options)

    raw_kernel("_to_copy", _to_copy)()


def casts_in_another_dtype() -> None:
    """A cast to float64 that gives float32: what a device without float64 may do."""
    from fxpatch.simulator import kernels

    def _to_copy(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.float64:
            options["dtype"] = torch.float32
        return kernels._to_copy(tensor, **options)

    raw_kernel("_to_copy", _to_copy)()


def truncating_casts() -> None:
    """A cast to bfloat16 that cuts the low bits off instead of rounding."""
    from fxpatch.simulator import kernels

    def _to_copy(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.bfloat16 and tensor.dtype is torch.float32:
            host = tensor.cpu().contiguous().view(torch.int32).bitwise_and(-65536).view(torch.float32)
            tensor = host if options.get("device", DEVICE) == "cpu" else host.to(DEVICE)
        return kernels._to_copy(tensor, **options)

    raw_kernel("_to_copy", _to_copy)()


def flattened_zeros() -> None:
    """Copies that lose the sign of zero."""
    from fxpatch.simulator import kernels

    def _to_copy(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.dtype is torch.float32:
            tensor = torch.where(tensor == 0, 0.0, tensor)
        return kernels._to_copy(tensor, **options)

    raw_kernel("_to_copy", _to_copy)()


def undone_by_nobody(x: torch.Tensor, p: float = 0.5, **_: Any) -> torch.Tensor:
    """A random operator that falls back to the CPU, and to the CPU's generator."""
    return x.copy_(torch.bernoulli(torch.full(x.shape, p)))


# -- streams and graphs --------------------------------------------------------------------------------------------


def unordered_streams() -> None:
    """Nobody waits: what a side stream computes is not there yet when it is read."""
    from fxpatch.simulator import capture

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        on_the_side = capture.current_stream() != capture.DEFAULT_STREAM
        result = torch.mm(a.cpu(), b.cpu())
        return (torch.zeros_like(result) if on_the_side else result).to(DEVICE)

    raw_kernel("mm", mm)()


class RunsAtOnce:
    """A graph whose capture executes, and whose replay does nothing."""

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "") -> None: ...
    def capture_end(self) -> None: ...
    def replay(self) -> None: ...
    def reset(self) -> None: ...
    def pool(self) -> Any:
        return (0, 1)


def graphs_without_a_pool() -> None:
    class Graph(module().MUSAGraph):  # type: ignore[misc]
        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            super().capture_begin(None, capture_error_mode)

    module().MUSAGraph = Graph


def graphs_with_old_inputs() -> None:
    """A graph that replays what it captured with the inputs of the capture: it copies its result."""

    class Graph(module().MUSAGraph):  # type: ignore[misc]
        def replay(self) -> None:
            if not getattr(self, "_ran", False):
                super().replay()
            self._ran = True

    module().MUSAGraph = Graph


def graphs_that_repeat_themselves() -> None:
    class Graph(module().MUSAGraph):  # type: ignore[misc]
        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            self._state = module().get_rng_state()
            super().capture_begin(*args, **kwargs)

        def replay(self) -> None:
            module().set_rng_state(self._state)
            super().replay()

    module().MUSAGraph = Graph


# -- artifacts, processes, versions --------------------------------------------------------------------------------


def untagged() -> None:
    torch.compiler.config.cache_key_tag = ""


def children_that_hang() -> None:
    from fxpatch.doctor.probes import processes

    processes._LIMIT_S = 1.0
    os.register_at_fork(after_in_child=lambda: time.sleep(3))


def children_that_compute_garbage() -> None:
    from fxpatch.simulator import fork

    fork._exchange = lambda _: None  # nothing refuses

    def in_child() -> None:
        kernel("add.Tensor", lambda a, b, **_: torch.full_like(a, 7.0))()

    fork.check = lambda: None
    os.register_at_fork(after_in_child=in_child)


def versions(**found: str) -> Callable[[], None]:
    def plant() -> None:
        original = importlib.metadata.version

        def version(name: str) -> str:
            return found[name] if name in found else original(name)

        importlib.metadata.version = version
        importlib.metadata.requires = lambda name: ["torch==2.7.1"] if name == "torchada" else None

    return plant


def entry_points(*found: str) -> Callable[[], None]:
    def plant() -> None:
        made = [importlib.metadata.EntryPoint(each.partition(".")[0], each, "torch.backends") for each in found]
        importlib.metadata.entry_points = lambda group=None: made

    return plant


def another_signature() -> None:
    """A vendor's replacement of a private torch function that takes something else."""
    importlib.import_module("torch._prims.rng_prims").get_device = lambda tensors: "musa"


def forgetful_model() -> None:
    import patient_models

    patient_models.forget_a_write()


def copies_to_the_same_place() -> None:
    original = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "copy": True})  # type: ignore
