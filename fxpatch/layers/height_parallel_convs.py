"""Convolutions on a band of rows, and diffusers' Wan encoder and decoder made of them.

A band is padded in one copy, zeros at the borders of the image and the neighbours' rows inside of it, and in the format
it has: joining halos to a channels_last_3d tensor by `torch.cat`, as sglang's `halo_exchange` does (seed 002), makes it
contiguous, and every layer would convert all of it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxpatch.errors import LayerError
from fxpatch.layers.causal_conv3d import CausalConv3d
from fxpatch.layers.height_parallel import HeightParallel, exchange_halo
from fxpatch.layers.shared_state import FORWARD_HOOKS, share


class _Band:
    """Pads a band: zeros at the borders of the image, the neighbours' rows inside of it.

    The rows above and below are what a "same" convolution reads: an output row belongs to the rank that has the input
    row at its stride.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, parallel: HeightParallel, top: int, bottom: int) -> None:
        kernel, stride = int(conv.kernel_size[-2]), int(conv.stride[-2])
        if not kernel - stride <= top + bottom < kernel or top >= kernel:
            raise LayerError(
                "A convolution changes the height in a way that bands of rows do not follow.",
                seen=f"kernel {kernel}, stride {stride}, {top} rows of padding above and {bottom} below",
                expected="padding of kernel - stride rows at least and kernel - 1 at most: output height is H / stride",
                hint="gather the height before this layer: HeightParallel.gather",
            )
        self.parallel, self.kernel, self.stride = parallel, kernel, stride
        self.above, self.below = top, max(kernel - stride - top, 0)

    def padded(self, x: torch.Tensor, width: tuple[int, int], front: int | None = None) -> torch.Tensor:
        """`[..., H, W]` with the rows, `width` and `front` frames around it: one copy, in the format of x."""
        rows, most = self.parallel.rows_at(x.shape[-2]), max(self.above, self.below)
        if min(rows) < most or any(each % self.stride for each in rows):
            raise LayerError(
                "The bands of rows are too low for a convolution, or no multiples of its stride.",
                seen=f"rows {list(rows)}, kernel {self.kernel}, stride {self.stride}",
                expected=f"at least {max(most, self.stride)} rows on each rank, in multiples of {self.stride}",
                hint="use fewer ranks, or HeightParallel(unit=...) with 2 to the number of downsamplings",
            )
        padding = (*width, self.above, self.below, *(() if front is None else (front, 0)))
        out = nn.functional.pad(x, padding)
        if len(rows) == 1 or not most:
            return out
        if front is not None and front < 0:
            x = x.narrow(2, -front, x.shape[2] + front)
        before, after = exchange_halo(x, self.above, self.below, self.parallel.group, via=self.parallel.via)
        inside = out.narrow(-1, width[0], x.shape[-1])
        if front is not None and front > 0:
            inside = inside.narrow(2, front, x.shape[2])
        if before is not None:
            inside.narrow(-2, 0, self.above).copy_(before)
        if after is not None:
            inside.narrow(-2, self.above + x.shape[-2], self.below).copy_(after)
        return out


class HeightParallelCausalConv3d(CausalConv3d):
    """`CausalConv3d` on a band of rows: `[N, C, T, H of this rank, W]`. Made by `of`, then `join`."""

    def join(self, parallel: HeightParallel) -> HeightParallelCausalConv3d:
        """Makes the layer work on bands of `parallel`; returns the layer."""
        self.band = _Band(self, parallel, *self.height_padding)
        return self

    def _padded(self, x: torch.Tensor, front: int) -> torch.Tensor:
        return self.band.padded(x, self.width_padding, front)


class HeightParallelConv2d(nn.Conv2d):
    """A Conv2d on a band of rows: `[N, C, H of this rank, W]`, on the parameters of the layer it is made of.

    Args:
        conv: with zeros as padding, one group, no dilation.
        parallel: the split.
        height_padding: rows above and below that something in front of the layer would add; the layer's own if None.

    Raises:
        LayerError: a layer with groups, a dilation, or padding other than zeros in numbers.
    """

    def __init__(
        self, conv: nn.Conv2d, parallel: HeightParallel, height_padding: tuple[int, int] | None = None
    ) -> None:
        plain = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and conv.padding_mode == "zeros"
        if not plain or isinstance(conv.padding, str):
            raise LayerError(
                "This Conv2d cannot work on bands of rows.",
                seen=f"groups {conv.groups}, dilation {tuple(conv.dilation)}, padding mode {conv.padding_mode!r}, "
                f"padding {conv.padding!r}",
                expected="one group, no dilation, zeros, and the padding in numbers",
                hint="gather the height before this layer: HeightParallel.gather",
            )
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, device="meta")  # type: ignore[arg-type]
        top, side = (int(each) for each in conv.padding)
        share(conv, self, ("_parameters", *FORWARD_HOOKS))
        self.width_padding = (side, side)
        self.band = _Band(self, parallel, *(height_padding or (top, top)))
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.band.padded(x, self.width_padding))


def split_over_height(model: nn.Module, parallel: HeightParallel) -> Callable[[], None]:
    """Makes diffusers' `WanDecoder3d` or `WanEncoder3d` compute a band of rows on each rank, in place.

    It is called as before, with the whole height on every rank, and returns the whole height on every rank; its
    feature cache holds bands. Attentions see the whole height. The parameters and their names stay.

    Args:
        model: `vae.decoder`, or `vae.encoder` (whose `parallel` has `unit=2 ** downsamplings`).
        parallel: the split; one for each model.

    Returns:
        A function that undoes it.

    Raises:
        LayerError: another model, a layer that does not work on bands, or a model that is split already.
    """
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    if not isinstance(model, (wan.WanDecoder3d, wan.WanEncoder3d)):
        raise LayerError(
            "This model cannot be split over its height.",
            seen=type(model).__name__,
            expected="diffusers' WanDecoder3d or WanEncoder3d: vae.decoder, vae.encoder",
            hint="build another model out of HeightParallelCausalConv3d and HeightParallelConv2d",
        )
    if any(isinstance(each, (HeightParallelCausalConv3d, HeightParallelConv2d)) for each in model.modules()):
        raise LayerError(
            "This model is split over its height already.",
            seen=f"{type(model).__name__} with layers on bands of rows",
            expected="a model that is not split",
            hint="call what the first split_over_height returned, which undoes it",
        )
    replaced: dict[str, nn.Module] = {}
    made: dict[str, nn.Module] = {}
    for name, each in model.named_modules():
        if isinstance(each, (nn.Conv2d, nn.Conv3d)) and each.kernel_size[-2] == each.stride[-2] == 1:
            continue  # it works row by row
        if isinstance(each, (wan.WanCausalConv3d, CausalConv3d)):
            made[name] = HeightParallelCausalConv3d.of(each).join(parallel)
        elif type(each) is wan.WanResample and "down" in each.mode:
            made[f"{name}.resample.0"], made[f"{name}.resample.1"] = _downsampling(each.resample, parallel)
        elif isinstance(each, nn.Conv2d) and name not in made:
            made[name] = HeightParallelConv2d(each, parallel)
        elif isinstance(each, nn.Conv3d):
            raise LayerError(
                f"{name} does not work on bands of rows.",
                seen=type(each).__name__,
                expected="a WanCausalConv3d, or a kernel of one row",
                hint="leave it out of the model that is split, or gather around it",
            )
    for name, each in made.items():
        replaced[name] = model.get_submodule(name)
        model.set_submodule(name, each)

    hooks = [
        model.register_forward_pre_hook(lambda _, given: (parallel.split(given[0]), *given[1:])),
        model.register_forward_hook(lambda _, given, out: parallel.gather(out)),
    ]
    for each in model.modules():
        if isinstance(each, wan.WanAttentionBlock):
            hooks.append(each.register_forward_pre_hook(lambda _, given: (parallel.gather(given[0]), *given[1:])))
            hooks.append(each.register_forward_hook(lambda _, given, out: parallel.own(out)))

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for name, each in replaced.items():
            model.set_submodule(name, each)

    return undo


def _downsampling(resample: Any, parallel: HeightParallel) -> tuple[nn.Module, nn.Module]:
    """diffusers pads a column and a row of zeros behind the image; the row is the last rank's only."""
    left, right, top, bottom = resample[0].padding
    conv = resample[1]
    height = (top + int(conv.padding[0]), bottom + int(conv.padding[0]))
    return nn.ZeroPad2d((left, right, 0, 0)), HeightParallelConv2d(conv, parallel, height)
