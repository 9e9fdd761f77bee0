"""Memory formats at the two places where they decide whether a result is right: a convolution and a collective.

A Conv3d whose weight is stored as channels_last_3d and whose input is not has been seen to return corrupted video on an
accelerator (Wan2.2, 8 devices: seed 002, sglang's `wan_common_utils.py` and `wan_dist_utils.py`). torch's own kernels
take mixed formats: the CPU's answer is the same, bit for bit. So the input is matched where it enters, and nothing is
converted back behind an output: a stack of layers converts its input once, and not twice in every layer.

Sizes of 1 make a tensor contiguous in both formats: every freshly made 1x1x1 weight says yes to
`is_contiguous(memory_format=torch.channels_last_3d)`, and the seed's test would convert the input of such a layer in a
model that has nothing to do with channels_last_3d. torch's kernels ask the strides in that case, and so does this.

A collective moves memory, not elements. gloo's all_gather heeds strides; its broadcast, all_reduce, scatter,
reduce_scatter and all_to_all_single return permuted elements, without an error, where ranks or buffers differ in their
format; its send refuses. Other back ends differ again, so a tensor is made contiguous once before a collective,
whichever it is.
"""

from __future__ import annotations

import torch

from fxpatch.errors import LayerError


def match_conv3d_input_format(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The input of a Conv3d in its weight's memory format.

    Args:
        x: `[N, C, T, H, W]`, any dtype and strides. Pad it before: padding a converted tensor copies it once more.
        weight: `[out, C, kT, kH, kW]`, of any dtype and strides.

    Returns:
        x in channels_last_3d where the weight is stored so; otherwise x. The same object where nothing is to be done.

    Raises:
        LayerError: x or weight has not five dimensions.
    """
    for name, tensor in (("input", x), ("weight", weight)):
        if tensor.dim() != 5:
            raise LayerError(
                f"The {name} of a Conv3d cannot be matched in its memory format.",
                seen=f"{name} of shape {list(tensor.shape)}",
                expected="five dimensions: input [N, C, T, H, W], weight [out, C, kT, kH, kW]",
                hint="give a single sample a batch of one: x.unsqueeze(0)",
            )
    if stored_channels_last_3d(weight):
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x


def stored_channels_last_3d(weight: torch.Tensor) -> bool:
    """Whether torch's convolutions take a 5-D weight as channels_last_3d: by its strides where its sizes leave it open.

    `torch.nn.Module.to(memory_format=torch.channels_last_3d)` sets the strides of sizes of 1, too; a new weight has
    those of a contiguous tensor.

    Args:
        weight: `[O, I, T, H, W]`.
    """
    if not weight.is_contiguous(memory_format=torch.channels_last_3d):
        return False
    return weight.stride(1) == 1 and weight.stride(4) >= weight.size(1)


def contiguous_for_collective(x: torch.Tensor) -> torch.Tensor:
    """A tensor as a collective may have it: contiguous, all of its elements in the order of its dimensions.

    Call it once, on the very tensor that is communicated, behind all slicing and permuting; and on every rank, since a
    format that differs between ranks is what goes wrong.

    Args:
        x: any shape, dtype and strides.

    Returns:
        x itself where it is contiguous, otherwise a copy.
    """
    return x.contiguous()
