"""A worker whose device is wrong on purpose: it computes, writes, shares, crashes and hangs as no device may."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

import fxpatch
from opinfo import worker


def _other_strides(x: torch.Tensor) -> torch.Tensor:
    result = x.cpu().tan()
    return (result.mT.contiguous().mT if x.dim() > 1 else result).to(x.device)


def _raises(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such kernel")


KERNELS: dict[str, Any] = {
    "sin": lambda x: (x.cpu().sin() + 1e-2).to(x.device),  # another value
    "cos": lambda x: x.cpu().cos().double().to(x.device),  # another dtype
    "tan": _other_strides,
    "ceil": _raises,
    "neg_": lambda x: x,  # writes nothing
    "exp.out": lambda x, *, out: out,
    "transpose.int": lambda x, a, b: x.cpu().transpose(a, b).to(x.device),  # a copy, not a view
    "sigmoid_backward": lambda grad, y: (grad.cpu() * y.cpu()).to(y.device),  # another gradient
    "atan": lambda x: os.abort(),
    "asin": lambda x: time.sleep(600),
}


def main(device: str) -> None:
    """As the worker's, on a device that has these kernels instead."""
    fxpatch.simulate(device)
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "PrivateUse1", allow_override=True)
    worker.main(device)


if __name__ == "__main__":
    main(sys.argv[1])
