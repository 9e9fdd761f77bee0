"""What `optimize` puts in place of other libraries' modules: the same computation, with a forward per device.

The rule: natively the very operations of the original, in its order, on its own submodules, so nothing changes where
the kernel does not run. The parameters stay what they are, in number, name and identity: gate and up stay two products,
and a fused activation costs their concatenation. Whether that pays is for `fxpatch.native` to measure: a
`PiecewiseRunner` keeps the native forward where it does not (unless `native="any_speed"`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fxpatch.layers.activation import GELU_KERNELS, GeluAndMul, SiluAndMul, geglu, halves
from fxpatch.layers.platform_op import PlatformOp

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gate(kind: str) -> SiluAndMul | GeluAndMul:
    """One for all modules, which are alike: of another object, a promotion could not know that it is."""
    return _activation(kind, hasattr(nn, "SwishGLU"))


@functools.cache
def _activation(kind: str, _vendor: bool) -> SiluAndMul | GeluAndMul:
    return SiluAndMul() if kind == "silu" else GeluAndMul("tanh" if kind == "gelu_tanh" else "none")


HOOKED = "its activation has hooks"


def hooked(act: nn.Module) -> bool:
    """Whether somebody takes part in a module's calls: a fused kernel would pass them by."""
    return bool(act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act))


class GatedMLP(PlatformOp):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`, as transformers' Llama, Qwen and Gemma have it.

    Args:
        activation: what `act_fn` computes, one of `ACTIVATIONS`. The submodules are those of the original.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.__dict__["_gate"] = gate(activation)  # no submodule: the names are the original's

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y

    def kernels(self, device: str, *inputs: Any) -> tuple[str, ...]:
        kernels: tuple[str, ...] = self._gate.kernels(device)
        return kernels

    def unfit(self, device: str, x: torch.Tensor, *inputs: Any) -> str | None:
        act = self.act_fn
        if act is not self.__dict__.get("_act", act):
            return "its activation was replaced"
        if hooked(act):
            return HOOKED
        reason: str | None = self._gate.unfit(device, x)
        return reason

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return self._fused(x, "forward_musa")

    def forward_npu(self, x: torch.Tensor) -> torch.Tensor:
        return self._fused(x, "forward_npu")

    def _fused(self, x: torch.Tensor, forward: str) -> torch.Tensor:
        both = torch.cat([self.gate_proj(x), self.up_proj(x)], -1)
        gate = self._gate.forward if self._gate.trains(both) else getattr(self._gate, forward)  # of a hook, say
        y: torch.Tensor = self.down_proj(gate(both))
        return y

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class ProjectedGEGLU(PlatformOp):
    """`a * gelu(b)` of the halves of `proj(x)`, as diffusers' `GEGLU`; its deprecated `scale` is not taken.

    GELU with the error function, on npu, too. (diffusers itself calls `npu_geglu(..., approximate=1)` there, which is
    the tanh approximation: a model that was trained with the other computes something else on npu.)
    """

    proj: nn.Module

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        return self._gated(self.proj(x))

    def kernels(self, device: str, *inputs: Any) -> tuple[str, ...]:
        return GELU_KERNELS.get(device, ())

    def forward_npu(self, x: torch.Tensor) -> torch.Tensor:
        self.kernel("npu")
        both = self.proj(x)
        if self.trains(both):  # what a hook has brought in, say
            return self._gated(both)
        halves(both, "ProjectedGEGLU")
        return geglu(both, "none", False)

    @staticmethod
    def _gated(both: torch.Tensor) -> torch.Tensor:
        hidden, gate = both.chunk(2, dim=-1)
        return hidden * nn.functional.gelu(gate)
