"""Memory formats: a Conv3d's input follows its weight, once; a causal convolution equals diffusers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv3d
from torch.utils._python_dispatch import TorchDispatchMode

from fxpatch.errors import FxPatchError, LayerError
from fxpatch.layers.causal_conv3d import CausalConv3d, replace_causal_convs
from fxpatch.layers.memory_format import (
    contiguous_for_collective,
    match_conv3d_input_format,
    stored_channels_last_3d,
)

CHANNELS_LAST = torch.channels_last_3d
SIZE = st.integers(1, 3)


class Conversions(TorchDispatchMode):
    """Counts the copies that only change the order of a tensor's elements in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.count += out.stride() != args[0].stride() and out.dim() == 5
        return out


def in_channels_last(*layers: torch.nn.Module) -> torch.nn.Sequential:
    return torch.nn.Sequential(*layers).to(memory_format=CHANNELS_LAST)


# -- match_conv3d_input_format


def test_input_follows_a_channels_last_weight_and_no_other() -> None:
    x, weight = torch.randn(2, 4, 3, 5, 6), torch.randn(8, 4, 3, 3, 3)
    assert match_conv3d_input_format(x, weight) is x
    last = weight.contiguous(memory_format=CHANNELS_LAST)
    matched = match_conv3d_input_format(x, last)
    assert matched.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(matched, x)
    assert match_conv3d_input_format(matched, last) is matched
    assert match_conv3d_input_format(matched, weight) is matched  # nothing is converted back


def test_a_new_1x1x1_weight_is_not_channels_last_though_it_says_so() -> None:
    weight = torch.nn.Conv3d(8, 16, 1).weight
    assert weight.is_contiguous(memory_format=CHANNELS_LAST)  # what the seed asks
    x = torch.randn(1, 8, 2, 3, 4)
    assert match_conv3d_input_format(x, weight) is x
    converted = torch.nn.Conv3d(8, 16, 1).to(memory_format=CHANNELS_LAST).weight
    assert match_conv3d_input_format(x, converted).is_contiguous(memory_format=CHANNELS_LAST)


@settings(max_examples=150)
@given(
    shape=st.tuples(SIZE, SIZE, SIZE, SIZE, SIZE), kernel=st.tuples(SIZE, SIZE, SIZE), out=SIZE,
    last=st.booleans(), x_last=st.booleans(), by_module=st.booleans(),
)  # fmt: skip
def test_every_shape_with_sizes_of_one(
    shape: tuple[int, ...], kernel: tuple[int, ...], out: int, last: bool, x_last: bool, by_module: bool
) -> None:
    layer = torch.nn.Conv3d(shape[1], out, kernel)
    if last and by_module:
        layer.to(memory_format=CHANNELS_LAST)
    elif last:
        layer.weight.data = layer.weight.data.contiguous(memory_format=CHANNELS_LAST)
    weight, x = layer.weight, torch.randn(shape)
    if x_last:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    matched = match_conv3d_input_format(x, weight)
    assert torch.equal(matched, x)
    if stored_channels_last_3d(weight):
        assert matched.is_contiguous(memory_format=CHANNELS_LAST)
        assert (matched is x) == x.is_contiguous(memory_format=CHANNELS_LAST)
        assert last or shape[1] == 1
    else:
        assert matched is x
        assert weight.is_contiguous()
    suggested = torch._prims_common.suggest_memory_format(weight) == CHANNELS_LAST
    if suggested and shape[1] > 1:  # what torch itself takes for channels_last_3d by its strides
        assert stored_channels_last_3d(weight)


@pytest.mark.parametrize(
    "weight", [torch.randn(8, 4, 3, 3, 6)[..., ::2], torch.randn(3, 3, 3, 4, 8).permute(4, 3, 0, 1, 2)]
)
def test_strides_of_neither_format_leave_the_input(weight: torch.Tensor) -> None:
    x = torch.randn(1, 4, 3, 4, 5)
    assert match_conv3d_input_format(x, weight) is x


def test_torch_on_the_cpu_takes_mixed_formats() -> None:
    """The seed calls a mixed call undefined in PyTorch. It is not on the CPU: the corruption was a device's kernel."""
    x, weight = torch.randn(2, 4, 3, 6, 6), torch.randn(8, 4, 3, 3, 3)
    want = conv3d(x, weight)
    for other in (weight, weight.contiguous(memory_format=CHANNELS_LAST)):
        for same in (x, x.contiguous(memory_format=CHANNELS_LAST)):
            torch.testing.assert_close(conv3d(same, other), want)


def test_gradients_are_those_without_it() -> None:
    x, weight = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64), torch.randn(4, 3, 2, 2, 2, dtype=torch.float64)
    grads = []
    for match in (match_conv3d_input_format, lambda given, _: given):
        a = x.clone().requires_grad_()
        b = weight.clone(memory_format=CHANNELS_LAST).requires_grad_()
        conv3d(match(a, b), b).square().sum().backward()
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_no_graph_break_and_no_guard_on_sizes() -> None:
    weight = torch.randn(8, 4, 3, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def layer(x: torch.Tensor) -> torch.Tensor:
        return conv3d(match_conv3d_input_format(x, weight), weight)

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for shape in [(2, 4, 5, 6, 7), (3, 4, 4, 7, 8), (5, 4, 9, 6, 5), (7, 4, 6, 11, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    torch._dynamo.reset()
    x = torch.randn(2, 4, 3, 5, 6)
    for dim in (0, 2, 3, 4):
        torch._dynamo.decorators.mark_unbacked(x, dim)  # a guard on such a size is an error
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize(
    ("x", "weight", "name"),
    [((4, 3, 5, 6), (8, 4, 3, 3, 3), "input"), ((1, 4, 3, 5, 6), (8, 4, 3, 3), "weight")],
)
def test_another_rank_is_refused(x: tuple[int, ...], weight: tuple[int, ...], name: str) -> None:
    with pytest.raises(LayerError) as caught:
        match_conv3d_input_format(torch.randn(x), torch.randn(weight))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FxPatchError)
    shape = list(x if name == "input" else weight)
    assert str(caught.value).splitlines() == [
        f"The {name} of a Conv3d cannot be matched in its memory format.",
        f"  seen: {name} of shape {shape}",
        "  expected: five dimensions: input [N, C, T, H, W], weight [out, C, kT, kH, kW]",
        "  to do: give a single sample a batch of one: x.unsqueeze(0)",
    ]


def test_contiguous_for_collective() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    assert contiguous_for_collective(x) is x
    other = x.contiguous(memory_format=CHANNELS_LAST)
    assert contiguous_for_collective(other).is_contiguous()
    assert torch.equal(contiguous_for_collective(other[..., 1:]), x[..., 1:])


# -- CausalConv3d


@settings(max_examples=40)
@given(
    kernel=st.tuples(SIZE, SIZE, SIZE), stride=st.tuples(st.integers(1, 2), SIZE, SIZE),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2)),
    frames=st.integers(3, 5), cached=st.none() | st.integers(1, 3), last=st.booleans(),
)  # fmt: skip
def test_causal_conv_is_diffusers_own(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], frames: int, cached: int | None,
    last: bool,
) -> None:  # fmt: skip
    theirs = WanCausalConv3d(3, 4, kernel, stride, padding)
    ours = CausalConv3d(3, 4, kernel, stride, padding)
    ours.load_state_dict(theirs.state_dict())
    if last:
        ours.to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 3, frames, 5, 4)
    cache = None if cached is None else torch.randn(2, 3, cached, 5, 4)
    for layer in (ours, CausalConv3d.of(theirs), CausalConv3d.of(ours)):
        if last:  # the CPU has another kernel for a channels_last_3d input, which adds in another order
            torch.testing.assert_close(layer(x, cache), theirs(x, cache))
        else:
            assert torch.equal(layer(x, cache), theirs(x, cache))
        assert list(layer.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_causal_conv_in_other_dtypes(dtype: torch.dtype) -> None:
    theirs = WanCausalConv3d(4, 8, 3, padding=1).to(dtype)
    ours = CausalConv3d.of(theirs).to(memory_format=CHANNELS_LAST)
    x = torch.randn(1, 4, 3, 6, 6, dtype=dtype)
    torch.testing.assert_close(ours(x), copy.deepcopy(theirs).to(memory_format=torch.contiguous_format)(x))


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_chunks_give_the_whole_video(chunks: list[int]) -> None:
    conv = CausalConv3d(3, 4, 3, padding=1).to(memory_format=CHANNELS_LAST)
    video = torch.randn(1, 3, 4, 6, 8)
    seen, out = 0, []
    for frames in chunks:
        cache = video[:, :, max(seen - 2, 0) : seen] if seen else None
        out.append(conv(video[:, :, seen : seen + frames], cache))
        seen += frames
    torch.testing.assert_close(torch.cat(out, dim=2), conv(video))


def test_of_shares_parameters_and_mode() -> None:
    theirs = WanCausalConv3d(3, 4, (3, 1, 1), padding=(1, 0, 0)).eval()
    ours = CausalConv3d.of(theirs)
    assert ours.weight is theirs.weight
    assert ours.bias is theirs.bias
    assert not ours.training


def test_causal_conv_without_bias() -> None:
    theirs = WanCausalConv3d(3, 4, 3, padding=1)
    theirs.register_parameter("bias", None)
    ours, x = CausalConv3d.of(theirs), torch.randn(1, 3, 2, 5, 5)
    assert ours.bias is None
    assert torch.equal(ours(x), theirs(x))


def test_causal_conv_on_the_device(musa: str) -> None:
    conv = CausalConv3d(4, 8, 3, padding=1).to(memory_format=CHANNELS_LAST)
    x, cache = torch.randn(1, 4, 2, 6, 6), torch.randn(1, 4, 2, 6, 6)
    want = conv(x, cache)
    got = copy.deepcopy(conv).to(musa)(
        x.to(musa), cache
    )  # a cache on another device is brought over, as diffusers does
    assert got.device.type == musa
    torch.testing.assert_close(got.cpu(), want)


def test_causal_conv_compiles_whole() -> None:
    conv = CausalConv3d(4, 4, 3, padding=1).to(memory_format=CHANNELS_LAST)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True, dynamic=True)
    for height in (5, 6, 9):
        x, cache = torch.randn(2, 4, 3, height, 7), torch.randn(2, 4, 2, height, 7)
        torch.testing.assert_close(compiled(x, cache), conv(x, cache))


@pytest.mark.parametrize(
    ("cache", "dtype"),
    [
        ((1, 4, 2, 6, 6), torch.float32),
        ((2, 4, 2, 6, 5), torch.float32),
        ((2, 4, 6, 6), torch.float32),
        ((2, 4, 2, 6, 6), torch.bfloat16),
    ],
)
def test_a_cache_of_another_video_is_refused(cache: tuple[int, ...], dtype: torch.dtype) -> None:
    conv = CausalConv3d(4, 8, 3, padding=1)
    with pytest.raises(LayerError) as caught:
        conv(torch.randn(2, 4, 1, 6, 6), torch.randn(cache).to(dtype))
    assert caught.value.seen == f"cache_x {list(cache)} {dtype}, input [2, 4, 1, 6, 6] torch.float32"
    assert caught.value.hint == "start each video with cache_x=None"


def test_a_single_video_is_refused() -> None:
    """diffusers' layer would take it, and put the cache before its first row."""
    with pytest.raises(LayerError, match=r"seen: input of shape \[4, 2, 6, 6\]\n  expected: \[N, 4, T, H, W\]"):
        CausalConv3d(4, 8, 3, padding=1)(torch.randn(4, 2, 6, 6))


@pytest.mark.parametrize(
    "conv",
    [torch.nn.Conv3d(4, 8, 3, padding=1), torch.nn.Conv3d(4, 8, 3, groups=2), torch.nn.Conv3d(4, 8, 3, dilation=2)],
)
def test_a_layer_that_is_not_causal_is_refused(conv: torch.nn.Conv3d) -> None:
    with pytest.raises(
        LayerError, match="A Conv3d is not a causal convolution that CausalConv3d can take the place of"
    ):
        CausalConv3d.of(conv)


# -- conversions, counted


class ConvertsBack(CausalConv3d):
    """The first version of the seed's change: every output is made contiguous."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, cache_x).contiguous()


def count(stack: torch.nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), Conversions() as seen:
        stack(x)
    return seen.count


@pytest.mark.parametrize("depth", [1, 4])
def test_a_stack_converts_its_input_once(depth: int) -> None:
    """A batch of 16: there, torch's CPU convolution keeps channels_last_3d, as those of devices do."""
    x = torch.randn(16, 4, 2, 6, 6)
    torch.manual_seed(0)
    ours = in_channels_last(*[CausalConv3d(4, 4, 3, padding=1) for _ in range(depth)])
    back = in_channels_last(*[ConvertsBack(4, 4, 3, padding=1) for _ in range(depth)])
    back.load_state_dict(ours.state_dict())
    assert ours[0](x).is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(ours(x), back(x))
    assert count(ours, x) == 1
    assert count(ours, x.contiguous(memory_format=CHANNELS_LAST)) == 0
    assert count(back, x) == 2 * depth


class AsksContiguous(CausalConv3d):
    """The seed's question, to which a new 1x1x1 weight says yes."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if self.weight.is_contiguous(memory_format=CHANNELS_LAST):
            x = x.contiguous(memory_format=CHANNELS_LAST)
        return super().forward(x, cache_x)


def test_a_contiguous_stack_converts_nothing() -> None:
    x = torch.randn(16, 4, 2, 6, 6)
    for kind, conversions in ((CausalConv3d, 0), (AsksContiguous, 1)):
        assert count(torch.nn.Sequential(*[kind(4, 4, k, padding=k // 2) for k in (1, 3, 1)]), x) == conversions


def test_what_keeps_the_format_and_what_does_not() -> None:
    """Why a band of rows is padded, and then filled: joined to rows that a collective brought, it is contiguous."""
    x = torch.randn(1, 4, 2, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    rows = x[..., :1, :].contiguous()
    assert torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0)).is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.cat([x, x], dim=2).is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.cat([rows, x, rows], dim=3).is_contiguous()


def test_chunks_convert_once_each() -> None:
    conv = in_channels_last(CausalConv3d(4, 4, 3, padding=1))[0]
    x = torch.randn(16, 4, 1, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    with torch.no_grad(), Conversions() as seen:
        conv(x, torch.cat([x, x], dim=2))
    assert seen.count == 0


# -- diffusers' whole model


def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_all_convolutions_of_a_wan_vae() -> None:
    model, z = vae(), torch.randn(1, 4, 3, 4, 4)
    want, names = model.decode(z).sample, list(model.state_dict())
    replaced = replace_causal_convs(model)
    assert not [each for each in model.modules() if type(each) is WanCausalConv3d]
    assert len(replaced) == sum(isinstance(each, CausalConv3d) for each in model.modules())
    for each in model.modules():
        if isinstance(each, CausalConv3d):
            each.to(memory_format=CHANNELS_LAST)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.decode(z).sample, want)
    for name, original in replaced.items():
        model.set_submodule(name, original)
    torch.testing.assert_close(model.decode(z).sample, want)


def test_a_model_without_causal_convolutions_is_refused() -> None:
    with pytest.raises(LayerError, match="seen: Linear without a WanCausalConv3d"):
        replace_causal_convs(torch.nn.Linear(2, 2))
