"""A 3-D convolution that sees no later frame, and that matches its input's memory format once.

It equals diffusers' `WanCausalConv3d` (`diffusers/models/autoencoders/autoencoder_kl_wan.py`), with the same parameters
under the same names, so that it can take its place in a Wan VAE: `replace_causal_convs`. What differs is the memory
format (seed 002): padding first, then `match_conv3d_input_format`, then the convolution, and no conversion behind it.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from fxpatch.errors import LayerError
from fxpatch.layers.memory_format import match_conv3d_input_format
from fxpatch.layers.shared_state import FORWARD_HOOKS, share

Size3 = int | tuple[int, int, int]


class CausalConv3d(nn.Conv3d):
    """`[N, C, T, H, W]` to `[N, out, T', H', W']`.

    The frames in front of the first one are zeros, or the last ones of the chunk before: a video is decoded in chunks,
    and each call is given the frames that the kernel needs of the earlier ones.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as in `torch.nn.Conv3d`. The padding in time is put in
            front only, twice as much.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size3,
        stride: Size3 = 1,
        padding: Size3 = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, device=device, dtype=dtype)
        time, height, width = (int(each) for each in self.padding)
        self.front, self.height_padding, self.width_padding = 2 * time, (height, height), (width, width)
        self.padding = (0, 0, 0)

    @classmethod
    def of(cls, conv: nn.Conv3d) -> Self:
        """The same layer as diffusers' `WanCausalConv3d` or one of ours: it shares the parameters, and copies nothing.

        Args:
            conv: the layer to take the place of.

        Raises:
            LayerError: the layer has no causal padding, or has groups, a dilation or another padding mode.
        """
        made = cls(
            conv.in_channels, conv.out_channels, _three(conv.kernel_size), _three(conv.stride), _causal_padding(conv),
            device="meta",
        )  # fmt: skip
        share(conv, made, ("_parameters", *FORWARD_HOOKS))
        return made.train(conv.training)

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Pads, matches the format, convolves.

        Args:
            x: `[N, C, T, H, W]`.
            cache_x: `[N, C, frames, H, W]`, what came before x. Frames that the kernel does not need are cut off; a
                layer without padding in time needs none.

        Raises:
            LayerError: x has not five dimensions, or cache_x does not continue to it.
        """
        if x.dim() != 5:
            raise LayerError(
                "A causal convolution was called with something other than a batch of videos.",
                seen=f"input of shape {list(x.shape)}",
                expected=f"[N, {self.in_channels}, T, H, W]",
                hint="give a single video a batch of one: x.unsqueeze(0)",
            )
        front = self.front
        if cache_x is not None and front > 0:
            _check_cache(x, cache_x)
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            front -= cache_x.shape[2]
        return super().forward(match_conv3d_input_format(self._padded(x, front), self.weight))

    def _padded(self, x: torch.Tensor, front: int) -> torch.Tensor:
        """x with zeros around it; `front` frames of them before it (less than zero: so many frames are cut off)."""
        return nn.functional.pad(x, (*self.width_padding, *self.height_padding, front, 0))


def replace_causal_convs(model: nn.Module) -> dict[str, nn.Module]:
    """Puts a `CausalConv3d` in the place of each of diffusers' `WanCausalConv3d`, on the same parameters.

    Returns:
        What was replaced, by name: `model.set_submodule(name, original)` undoes it.

    Raises:
        LayerError: the model has none.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    replaced: dict[str, nn.Module] = {
        name: each for name, each in model.named_modules() if type(each) is WanCausalConv3d
    }
    if not replaced:
        raise LayerError(
            "There is no causal convolution to replace.",
            seen=f"{type(model).__name__} without a WanCausalConv3d",
            expected="a model with diffusers' WanCausalConv3d in it, such as AutoencoderKLWan",
            hint="replace the layers of another model by CausalConv3d.of(layer)",
        )
    for name, each in replaced.items():
        model.set_submodule(name, CausalConv3d.of(each))  # type: ignore[arg-type]
    return replaced


def _causal_padding(conv: nn.Conv3d) -> tuple[int, int, int]:
    """The padding that a causal convolution was made with."""
    if isinstance(conv, CausalConv3d):
        padding: tuple[int, ...] = (*conv.width_padding, *conv.height_padding, conv.front, 0)
    else:
        padding = getattr(conv, "_padding", ())  # diffusers': (left, right, top, bottom, front, back)
    plain = conv.groups == 1 and tuple(conv.dilation) == (1, 1, 1) and conv.padding_mode == "zeros"
    if len(padding) != 6 or padding[0] != padding[1] or padding[2] != padding[3] or padding[5] or not plain:
        raise LayerError(
            f"A {type(conv).__name__} is not a causal convolution that CausalConv3d can take the place of.",
            seen=f"padding {padding or tuple(conv.padding)}, groups {conv.groups}, dilation {tuple(conv.dilation)}, "
            f"padding mode {conv.padding_mode!r}",
            expected="diffusers' WanCausalConv3d or a CausalConv3d: zeros, symmetric in height and width, in front in "
            "time; one group, no dilation",
            hint="leave this layer as it is",
        )
    return padding[4] // 2, padding[2], padding[0]


def _check_cache(x: torch.Tensor, cache_x: torch.Tensor) -> None:
    """`torch.cat` would promote another dtype in silence, and tell of another shape without its cause."""
    alike = cache_x.dim() == 5 and cache_x.shape[:2] == x.shape[:2] and cache_x.shape[3:] == x.shape[3:]
    if not alike or cache_x.dtype != x.dtype:
        raise LayerError(
            "The frames that came before do not continue to this chunk.",
            seen=f"cache_x {list(cache_x.shape)} {cache_x.dtype}, input {list(x.shape)} {x.dtype}",
            expected="the same batch, channels, height, width and dtype",
            hint="start each video with cache_x=None",
        )


def _three(value: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = value
    return first, second, third
