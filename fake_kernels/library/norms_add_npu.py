"""torch_npu's RMS norms of a sum: the residual is added, and the sum is normalised and given back as well.

Results are contiguous whatever the strides of the arguments; torch_npu's own fakes keep the strides of permuted ones.
What CANN's kernels compute is closed, and taken from the formulas of op-plugin's documentation and tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.norms_npu import check_gamma, draw_shapes, normal

_OPAPI = "Ascend/op-plugin op_plugin/ops/opapi/"
_YAML = "Ascend/op-plugin op_plugin/config/op_plugin_functions.yaml (gen_opapi)"


def _two(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    leading, normalized = draw_shapes(draw)
    x1, x2 = (draw.floats(*leading, *normalized, dtype=dtype) for _ in range(2))
    return (x1, x2, draw.floats(*normalized, dtype=dtype), draw.choice(1e-6, 1e-5)), {}


def _another_gamma(draw: Draw) -> Call:
    x = draw.floats(3, 4, dtype=torch.float32)
    return (x, draw.floats(3, 4, dtype=torch.float32), draw.floats(3, dtype=torch.float32)), {}


def _another_x2(draw: Draw) -> Call:
    x = draw.floats(3, 4, dtype=torch.float32)
    return (x, draw.floats(2, 4, dtype=torch.float32), draw.floats(4, dtype=torch.float32)), {}


def _check_two(x1: Tensor, x2: Tensor, gamma: Tensor) -> tuple[int, ...]:
    torch._check(x1.shape == x2.shape, lambda: f"x1 and x2 are of different sizes: {list(x1.shape)}, {list(x2.shape)}")
    return check_gamma(x1, gamma, "x1")


def _add(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    if x1.shape != x2.shape:
        raise RuntimeError(f"{x1.shape} and {x2.shape} are not added element by element")
    x = (x1.float() + x2.float()).to(x1.dtype).contiguous()  # rounded before it is normalised, as op-plugin's tests do
    normalised, rstd = normal(x, gamma, epsilon)
    return normalised * gamma.float(), rstd, x


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd, x = _add(x1, x2, gamma, epsilon)
    return y.to(x1.dtype), rstd, x


@fake_kernel(
    "npu::npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
    reference=_add_rms_norm,
    source=_OPAPI + "AddRmsNormKernelOpApi.cpp",
    library="torch_npu",
    arguments=_two,
    refuses={"of different sizes": _another_x2, "have to be those of gamma": _another_gamma},
)
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor, Tensor]:
    """The RMS norm of `x1 + x2`: the result, `rstd` float32, and the sum; result and sum like `x1` and contiguous."""
    rstd = _check_two(x1, x2, gamma)
    return x1.new_empty(x1.shape), x1.new_empty(rstd, dtype=torch.float32), x1.new_empty(x1.shape)


def _add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, rstd, x = _add(x1, x2, gamma, epsilon)
    return y, y.to(x1.dtype, copy=True), rstd, x


@fake_kernel(
    "npu::npu_add_rms_norm_cast(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_add_rms_norm_cast,
    source=_YAML,
    library="torch_npu",
    arguments=_two,
    refuses={"of different sizes": _another_x2, "have to be those of gamma": _another_gamma},
)
def npu_add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `npu_add_rms_norm`, with the result twice: float32 first, then of the dtype of `x1`; `rstd`; the sum."""
    rstd = _check_two(x1, x2, gamma)
    return (
        x1.new_empty(x1.shape, dtype=torch.float32),
        x1.new_empty(x1.shape),
        x1.new_empty(rstd, dtype=torch.float32),
        x1.new_empty(x1.shape),
    )


def _add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    y, rstd, x = _add(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(x)
    return rstd


@fake_kernel(
    "npu::npu_add_rms_norm_v2(Tensor(a!) x1, Tensor(b!) x2, Tensor gamma, float epsilon=1e-06) -> Tensor",
    reference=_add_rms_norm_v2,
    source=_OPAPI + "AddRmsNormV2KernelNpuOpApi.cpp",
    library="torch_npu",
    arguments=_two,
    refuses={"of different sizes": _another_x2, "have to be those of gamma": _another_gamma},
)
def npu_add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> Tensor:
    """As `npu_add_rms_norm`, in place: `x1` becomes the result and `x2` the sum. Returns `rstd`, float32."""
    return x1.new_empty(_check_two(x1, x2, gamma), dtype=torch.float32)


def _functional(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd, x = _add(x1, x2, gamma, epsilon)
    return rstd, y.to(x1.dtype), x.to(x2.dtype)


@fake_kernel(
    "npu::npu_add_rms_norm_v2_functional(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_functional,
    source=_OPAPI + "AddRmsNormV2KernelNpuOpApi.cpp; Ascend/pytorch torch_npu/csrc/aten/common/TensorFactories.cpp",
    library="torch_npu",
    arguments=_two,
    refuses={"of different sizes": _another_x2, "have to be those of gamma": _another_gamma},
)
def npu_add_rms_norm_v2_functional(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    """`rstd`, the result and the sum. These are clones of `x1` and `x2`, which are contiguous on an NPU."""
    rstd = _check_two(x1, x2, gamma)
    return x1.new_empty(rstd, dtype=torch.float32), x1.new_empty(x1.shape), x2.new_empty(x2.shape)


KERNELS = (
    npu_add_rms_norm,
    npu_add_rms_norm_cast,
    npu_add_rms_norm_v2,
    npu_add_rms_norm_v2_functional,
)
