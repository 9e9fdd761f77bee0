"""The height over ranks: two and three gloo processes compute what one does, bit for bit, and refuse together.

The ranks run Python source of these tests. `bits` makes numbers whose sums are exact in fp32, so that equality is about
rows and not about the order in which a kernel adds them; the Wan models are compared with ordinary numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from fxpatch.errors import LayerError
from fxpatch.layers.causal_conv3d import CausalConv3d
from fxpatch.layers.height_parallel import HeightParallel, gather_and_trim_height, rows_of_ranks
from fxpatch.layers.height_parallel_convs import HeightParallelCausalConv3d, HeightParallelConv2d, split_over_height

_PRELUDE = """
import datetime, json, os, sys, time, warnings
import torch, torch.distributed as dist
from fxpatch.errors import LayerError
from fxpatch.layers import height_parallel as hp, height_parallel_convs as convs
from fxpatch.layers.causal_conv3d import CausalConv3d
from fxpatch.layers.height_parallel import HeightParallel, gather_and_trim_height
from fxpatch.layers.height_parallel_convs import HeightParallelCausalConv3d, HeightParallelConv2d, split_over_height

warnings.simplefilter("error")
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LAST = torch.channels_last_3d
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=os.environ["STORE"], rank=RANK, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
)

def bits(*shape, seed=0):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()

def exact(layer):
    with torch.no_grad():
        for i, each in enumerate(layer.parameters()):
            each.copy_(bits(*each.shape, seed=i + 1))
    return layer
"""


def on_ranks(code: str, folder: Path, world: int = 2, timeout: float = 200) -> list:
    """The last line that each rank printed, from JSON."""
    printed = ranks.on_ranks(code, folder / "store", world, timeout, _PRELUDE)
    return [json.loads(out.splitlines()[-1]) for out in printed]


# -- layers


@pytest.mark.slow
def test_convolutions_equal_one_process(tmp_path: Path) -> None:
    told = on_ranks(
        """
        wrong, tried, without_halo = [], 0, 0
        with torch.no_grad():
            for height in (12, 13, 14):
                for kernel, stride, padding in [
                    (3, 1, 1), ((3, 1, 1), 1, (1, 0, 0)), (1, 1, 0), ((1, 5, 3), 1, (0, 2, 1)),
                    ((3, 3, 3), (1, 2, 2), 1), ((3, 2, 1), (2, 2, 1), (1, 0, 0)), ((2, 4, 2), (1, 2, 1), (1, 1, 1)),
                ]:
                    for last in (False, True):
                        for cached in (0, 1, 2, 3):
                            whole = exact(CausalConv3d(3, 4, kernel, stride, padding))
                            if last:
                                whole.to(memory_format=LAST)
                            split = HeightParallel(unit=whole.stride[1], uneven=True)
                            if height % whole.stride[1]:
                                continue
                            layer = HeightParallelCausalConv3d.of(whole).join(split)
                            x = bits(2, 3, 4, height, 6)
                            cache = bits(2, 3, cached, height, 6, seed=9) if cached else None
                            own = split.split(x)
                            got = layer(own, None if cache is None else split.own(cache))
                            tried += 1
                            if not torch.equal(split.gather(got), whole(x, cache)):
                                wrong.append([height, str(kernel), last, cached])
            for height in (12, 14):
                for kernel, stride, padding, rows in [
                    (3, 1, 1, None), (1, 1, 0, None), (3, 2, 0, (0, 1)), (5, 1, 2, None),
                ]:
                    whole = exact(torch.nn.Conv2d(3, 4, kernel, stride, padding))
                    split = HeightParallel(unit=stride, uneven=True)
                    layer, x = HeightParallelConv2d(whole, split, rows), bits(2, 3, height, 7)
                    want = whole(torch.nn.functional.pad(x, (0, 0, *(rows or (0, 0)))))
                    tried += 1
                    if not torch.equal(split.gather(layer(split.split(x))), want):
                        wrong.append([height, kernel, stride])
            for height in range(3, 10):
                for shape in [(height, 2), (2, height, 3), (2, 3, 2, height, 1)]:
                    for kind in (torch.float, torch.bool, torch.int64, torch.bfloat16):
                        split, x = HeightParallel(uneven=True), bits(*shape).to(kind)
                        if not torch.equal(split.gather(split.split(x)), x):
                            wrong.append([shape, str(kind)])
            convs.exchange_halo = lambda *_, **__: (None, None)
            split, x = HeightParallel(uneven=True), bits(2, 3, 4, 12, 6)
            whole = exact(CausalConv3d(3, 4, 3, 1, 1))
            layer = HeightParallelCausalConv3d.of(whole).join(split)
            without = torch.equal(split.gather(layer(split.split(x))), whole(x))
        print(json.dumps({"wrong": wrong, "tried": tried, "without halo": without}))
        """,
        tmp_path,
        world=3,
    )
    assert told == [{"wrong": [], "tried": 18 * 8 + 8, "without halo": False}] * 3


_LAYERS = """
def counts():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        conversions = collectives = not_contiguous = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.clone.default and out.shape == SHAPE and out.stride() != args[0].stride():
                self.conversions += 1
            if func.namespace == "_c10d_functional" and func.__name__.startswith("all_"):
                self.collectives += 1
                self.not_contiguous += not args[0].is_contiguous()
            return out

    copies = []

    def counted(x):
        out = plain(x)
        copies.append(out is not x)
        return out

    plain, hp.contiguous_for_collective = hp.contiguous_for_collective, counted

    DEPTH, SHAPE = 3, (16, 4, 4, 6, 8)  # of a padded band: 2 frames and 2 in front, 4 rows and 2, 6 columns and 2
    whole = torch.nn.Sequential(*[exact(CausalConv3d(4, 4, 3, padding=1)) for _ in range(DEPTH)])
    whole.to(memory_format=LAST)
    split = HeightParallel()
    stack = torch.nn.Sequential(*[HeightParallelCausalConv3d.of(each).join(split) for each in whole])
    x = bits(16, 4, 2, 8, 6) / 4
    with torch.no_grad(), Watch() as watch:
        bands = stack(split.split(x))
        before = [watch.conversions, watch.collectives, sum(copies)]
        got = split.gather(bands)
    hp.contiguous_for_collective = plain
    return {
        "before the gather": before, "collectives": watch.collectives, "copies": sum(copies),
        "not contiguous": watch.not_contiguous, "bands": bands.is_contiguous(memory_format=LAST),
        "gathered": got.is_contiguous(), "equal": torch.allclose(got, whole(x)),
    }

def gradients():
    whole, other = exact(CausalConv3d(3, 4, 3, padding=1)), exact(CausalConv3d(3, 4, 3, padding=1))
    split = HeightParallel(uneven=True)
    layer = HeightParallelCausalConv3d.of(other).join(split)
    a = bits(1, 3, 2, 9, 5, seed=1)
    weigh = bits(1, 4, 2, 9, 5, seed=3)
    b = a.clone().requires_grad_()
    a.requires_grad_()
    (whole(a) * weigh).sum().backward()
    (layer(split.split(b)) * split.own(weigh)).sum().backward()
    for grad in (b.grad, other.weight.grad, other.bias.grad):
        dist.all_reduce(grad)
    right = [torch.equal(a.grad, b.grad), torch.equal(whole.weight.grad, other.weight.grad)]

    def model(x):
        return split.gather(layer(split.split(x)))

    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for height in (9, 12):
            x = bits(1, 3, 2, height, 5, seed=height)
            right.append(torch.equal(compiled(x), whole(x)))
    return right

def formats():
    x = bits(2, 3, 2, 4, 2, seed=RANK)
    all_x = [bits(2, 3, 2, 4, 2, seed=rank) for rank in range(WORLD)]
    mine = x.contiguous(memory_format=LAST) if RANK == 0 else x  # the same elements, in another order in memory

    def tells(make):
        def broadcast(t):
            t = t.clone()
            dist.broadcast(t, 0)
            return torch.equal(t, all_x[0])
        def all_reduce(t):
            t = t.clone()
            dist.all_reduce(t)
            return torch.equal(t, sum(all_x))
        def all_to_all(t):
            out = torch.empty_like(x)
            dist.all_to_all_single(out, t)
            return torch.equal(out, torch.stack([each[RANK] for each in all_x]))
        def scatter(t):
            out = torch.empty_like(x)
            dist.scatter(out, [t, t] if RANK == 0 else None, 0)
            return torch.equal(out, all_x[0])
        def reduce_scatter(t):
            out = torch.empty(1, *x.shape[1:])
            (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(out, t)  # renamed in 2.13
            return torch.equal(out, sum(all_x)[RANK : RANK + 1])
        def all_gather(t):
            out = [torch.empty_like(x) for _ in all_x]
            dist.all_gather(out, t)
            return all(map(torch.equal, out, all_x))
        calls = (broadcast, all_reduce, all_to_all, scatter, reduce_scatter, all_gather)
        return {each.__name__: each(make(mine)) for each in calls}

    def send():
        try:
            dist.send(mine, 1)
        except RuntimeError as error:
            return str(error)

    def refused(call):
        try:
            call()
        except LayerError as error:
            return error.seen
        return "not refused"

    even, uneven = HeightParallel(), HeightParallel(uneven=True)
    seven = HeightParallelCausalConv3d.of(CausalConv3d(3, 4, (1, 7, 1), padding=(0, 3, 0))).join(uneven)
    halved = HeightParallelCausalConv3d.of(CausalConv3d(3, 4, (1, 3, 1), (1, 2, 1), (0, 1, 0))).join(uneven)
    return {
        "send": send() if RANK == 0 else None,
        "as they are": tells(lambda t: t), "contiguous": tells(hp.contiguous_for_collective),
        "odd": refused(lambda: even.split(bits(1, 3, 1, 5, 2))),
        "few": refused(lambda: uneven.split(bits(1, 3, 1, 1, 2))),
        "low": refused(lambda: seven(uneven.split(bits(1, 3, 1, 5, 2)))),  # 3 rows are enough, 2 are not
        "halved": refused(lambda: halved(uneven.split(bits(1, 3, 1, 6, 2)))),
        "gather": refused(lambda: gather_and_trim_height(bits(1, 3, 1, 3, 2), [2, 2])),
    }

print(json.dumps({each.__name__: each() for each in (counts, gradients, formats)}))
"""


@pytest.fixture(scope="module")
def two_ranks_told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(_LAYERS, tmp_path_factory.mktemp("layers"))


@pytest.mark.slow
def test_one_contiguous_copy_before_each_collective_and_one_conversion_in_all(two_ranks_told: list[dict]) -> None:
    """A batch of 16: there, torch's CPU convolution keeps channels_last_3d, as those of devices do."""
    told = [each["counts"] for each in two_ranks_told]
    assert told == [
        {
            "before the gather": [1, 3, 2], "collectives": 4, "copies": 3, "not contiguous": 0, "bands": True,
            "gathered": True, "equal": True,
        }
    ] * 2  # fmt: skip
    # the first layer's rows are contiguous, since the input is: one copy less than collectives


@pytest.mark.slow
def test_gradients_and_compiling(two_ranks_told: list[dict]) -> None:
    told = [each["gradients"] for each in two_ranks_told]
    assert told == [[True] * 4] * 2


@pytest.mark.slow
def test_what_goes_wrong_without_contiguous_and_that_all_ranks_refuse_together(two_ranks_told: list[dict]) -> None:
    told = [each["formats"] for each in two_ranks_told]
    for rank in told:
        assert rank["as they are"]["all_gather"]
        assert all(rank["contiguous"].values())
        assert rank["odd"] == "height 5, 2 ranks"
        assert rank["few"] == "height 1, 2 ranks"
        assert rank["low"] == "rows [3, 2], kernel 7, stride 1"
        assert rank["halved"] == "rows [3, 3], kernel 3, stride 2"
    for call in ("broadcast", "all_reduce", "all_to_all", "scatter", "reduce_scatter"):  # and no error, on either rank
        assert not all(rank["as they are"][call] for rank in told), call
    assert told[0]["send"] == "input tensor has to be contiguous"
    assert told[1]["gather"] == "3 rows on rank 1 of 2, rows [2, 2]"


# -- diffusers' Wan models

_WAN = """
from diffusers import AutoencoderKLWan

def vae(residual, last=True):
    torch.manual_seed(0)
    more = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2, decoder_base_dim=8) if residual else {}
    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **more,
    ).eval().requires_grad_(False)
    for each in model.modules():
        if last and isinstance(each, torch.nn.Conv3d):
            each.to(memory_format=LAST)
    return model

def latents(height, width=8):
    return torch.randn(1, 4, 3, height, width, generator=torch.Generator().manual_seed(height))
"""


_ALL_OF_IT = """
bits_equal, far = {}, {}
for residual in (False, True):
    for last in (False, True):
        model, z = vae(residual, last), latents(8)
        names = list(model.state_dict())
        want = model.decode(z).sample
        undo = split_over_height(model.decoder, HeightParallel())
        got = model.decode(z).sample
        bits_equal[f"decode {residual} {last}"] = torch.equal(got, want) and bool(want.std() > 0.1)
        bits_equal[f"names {residual} {last}"] = names == list(model.state_dict())
        undo()
        bits_equal[f"undone {residual} {last}"] = torch.equal(model.decode(z).sample, want) and not any(
            isinstance(each, (HeightParallelCausalConv3d, HeightParallelConv2d)) for each in model.modules()
        )
        want = model.encode(got).latent_dist.mode()
        split_over_height(model.encoder, HeightParallel(unit=4))
        bits_equal[f"encode {residual} {last}"] = torch.equal(model.encode(got).latent_dist.mode(), want)

    model, z = vae(residual), latents(7)
    want = model.decode(z).sample
    undo = split_over_height(model.decoder, HeightParallel(uneven=True))
    far[f"uneven {residual}"] = float((model.decode(z).sample - want).abs().max())
    undo()
    split_over_height(model.decoder, HeightParallel())
    padded = model.decode(torch.nn.functional.pad(z, (0, 0, 0, 1))).sample[..., : want.shape[-2], :]
    far[f"padded {residual}"] = float((padded - want).abs().max())
    try:
        model.decode(z)
    except LayerError as error:
        far[f"refused {residual}"] = error.hint
print(json.dumps([bits_equal, far]))
"""


@pytest.fixture(scope="module")
def wan_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    return on_ranks(_WAN + _ALL_OF_IT, tmp_path_factory.mktemp("wan"))


@pytest.mark.slow
def test_a_wan_vae_on_two_ranks_equals_one_bit_for_bit(wan_on_two_ranks: list[list[dict]]) -> None:
    for bits_equal, _ in wan_on_two_ranks:
        assert len(bits_equal) == 16
        assert all(bits_equal.values()), bits_equal


@pytest.mark.slow
def test_heights_that_do_not_divide(wan_on_two_ranks: list[list[dict]]) -> None:
    """Bands of different heights are right; padding the height and trimming at the end, as sglang does, is not."""
    for _, far in wan_on_two_ranks:
        for residual in (False, True):
            assert far[f"uneven {residual}"] < 1e-5
            assert far[f"padded {residual}"] > 1e-3
            assert far[f"refused {residual}"].startswith("use HeightParallel(uneven=True)")


# -- messages, without ranks


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@settings(max_examples=100)
@given(world=st.integers(1, 9), unit=st.integers(1, 8), height=st.integers(1, 200))
def test_rows_make_up_the_height(world: int, unit: int, height: int) -> None:
    for uneven in (False, True):
        try:
            rows = rows_of_ranks(height, world, unit=unit, uneven=uneven)
        except LayerError:
            assert height % unit or height < world * unit or (height % (world * unit) and not uneven)
            continue
        assert sum(rows) == height
        assert len(rows) == world
        assert all(each % unit == 0 and each > 0 for each in rows)
        assert max(rows) - min(rows) <= (unit if uneven else 0)
        assert list(rows) == sorted(rows, reverse=True)


def test_world_size_that_does_not_divide() -> None:
    with pytest.raises(LayerError) as caught:
        rows_of_ranks(90, 4)
    assert str(caught.value).splitlines() == [
        "A world size that does not divide the height cannot share it.",
        "  seen: height 90, 4 ranks",
        "  expected: a multiple of 4",
        "  to do: use HeightParallel(uneven=True), which gives the upper ranks more rows, or another number of ranks",
    ]
    with pytest.raises(LayerError, match=r"seen: height 90, 2 ranks, units of 8 rows\n  expected: a multiple of 16\n"):
        rows_of_ranks(90, 2, unit=8)
    with pytest.raises(LayerError, match=r"expected: a multiple of 1, 4 at least\n  to do: use fewer ranks"):
        rows_of_ranks(3, 4, uneven=True)
    with pytest.raises(
        LayerError, match=r"expected: a multiple of 8, 16 at least\n  to do: make the height a multiple"
    ):
        rows_of_ranks(90, 2, unit=8, uneven=True)


@pytest.mark.parametrize("unit", [0, -2, 1.0, True])
def test_units_are_rows(unit: object) -> None:
    with pytest.raises(LayerError, match=rf"seen: unit={unit!r}\n  expected: a number of rows, 1 or more"):
        HeightParallel(unit=unit)  # type: ignore[arg-type]


def test_no_process_group() -> None:
    with pytest.raises(LayerError, match=r"seen: torch.distributed is not initialized\n(.|\n)*torchrun"):
        HeightParallel()


@pytest.mark.usefixtures("two_ranks")
def test_bad_calls() -> None:
    split = HeightParallel()
    with pytest.raises(LayerError, match="seen: 4 rows, where the ranks' bands began with no split"):
        split.own(torch.randn(1, 1, 1, 4, 4))
    split.split(torch.randn(1, 1, 1, 8, 4))
    with pytest.raises(LayerError, match=r"seen: 7 rows, where the ranks' bands began with \[4, 4\]"):
        split.own(torch.randn(1, 1, 1, 7, 4))
    assert split.rows_at(2) == (2, 2)
    with pytest.raises(LayerError, match=r"seen: 3 rows on rank 0 of 2, rows \[3, 3, 3\]"):
        gather_and_trim_height(torch.randn(1, 3, 2), [3, 3, 3])
    with pytest.raises(LayerError, match="seen: Linear"):
        split_over_height(torch.nn.Linear(2, 2), split)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("conv", "seen"),
    [
        (torch.nn.Conv2d(2, 2, 3), "kernel 3, stride 1, 0 rows of padding above and 0 below"),
        (torch.nn.Conv2d(2, 2, 3, padding=2), "kernel 3, stride 1, 2 rows of padding above and 2 below"),
        (torch.nn.Conv2d(2, 2, 3, 2), "kernel 3, stride 2, 0 rows of padding above and 0 below"),
    ],
)
def test_a_convolution_that_bands_do_not_follow(conv: torch.nn.Conv2d, seen: str) -> None:
    with pytest.raises(LayerError) as caught:
        HeightParallelConv2d(conv, HeightParallel())
    assert caught.value.seen == seen
    assert caught.value.hint == "gather the height before this layer: HeightParallel.gather"


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("conv", "seen"),
    [
        (torch.nn.Conv2d(2, 2, 3, padding=2, dilation=2), "dilation"),
        (torch.nn.Conv2d(2, 2, 3, padding=1, groups=2), "groups 2"),
        (torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (torch.nn.Conv2d(2, 2, 3, padding="same"), "padding 'same'"),
    ],
)
def test_a_conv2d_of_another_kind_is_refused(conv: torch.nn.Conv2d, seen: str) -> None:
    with pytest.raises(LayerError, match=seen):
        HeightParallelConv2d(conv, HeightParallel())


@pytest.mark.usefixtures("two_ranks")
def test_a_model_is_split_once() -> None:
    model = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    undo = split_over_height(model.decoder, HeightParallel())
    with pytest.raises(LayerError, match="This model is split over its height already"):
        split_over_height(model.decoder, HeightParallel())
    undo()
    split_over_height(model.decoder, HeightParallel())


@pytest.mark.usefixtures("two_ranks")
def test_shared_parameters() -> None:
    conv = CausalConv3d(2, 2, 3, padding=1).eval()
    layer = HeightParallelCausalConv3d.of(conv).join(HeightParallel())
    assert layer.weight is conv.weight
    assert not layer.training
    flat = torch.nn.Conv2d(2, 2, 3, padding=1).eval()
    other = HeightParallelConv2d(flat, layer.band.parallel)
    assert other.weight is flat.weight
    assert list(other.state_dict()) == list(flat.state_dict())
    assert not other.training
