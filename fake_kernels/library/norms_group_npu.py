"""torch_npu's group norms with an activation after them, which diffusion models use.

Results are contiguous whatever the strides of the arguments; torch_npu's own fakes keep the strides of permuted ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = (
    "Ascend/op-plugin op_plugin/config/op_plugin_functions.yaml (gen_opapi), "
    "docs/context/torch_npu-npu_group_norm_{}.md"
)


def _normalise(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if input.dim() < 2 or groups < 1 or input.size(1) % groups:
        raise RuntimeError(f"cannot divide the channels of {tuple(input.shape)} into {groups} groups")
    if any(
        each is not None and (each.shape != input.shape[1:2] or each.dtype != input.dtype) for each in (weight, bias)
    ):
        raise RuntimeError("weight and bias have to be like the channels")
    batch, channels = input.shape[:2]
    inner = (channels // groups) * input.shape[2:].numel()
    flat = input.float().reshape(batch, groups, inner)
    mean = flat.mean(-1)
    rstd = torch.rsqrt((flat - mean[..., None]).square().mean(-1) + eps)
    found = ((flat - mean[..., None]) * rstd[..., None]).reshape(input.shape)
    ones = [1] * (input.dim() - 2)
    if weight is not None:
        found = found * weight.float().reshape(channels, *ones)
    if bias is not None:
        found = found + bias.float().reshape(channels, *ones)
    found = found * torch.sigmoid(scale * found)
    return tuple(each.to(input.dtype).contiguous() for each in (found, mean, rstd))  # type: ignore[return-value]


def _check(input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    torch._check(input.dim() >= 2, lambda: f"input has to have at least 2 dimensions, not {input.dim()}")
    torch._check(
        groups >= 1 and input.shape[1] % groups == 0,
        lambda: f"the {input.shape[1]} channels of input cannot be divided into {groups} groups",
    )
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None:
            torch._check(
                tuple(each.shape) == (input.shape[1],) and each.dtype == input.dtype,
                lambda name=name, each=each: (
                    f"{name} has to be {input.dtype} with one element per channel of input, "
                    f"{input.shape[1]}, not {each.dtype} of sizes {list(each.shape)}"
                ),
            )


def _drawn(draw: Draw, weighted: bool, biased: bool) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    dtype, groups, count = draw.choice(*FLOATS), draw.choice(2, 1, 3), draw.choice(2, 0, 1)
    batch, channels = draw.size(), draw.size(times=groups)
    input = draw.floats(batch, channels, *draw.sizes(count), dtype=dtype)
    weight, bias = (draw.floats(channels, dtype=dtype) if given else None for given in (weighted, biased))
    return input, weight, bias, groups


def _silu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, group: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    return _normalise(input, group, weight, bias, eps, 1.0)


def _silu_arguments(draw: Draw) -> Call:
    return _drawn(draw, draw.flag(), draw.flag()), {}


def _indivisible(draw: Draw) -> Call:
    return (draw.floats(2, 5, dtype=torch.float32), None, None, 2), {}


def _other_weight(draw: Draw) -> Call:
    return (draw.floats(2, 4, dtype=torch.float16), draw.floats(4, dtype=torch.float32), None, 2), {}


@fake_kernel(
    "npu::npu_group_norm_silu(Tensor input, Tensor? weight, Tensor? bias, int group, float eps=1e-05) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_silu,
    source=_SOURCE.format("silu"),
    library="torch_npu",
    arguments=_silu_arguments,
    refuses={"cannot be divided": _indivisible, "weight has to be": _other_weight},
)
def npu_group_norm_silu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, group: int, eps: float = 1e-05
) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of the group norm of `input` `[N, C, ...]`, and the means and reciprocal standard deviations `[N, group]`.

    All are of the dtype of `input` and contiguous. `weight` and `bias` `[C]`; of which dtype the statistics are where
    these are of another than `input` differs between versions, so that is refused.
    """
    _check(input, group, weight, bias)
    mean, rstd = (input.new_empty((input.shape[0], group)) for _ in range(2))
    return input.new_empty(input.shape), mean, rstd


def _swish(
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float | None = 1e-5,
    swish_scale: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    eps, scale = 1e-5 if eps is None else eps, 1.0 if swish_scale is None else swish_scale
    return _normalise(input, num_groups, weight, bias, eps, scale)


def _swish_arguments(draw: Draw) -> Call:
    eps, scale = draw.choice(1e-5, None), draw.choice(1.0, 2.0, None)
    input, weight, bias, groups = _drawn(draw, True, True)
    return (input, groups, weight, bias), {"eps": eps, "swish_scale": scale}


def _swish_of_another_weight(draw: Draw) -> Call:
    weight = draw.floats(3, dtype=torch.float32)
    return (draw.floats(2, 4, dtype=torch.float32), 2, weight, weight), {}


@fake_kernel(
    "npu::npu_group_norm_swish(Tensor input, int num_groups, Tensor weight, Tensor bias, float? eps=1e-05, "
    "float? swish_scale=1.) -> (Tensor, Tensor, Tensor)",
    reference=_swish,
    source=_SOURCE.format("swish"),
    library="torch_npu",
    arguments=_swish_arguments,
    refuses={"weight has to be": _swish_of_another_weight},
)
def npu_group_norm_swish(
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float | None = 1e-05,
    swish_scale: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y * sigmoid(swish_scale * y)` of the group norm `y` of `input` `[N, C, ...]`; then as `npu_group_norm_silu`."""
    _check(input, num_groups, weight, bias)
    mean, rstd = (weight.new_empty((input.shape[0], num_groups)) for _ in range(2))
    return input.new_empty(input.shape), mean, rstd


KERNELS = (npu_group_norm_silu, npu_group_norm_swish)
