"""Gated activations: the first half of the last dimension is activated and multiplied with the second.

The rules: an odd last dimension is an error everywhere (op-plugin and torch_musa halve it downwards without a word);
which half is activated and how GELU is computed is what the native forward does, whatever a vendor's defaults are:
torch_npu's `npu_geglu` activates the second half, with tanh, unless told otherwise, and returns two tensors.

Sources: seeds 000 (`GeluAndMul`) and 004 (`SiluAndMul`); the operators' schemas are those of `fake_kernels.library`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxpatch.errors import LayerError
from fxpatch.layers.platform_op import PlatformOp

SILU_KERNELS = {
    "musa": ("aten::_fused_swiglu_forward", "aten::swish_glu", "nn.SwishGLU"),
    "npu": ("npu::npu_swiglu",),
}
GELU_KERNELS = {"npu": ("npu::npu_geglu",)}
APPROXIMATE = {"none": 0, "tanh": 1}  # as npu_geglu numbers them


class SiluAndMul(PlatformOp):
    """`silu(x[..., :d]) * x[..., d:]` of `[..., 2 * d]`: `[..., d]`, of the dtype of `x`.

    On musa `aten::_fused_swiglu_forward`, which is what the vendor's `nn.SwishGLU` calls; that, where only it is there.
    On npu `npu_swiglu`. Both compute in float32 and round once; the native forward rounds after `silu`, too.

    Raises:
        LayerError: an odd last dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        # made here: Dynamo cannot create modules. Not registered: it has no state, and no name in anybody's model.
        self.__dict__["_swish_glu"] = nn.SwishGLU() if hasattr(nn, "SwishGLU") else None

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        first, second = halves(x, "SiluAndMul")
        return F.silu(first) * second

    def kernels(self, device: str, *inputs: Any) -> tuple[str, ...]:
        return SILU_KERNELS.get(device, ())

    def unfit(self, device: str, x: torch.Tensor, *inputs: Any) -> str | None:
        if device == "musa" and self._swish_glu is None and self.kernel(device) == "nn.SwishGLU":
            return "it was made before nn.SwishGLU was there"
        return super().unfit(device, x)

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        """`aten::_fused_swiglu_forward` or `nn.SwishGLU`, whichever torch_musa has, on `x` of `[..., 2 * d]`."""
        halves(x, "SiluAndMul")
        kernel = self.kernel("musa")
        y: torch.Tensor = self._swish_glu(x) if kernel == "nn.SwishGLU" else call(kernel, x)
        return y

    def forward_npu(self, x: torch.Tensor) -> torch.Tensor:
        """`npu::npu_swiglu` on `x` of `[..., 2 * d]`."""
        halves(x, "SiluAndMul")
        y: torch.Tensor = call(self.kernel("npu"), x)
        return y


class GeluAndMul(PlatformOp):
    """`gelu(x[..., :d]) * x[..., d:]` of `[..., 2 * d]`: `[..., d]`, of the dtype of `x`. On npu `npu_geglu`.

    Args:
        approximate: `"none"`, with the error function, or `"tanh"`.
        activate_left: False activates the second half instead, as diffusers' GEGLU does.

    Raises:
        LayerError: another `approximate`; an odd last dimension.
    """

    def __init__(self, approximate: str = "none", *, activate_left: bool = True) -> None:
        super().__init__()
        if approximate not in APPROXIMATE:
            raise LayerError(
                "GeluAndMul does not know this approximation.",
                seen=f"approximate={approximate!r}",
                expected=" or ".join(map(repr, APPROXIMATE)),
                hint="transformers' 'gelu_pytorch_tanh' is 'tanh', its 'gelu' is 'none'",
            )
        self.approximate, self.activate_left = approximate, activate_left

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        first, second = halves(x, "GeluAndMul")
        if self.activate_left:
            return F.gelu(first, approximate=self.approximate) * second
        return first * F.gelu(second, approximate=self.approximate)

    def kernels(self, device: str, *inputs: Any) -> tuple[str, ...]:
        return GELU_KERNELS.get(device, ())

    def forward_npu(self, x: torch.Tensor) -> torch.Tensor:
        """`npu::npu_geglu` on `x` of `[..., 2 * d]`."""
        halves(x, "GeluAndMul")
        self.kernel("npu")
        return geglu(x, self.approximate, self.activate_left)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}, activate_left={self.activate_left}"


def halves(x: torch.Tensor, who: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two halves of the last dimension.

    Args:
        x: `[..., 2 * d]`.
        who: the layer, for the message.

    Raises:
        LayerError: there are none.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise LayerError(
            f"{who} needs two halves of the last dimension.",
            seen=f"shape {list(x.shape)}",
            expected="an even last dimension: what is activated, then what it is multiplied with",
            hint="concatenate gate and up along the last dimension before the call",
        )
    first, second = x.chunk(2, -1)
    return first, second


def call(kernel: str, *args: Any) -> Any:
    """Runs `"namespace::operator"`.

    Args:
        kernel: its name.
        args: its arguments, positional.
    """
    namespace, _, operator = kernel.partition("::")
    return getattr(getattr(torch.ops, namespace), operator)(*args)


def geglu(x: torch.Tensor, approximate: str, activate_left: bool) -> torch.Tensor:
    """`npu_geglu` of `[..., 2 * d]`; its second result, the GELU alone, is for its backward.

    Args:
        x: on an npu.
        approximate: `"none"` or `"tanh"`.
        activate_left: the first half is activated, not the second.
    """
    y, _ = torch.ops.npu.npu_geglu(x, -1, APPROXIMATE[approximate], activate_left)
    return y  # type: ignore[no-any-return]
