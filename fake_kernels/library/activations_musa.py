"""torch_musa's fused activations and loss, which its patched torch adds to torch's own namespace.

Schemas: MooreThreads/torch_musa, torch_patches/aten_src_ATen_native_native_functions.yaml.patch. The mathematics is
mudnn's, whose source is closed: it is taken from torch_musa's own tests, which compare with plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SWIGLU = "MooreThreads/torch_musa torch_musa/csrc/aten/ops/SwiGlu.cpp"
_LOSS = "MooreThreads/torch_musa torch_musa/csrc/aten/ops/Loss.cpp"
_NONE, _MEAN, _SUM = 0, 1, 2  # at::Reduction


def _refuse_other_than_floats(input: Tensor) -> None:
    if input.dtype not in FLOATS:
        raise RuntimeError(f"no SwiGLU of {input.dtype}")


def _swiglu(input: Tensor) -> Tensor:
    _refuse_other_than_floats(input)
    if input.size(-1) % 2:
        raise RuntimeError("an odd number of columns has no halves")
    gate, up = input.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype).contiguous()


def _swiglu_arguments(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    rows = draw.shape(0, 3)
    return (draw.floats(*rows, draw.size(times=2), dtype=dtype),), {}


def _odd(draw: Draw) -> Call:
    return (draw.floats(3, 5, dtype=torch.float32),), {}


def _doubles(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float64),), {}


@fake_kernel(
    "aten::_fused_swiglu_forward(Tensor input) -> Tensor",
    reference=_swiglu,
    source=_SWIGLU,
    library="torch_musa",
    arguments=_swiglu_arguments,
    refuses={"last dimension of input has to be even": _odd, "float32, float16 or bfloat16": _doubles},
)
def fused_swiglu_forward(input: Tensor) -> Tensor:
    """`silu(gate) * up`, where `input` `[..., 2 * d]` is gate, then up. Returns `[..., d]`, contiguous, of its dtype.

    The kernel rounds an odd last dimension down without a word. What mudnn computes then is not known: it is refused.
    The kernel looks at the dtype of inputs that are not empty only.
    """
    _check_dtype(input)
    torch._check(input.shape[-1] % 2 == 0, lambda: f"the last dimension of input has to be even, not {input.shape[-1]}")
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))


def _swiglu_backward(grad: Tensor, input: Tensor) -> Tensor:
    _refuse_other_than_floats(input)
    gate, up = input.float().chunk(2, -1)
    sigmoid, wide = torch.sigmoid(gate), grad.float()
    silu = gate * sigmoid
    return torch.cat([wide * up * (sigmoid + silu - silu * sigmoid), wide * silu], -1).to(input.dtype).contiguous()


def _swiglu_backward_arguments(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    count = draw.choice(0, 1, 2, 3)
    rows, columns = draw.sizes(count), draw.size()
    return (draw.floats(*rows, columns, dtype=dtype), draw.floats(*rows, 2 * columns, dtype=dtype)), {}


def _backward_of_doubles(draw: Draw) -> Call:
    return (draw.floats(3, 2, dtype=torch.float64), draw.floats(3, 4, dtype=torch.float64)), {}


@fake_kernel(
    "aten::_fused_swiglu_backward(Tensor grad, Tensor input) -> Tensor",
    reference=_swiglu_backward,
    source=_SWIGLU,
    library="torch_musa",
    arguments=_swiglu_backward_arguments,
    refuses={"float32, float16 or bfloat16": _backward_of_doubles},
)
def fused_swiglu_backward(grad: Tensor, input: Tensor) -> Tensor:
    """The gradient of `input` `[..., 2 * d]` from that of the result, `grad` `[..., d]`: contiguous, like `input`."""
    _check_dtype(input)
    return input.new_empty(input.shape)


def _check_dtype(input: Tensor) -> None:
    torch._check(input.dtype in FLOATS, lambda: f"SwiGLU takes float32, float16 or bfloat16, not {input.dtype}")


def _cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    if target.size(0) != self.size(0):
        raise RuntimeError(f"{target.size(0)} targets for {self.size(0)} rows")
    loss = torch.nn.functional.cross_entropy(
        self.float(),
        target,
        None if weight is None else weight.float(),
        ignore_index=ignore_index,
        reduction={_NONE: "none", _MEAN: "mean", _SUM: "sum"}[reduction],
        label_smoothing=label_smoothing,
    )
    return loss.to(self.dtype)


def _cross_entropy_arguments(draw: Draw) -> Call:
    dtype, weighted, ignored = draw.choice(*FLOATS), draw.flag(), draw.choice(-100, 1)
    reduction, smoothing = draw.choice(_MEAN, _SUM, _NONE), draw.choice(0.0, 0.1)
    rows, classes = draw.size(), draw.size(least=2)
    logits = draw.floats(rows, classes, dtype=dtype)
    target = draw.integers(rows, low=0, high=classes)
    weight = draw.floats(classes, dtype=dtype).abs() if weighted else None
    return (logits, target, weight, reduction), {"ignore_index": ignored, "label_smoothing": smoothing}


def _another_number_of_targets(draw: Draw) -> Call:
    return (draw.floats(3, 4, dtype=torch.float32), draw.integers(2, low=0, high=4)), {}


@fake_kernel(
    "aten::_fused_cross_entropy_loss_2d_forward(Tensor self, Tensor target, Tensor? weight=None, int reduction=Mean, "
    "int ignore_index=-100, float label_smoothing=0.0) -> Tensor",
    reference=_cross_entropy,
    source=_LOSS,
    library="torch_musa",
    arguments=_cross_entropy_arguments,
    refuses={"one target per row": _another_number_of_targets},
)
def fused_cross_entropy_loss_2d_forward(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of logits `self` `[N, C]` and class numbers `target` int64 `[N]`, with `weight` `[C]`.

    Returns a scalar for `reduction` 1 (mean) and 2 (sum), otherwise `[N]`; contiguous, of the dtype of `self`.
    """
    rows, targets = self.shape[0], target.shape[0]
    torch._check(rows == targets, lambda: f"there has to be one target per row of self: {targets} for {rows}")
    return self.new_empty(() if reduction in (_MEAN, _SUM) else (rows,))


KERNELS = (fused_swiglu_forward, fused_swiglu_backward, fused_cross_entropy_loss_2d_forward)
