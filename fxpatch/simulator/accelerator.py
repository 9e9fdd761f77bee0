"""`torch.accelerator`. The problem: its functions ask C++ hooks, of which pure Python can implement four. Where a hook
is missing they raise about the backend's code, take a device index that does not exist, or end the process. The rule:
each answers as `torch.<name>` does.

They reach C++ through `torch._C._accelerator_*`, by name at each call, so these names are where the answers go. In C++
too PrivateUse1 comes before every other accelerator: from `simulate()` on, the accelerator is the simulated device.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fxpatch.privateuse1 import private_type
from fxpatch.simulator import device_module, fork, memory_stats, streams
from fxpatch.simulator.storage import check_index
from fxpatch.simulator.untraced import untraced


def guard() -> None:
    """Puts the answers in place, for the rest of the process."""
    for name, answer in _answers().items():
        asked = getattr(torch._C, name, None)
        if asked is None:  # another torch has fewer: it never asks
            continue
        if _takes(asked) != len(inspect.signature(answer).parameters):
            warnings.warn(
                f"torch {torch.__version__} calls torch._C.{name} in a way that the simulated device does not know, so "
                f"it stays as it is, and torch.accelerator may raise torch's own errors: {asked.__doc__}",
                stacklevel=2,
            )
            continue
        # Dynamo and generated code know a function by its names, whichever object is there
        answer.__module__, answer.__name__, answer.__qualname__ = "torch._C", name, name
        setattr(torch._C, name, untraced(answer))
    _tell_dynamo()


def _answers() -> dict[str, Callable[..., Any]]:
    """What is asked -> who answers; torch 2.11, 2.13."""

    def get_stream(index: int) -> torch.Stream:
        _check(index)
        return streams.current_stream()

    def set_current_stream(new: torch.Stream) -> None:
        _check(new.device_index)
        streams.set_stream(new)

    return {
        "_accelerator_setDeviceIndex": lambda index: _check(index),
        "_accelerator_exchangeDevice": lambda index: _check(index),
        "_accelerator_maybeExchangeDevice": lambda index: _check(index),
        "_accelerator_getStream": get_stream,
        "_accelerator_setStream": set_current_stream,
        "_accelerator_synchronizeDevice": lambda index: device_module.synchronize(index),
        "_accelerator_getDeviceCapability": _capability,
        "_accelerator_isAllocatorInitialized": lambda: True,
        "_accelerator_emptyCache": lambda: memory_stats.empty_cache(),
        "_accelerator_emptyHostCache": lambda: None,
        "_accelerator_getDeviceStats": lambda index: memory_stats.memory_stats(index),
        "_accelerator_resetAccumulatedStats": lambda index: memory_stats.reset_accumulated_memory_stats(index),
        "_accelerator_resetPeakStats": lambda index: memory_stats.reset_peak_memory_stats(index),
        "_accelerator_getMemoryInfo": lambda index: memory_stats.mem_get_info(index),
        "_accelerator_hooks_device_count": lambda: device_module.device_count(),
        "_accelerator_hooks_get_current_device": lambda: device_module.current_device(),
        "_accelerator_hooks_set_current_device": lambda index: _check(index),
        "_accelerator_hooks_exchange_device": lambda index: _check(index),
        "_accelerator_hooks_maybe_exchange_device": lambda index: _check(index),
    }


def _check(index: int) -> int:
    """Refuses what is not the device's index; a negative one stands for the current device. Returns the current one."""
    fork.check()
    if index > 0:
        check_index(torch.device(private_type(), index))
    return 0


def _capability(index: int) -> dict[str, set[torch.dtype]]:
    _check(index)
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that complex32 is experimental
        return {"supported_dtypes": {dtype for dtype in dtypes if _can_be_converted(dtype)}}


def _can_be_converted(dtype: torch.dtype) -> bool:
    """Whether there are tensors of this dtype on the device, and a kernel that converts others to them."""
    try:
        torch.zeros(1, device=private_type()).to(dtype)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _takes(function: Callable[..., Any]) -> int:
    """How many arguments a function of C++ takes: its docstring has its signature."""
    return len(re.findall(r"\barg\d+:", function.__doc__ or ""))


def _tell_dynamo() -> None:
    """Dynamo remembers two of the functions from when it was imported; torch 2.13."""
    remembered = getattr(sys.modules.get("torch._dynamo.variables.ctx_manager"), "AcceleratorDeviceIndexVariable", None)
    if remembered is not None:
        remembered._exchange_fn = staticmethod(torch._C._accelerator_exchangeDevice)
        remembered._maybe_exchange_fn = staticmethod(torch._C._accelerator_maybeExchangeDevice)
