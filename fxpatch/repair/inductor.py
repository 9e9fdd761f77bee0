"""Inductor on a device: the three registrations it needs, in one call; and a clear word where nobody made them.

A code generator cannot be guessed. So fxpatch registers nothing by itself; it says what is missing, and gives the
vendor `register_inductor`, which is right from torch 2.9 to 2.15. (The device module's hook is not: it is silently
ignored from 2.9 to 2.14 unless it also defines `WrapperFxCodegen`.)
"""

from __future__ import annotations

import sys
from typing import Any

from fxpatch.patching import Edits, NotNeeded, Patch, Refused, Target

_COMMON = "torch._inductor.codegen.common"


def register_inductor(
    device: str,
    *,
    scheduling: type,
    wrapper: type,
    interface: type,
    op_overrides: object,
    custom_pass: object | None = None,
) -> None:
    """Registers a code generator for `device` with Inductor and Dynamo. Imports both.

    Args:
        device: device type, e.g. `"musa"`.
        scheduling: a subclass of `torch._inductor.scheduler.BaseScheduling`: writes kernels.
        wrapper: a subclass of `torch._inductor.codegen.wrapper.PythonWrapperCodegen`: writes the code around them.
        interface: a subclass of `torch._dynamo.device_interface.DeviceInterface`.
        op_overrides: an instance of `torch._inductor.codegen.common.DeviceOpOverrides`.
        custom_pass: an instance of `torch._inductor.custom_graph_pass.CustomGraphModulePass`, run on every graph with
            this device in it. Its `uuid()` is in the cache key: the place for the version of your code generator.

    Source: torch/_inductor/codegen/common.py and torch/_dynamo/device_interface.py, torch 2.11 to 2.15.
    """
    from torch._dynamo.device_interface import register_interface_for_device
    from torch._inductor.codegen.common import register_backend_for_device, register_device_op_overrides

    register_backend_for_device(
        device,
        device_scheduling=scheduling,
        device_wrapper_codegen=wrapper,
        device_custom_pass=custom_pass,  # type: ignore[arg-type]
    )
    register_interface_for_device(device, interface)
    register_device_op_overrides(device, op_overrides)  # type: ignore[arg-type]


def _probe(device: str) -> dict[str, bool]:
    """Which of the three registrations exist, without making torch initialize its own."""
    interfaces: Any = getattr(sys.modules.get("torch._dynamo.device_interface"), "device_interfaces", {})
    common: Any = sys.modules[_COMMON]
    return {
        "register_backend_for_device": device in common.device_codegens or device in _INITIALIZED_LATER,
        "register_interface_for_device": device in interfaces or device in _INITIALIZED_LATER,
        "register_device_op_overrides": device in common.device_op_overrides_dict or device in _INITIALIZED_LATER,
    }


_INITIALIZED_LATER = ("cpu", "cuda", "xpu", "mps", "mtia")  # torch registers these at the first compilation


def _decide(registered: dict[str, bool]) -> NotNeeded | Refused:
    missing = [name for name, there in registered.items() if not there]
    if not missing:
        return NotNeeded("the device has registered itself with Inductor")
    return Refused(
        f"nobody has called {', '.join(missing)} for this device so far, and a code generator cannot be guessed: "
        'compile with backend="aot_eager", or let the vendor call fxpatch.register_inductor()'
    )


def _apply(_device: str, _facts: dict[str, bool], _edits: Edits) -> str:
    raise AssertionError("this record never asks to be applied")


PATCH = Patch[dict[str, bool]](
    name="inductor-backend",
    why="torch.compile with Inductor fails on an unregistered device: KeyError, AssertionError or NotImplementedError "
    "from deep inside the lowering",
    upstream="https://github.com/pytorch/pytorch/issues/189138",
    until="torch 2.15: torch.<device>._inductor_backend_init, where the vendor implements it",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(Target(_COMMON, "device_codegens"), Target(_COMMON, "device_op_overrides_dict")),
    probe=_probe,
    decide=_decide,
    apply=_apply,
    waits_for=("torch._inductor.compile_fx", _COMMON),  # vendors register when Inductor is used, not before
)
