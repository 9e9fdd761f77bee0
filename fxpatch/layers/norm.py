"""RMS norms with a kernel per device, and the layer norm in float32 that converts its parameters once.

The rules: results are contiguous whatever the input's strides, natively, too, so that both forwards of an operator are
interchangeable in a graph (torch_npu's own fake of `npu_rms_norm` keeps permuted strides, and its kernel does not: the
input is made contiguous before, where the two agree); a model's own order of rounding is kept natively, and a kernel
that rounds once where the model rounds twice is within that rounding.

Sources: seeds 001 and 004; transformers `LlamaRMSNorm`, `Gemma2RMSNorm`; diffusers `FP32LayerNorm`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from fxpatch.errors import LayerError
from fxpatch.layers.activation import call
from fxpatch.layers.fp32_parameters import Fp32Parameters
from fxpatch.layers.platform_op import PlatformOp

_RMS, _ADD, _GEMMA = "npu::npu_rms_norm", "npu::npu_add_rms_norm", "npu::npu_gemma_rms_norm"
_MUSA = "aten::_fused_rmsnorm_forward"  # torch_musa up to torch 2.7
_FUSED = "aten::_fused_rms_norm"  # torch's own name for it since 2.9, which newer ones of torch_musa implement


class RMSNorm(PlatformOp):
    """`x * rsqrt(mean(x ** 2) + eps) * weight` over the last dimension, computed in float32; contiguous.

    Called with a residual, it returns the norm of `x + residual`, and that sum; the sum is rounded to the dtype of `x`
    before it is normalised, as a model that adds and then normalises has it.

    On npu `npu_rms_norm`, `npu_add_rms_norm`, `npu_gemma_rms_norm`; on musa `aten::_fused_rmsnorm_forward`, or
    `aten::_fused_rms_norm` of torch_musa for torch after 2.7; on cuda torch's own fused `rms_norm`. Kernels that add
    the residual in the caller's memory (vLLM's and sgl_kernel's `fused_add_rms_norm`) are not used: the native forward
    leaves its arguments alone.

    Args:
        size: of the last dimension.
        eps: added to the mean square; not negative.
        cast_first: rounds to the dtype of `x` before the weight is multiplied (Llama), not after. Then the result has
            the dtype that the product of the two has.
        one_plus: multiplies with `1 + weight` (Gemma).
        elementwise_affine: has a weight.
        device, dtype: of the weight.

    Raises:
        LayerError: settings, sizes or a residual that do not fit.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        cast_first: bool = False,
        one_plus: bool = False,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or eps < 0 or (one_plus and (cast_first or not elementwise_affine)):
            raise LayerError(
                "There is no such RMSNorm.",
                seen=f"{size=}, {eps=}, {cast_first=}, {one_plus=}, {elementwise_affine=}",
                expected="a size of at least 1, eps not negative, one_plus with a weight and without cast_first",
                hint="Llama is cast_first=True, Gemma one_plus=True",
            )
        self.size, self.eps, self.cast_first, self.one_plus = size, eps, cast_first, one_plus
        make = torch.zeros if one_plus else torch.ones
        weight = nn.Parameter(make(size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def forward_native(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        self._check(x, residual)
        if residual is not None:
            x = (x + residual).contiguous()
        y = self._normal(x).contiguous()
        return y if residual is None else (y, x)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return wide.to(x.dtype)
        if self.cast_first:
            return self.weight * wide.to(x.dtype)
        if self.one_plus:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return (wide * self.weight.float()).to(x.dtype)

    def kernels(self, device: str, *inputs: Any) -> tuple[str, ...]:
        residual = bool(inputs) and inputs[0] is not None
        if device == "npu":
            return (_GEMMA,) if self.one_plus else (_ADD, _RMS) if residual else (_RMS,)
        if device == "musa":
            return (_MUSA, _FUSED)
        return (_FUSED,) if device == "cuda" else ()

    def unfit(self, device: str, x: torch.Tensor, *inputs: Any) -> str | None:
        if device == "npu" and self.weight is None:
            return "its kernel needs a weight"
        if self.weight is not None and self.weight.dtype != x.dtype:
            if self.cast_first:
                return f"natively its result has the dtype of {self.weight.dtype} times {x.dtype}"
            if device == "musa" or (device == "npu" and bool(inputs) and inputs[0] is not None):
                return f"its kernel takes no weight of {self.weight.dtype} with {x.dtype}"
        if self.one_plus and device != "npu" and x.dtype != torch.float32:
            return f"1 + weight is added in float32, and its kernel takes a weight of {x.dtype}"
        return super().unfit(device, x)

    def forward_npu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x`, or of `x + residual` and that sum, by the NPU's kernels."""
        self._check(x, residual)
        kernel = self.kernel("npu", residual)
        if kernel == _ADD and residual is not None:
            y, _, total = call(kernel, x.contiguous(), residual.contiguous(), self.weight, self.eps)
            return y, total
        x = (x if residual is None else x + residual).contiguous()
        y, _ = call(kernel, x, self.weight, self.eps)
        return y if residual is None else (y, x)

    def forward_musa(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x`, or of `x + residual` and that sum, by torch_musa's kernel."""
        self._check(x, residual)
        kernel = self.kernel("musa", residual)
        x = (x if residual is None else x + residual).contiguous()
        if kernel == _MUSA:
            y, _ = call(kernel, x, [self.size], self.eps, self._scale(x))
        else:
            y, _ = call(kernel, x, [self.size], self._scale(x), self.eps)
        return y if residual is None else (y, x)

    def forward_cuda(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x`, or of `x + residual` and that sum, by torch's fused `rms_norm`."""
        self._check(x, residual)
        x = (x if residual is None else x + residual).contiguous()
        y = F.rms_norm(x, [self.size], self._scale(x), self.eps)
        return y if residual is None else (y, x)

    def _scale(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.weight is None:
            return None
        return 1.0 + self.weight.float() if self.one_plus else self.weight

    def _check(self, x: torch.Tensor, residual: torch.Tensor | None) -> None:
        if x.dim() == 0 or x.shape[-1] != self.size or not x.is_floating_point():
            raise LayerError(
                "RMSNorm does not fit its input.",
                seen=f"{x.dtype} of shape {list(x.shape)}",
                expected=f"floating point, with a last dimension of {self.size}",
                hint="the last dimension is the one that is normalised",
            )
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise LayerError(
                "RMSNorm does not fit its residual.",
                seen=f"{residual.dtype} of shape {list(residual.shape)}",
                expected=f"like the input: {x.dtype} of shape {list(x.shape)}",
                hint="add a residual that broadcasts or promotes before the call",
            )

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, cast_first={self.cast_first}, one_plus={self.one_plus}"


class FP32LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` computed in float32, with the result in the input's dtype, whatever dtype the parameters have.

    With grad disabled, the parameters are converted once and not in every call: see `fp32_parameters`, which says when
    a conversion is kept and what it cannot see. Parameters on another device than the input are copied there, too.

    Args:
        args, kwargs: as of `nn.LayerNorm`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp32_parameters = Fp32Parameters()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.fp32_parameters.of(input.device, self.weight, self.bias)
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)

    def forget(self) -> None:
        """Drops the converted parameters: after a write that torch does not count (`weight.data.copy_(...)`)."""
        self.fp32_parameters.forget()

    def train(self, mode: bool = True) -> Self:
        self.forget()
        super().train(mode)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()  # swap_tensors, as above
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.forget()  # torch.utils.swap_tensors refuses parameters to which there are weak references
        super()._apply(fn, recurse)
        return self
