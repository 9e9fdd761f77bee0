"""Kernels in Python, and Dynamo. The problem: between the graphs of a compiled function Dynamo compiles each Python
frame that runs, also the frames of a kernel that C++ calls: at best that costs seconds, at worst it leaves a kernel
half traced. The rule: what C++ calls runs as C++ does, unseen.

This is `torch._dynamo.disable` for code objects; that one imports the compiler, which `simulate()` leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch._C._dynamo import eval_frame


@contextmanager
def unseen() -> Iterator[None]:
    """For what the device does that is no operator to anyone: no autocast, function mode, dispatch mode or transform
    sees into the block, and tensors of every mode may be written in it."""
    with (
        torch.inference_mode(),
        torch._C._DisableAutocast(),
        torch._C._DisableFuncTorch(),
        torch._C._DisableTorchDispatch(),
        torch._C.DisableTorchFunction(),
    ):
        yield


_Function = TypeVar("_Function", bound=Callable[..., Any])
_SKIP = eval_frame._FrameAction.SKIP


def untraced(function: _Function) -> _Function:
    """Tells Dynamo to trace neither into this function nor what it calls; returns the function."""
    vars(function)["_torchdynamo_disable"] = True
    strategy = eval_frame._FrameExecStrategy(_SKIP, _SKIP)
    eval_frame.set_code_exec_strategy(cast(FunctionType, function).__code__, strategy)
    return function
