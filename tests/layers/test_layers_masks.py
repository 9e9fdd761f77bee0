"""Boolean masks against transformers' own for Gemma 2, counted kernels, rows that see nothing, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import fxpatch
from fxpatch.errors import LayerError
from fxpatch.layers.masks import causal_mask, check_padding_side, decoder_mask, padding_mask, sliding_window_mask

EXAMPLES = max(20, settings.default.max_examples // 20)
INFINITE = float("-inf")


class Kernels(TorchDispatchMode):
    """Counts dispatched operators that are no views: on a device each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def kernels(f: Callable[..., Tensor], *args: Any, **kwargs: Any) -> list[str]:
    with Kernels() as counted:
        f(*args, **kwargs)
    return sorted(counted.names.elements())


def gemma2(window: int, attention: str) -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8, vocab_size=8,
        intermediate_size=8, sliding_window=window, attn_implementation=attention,
    )  # fmt: skip


def of_transformers(window: int | None, padding: Tensor | None, batch: int, queries: int, cache: Any = None) -> Tensor:
    """Its mask as bool `[batch, 1, queries, keys]`, from its float one: that is never left out for `is_causal`."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    config = gemma2(window or 4096, "eager")
    return create(config, torch.empty(batch, queries, 8), padding, cache) == 0


def of_transformers_for_sdpa(window: int | None, padding: Tensor | None, batch: int, queries: int) -> Tensor | None:
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask: Tensor | None = create(gemma2(window or 4096, "sdpa"), torch.empty(batch, queries, 8), padding, None)
    return mask


def padded_batch(lengths: list[int], width: int, side: str) -> Tensor:
    columns = torch.arange(width)
    n = torch.tensor(lengths)[:, None]
    return columns < n if side == "right" else columns >= width - n


@settings(max_examples=EXAMPLES)
@given(
    data=st.data(),
    width=st.integers(1, 12),
    window=st.none() | st.integers(1, 14),
    side=st.sampled_from(["left", "right"]),
)
def test_equal_to_transformers_gemma2(data: st.DataObject, width: int, window: int | None, side: str) -> None:
    lengths = data.draw(st.none() | st.lists(st.integers(0, width), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.bool, torch.int64]))
    padding = None if lengths is None else padded_batch(lengths, width, side).to(dtype)
    mine = decoder_mask(width, window=window, padding=padding)
    assert mine.dtype is torch.bool
    assert mine.shape == ((width, width) if lengths is None else (len(lengths), 1, width, width))
    batch = 1 if lengths is None else len(lengths)
    assert torch.equal(mine.expand(batch, 1, -1, -1), of_transformers(window, padding, batch, width))
    for_sdpa = of_transformers_for_sdpa(window, padding, batch, width)
    if for_sdpa is None:  # it leaves the mask out where `is_causal` says the same
        assert torch.equal(mine.expand(batch, 1, -1, -1), causal_mask(width).expand(batch, 1, -1, -1))
    else:
        assert torch.equal(mine.expand(batch, 1, -1, -1), for_sdpa)
    if padding is not None:
        check_padding_side(padding, side)


@settings(max_examples=EXAMPLES)
@given(
    data=st.data(), seen=st.integers(0, 9), queries=st.integers(1, 5), window=st.none() | st.integers(1, 10),
    as_tensor=st.booleans(),
)  # fmt: skip
def test_equal_to_transformers_with_its_caches(
    data: st.DataObject, seen: int, queries: int, window: int | None, as_tensor: bool
) -> None:
    """Dynamic caches, the full one and the one that slides, after `seen` tokens; the offset as int and as tensor."""
    from transformers import DynamicCache

    total = seen + queries
    lengths = data.draw(st.none() | st.lists(st.integers(1, total), min_size=2, max_size=2))
    padding = None if lengths is None else padded_batch(lengths, total, "left")
    cache = DynamicCache(config=gemma2(window or 4096, "eager"))
    layer = 1 if window is None else 0  # Gemma 2's even layers slide
    if seen:
        for number in (0, 1):
            cache.update(torch.zeros(2, 1, seen, 8), torch.zeros(2, 1, seen, 8), number)
    keys, first_key = cache.get_mask_sizes(queries, layer)
    mine = decoder_mask(
        queries, keys, window=window, padding=padding, first_query=torch.tensor(seen) if as_tensor else seen,
        first_key=first_key,
    )  # fmt: skip
    assert torch.equal(mine.expand(2, 1, -1, -1), of_transformers(window, padding, 2, queries, cache))


@pytest.mark.parametrize("queries", [1, 3])
def test_equal_to_transformers_with_a_static_cache(queries: int) -> None:
    """Keys that are not written yet: their padding is False, and they lie behind every query."""
    from transformers import StaticCache

    cache = StaticCache(config=gemma2(64, "eager"), max_cache_len=8)
    for number in (0, 1):
        cache.update(torch.zeros(2, 1, 2, 8), torch.zeros(2, 1, 2, 8), number)
    padding = padded_batch([2 + queries, 1 + queries], 2 + queries, "left")
    theirs = of_transformers(None, padding, 2, queries, cache)
    whole = torch.nn.functional.pad(padding, (0, 6 - queries))
    offset = cache.get_query_offset(1)
    assert torch.equal(decoder_mask(queries, 8, padding=whole, first_query=offset), theirs)
    assert torch.equal(decoder_mask(queries, 8, padding=whole, first_query=2), theirs)


def of_the_seed(length: int, window: int | None, padding: Tensor | None) -> Tensor:
    """SGLang #24798, after the change, as it is in the seed."""
    mask = torch.tril(torch.ones((length, length), dtype=torch.bool))
    if window is not None:
        index = torch.arange(length)
        mask = mask.masked_fill(index[None, :] - index[:, None] > window, False)
    if padding is not None:
        mask = mask[None, None].expand(padding.shape[0], 1, length, length) & padding.to(torch.bool)[:, None, None, :]
    return mask


def float_of_the_seed(length: int, window: int | None, padding: Tensor | None) -> Tensor:
    """The same before the change: 0 and -inf, and here with the window's right sign."""
    mask = torch.zeros((length, length))
    mask = mask.masked_fill(torch.triu(torch.ones((length, length), dtype=torch.bool), diagonal=1), INFINITE)
    if window is not None:
        index = torch.arange(length)
        mask = mask.masked_fill(index[:, None] - index[None, :] >= window, INFINITE)
    if padding is not None:
        mask = mask[None, None].expand(padding.shape[0], 1, length, length)
        mask = mask.masked_fill(~padding[:, None, None, :], INFINITE)
    return mask


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_the_seeds_window_masks_nothing(window: int) -> None:
    length = 8
    causal = causal_mask(length)
    assert torch.equal(of_the_seed(length, window, None), causal)  # the distance has the wrong sign
    mine = sliding_window_mask(length, window)
    assert torch.equal(mine, of_transformers(window, None, 1, length)[0, 0])
    assert mine.sum(1).tolist() == [min(row + 1, window) for row in range(length)]
    assert not torch.equal(mine, causal)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_fewer_kernels_than_the_float_version(window: int | None, padded: bool) -> None:
    padding = padded_batch([5, 2], 5, "left") if padded else None
    mine = kernels(decoder_mask, 5, window=window, padding=padding)
    theirs = kernels(float_of_the_seed, 5, window, padding)
    want = ["aten.ones", "aten.tril"] + ["aten.triu"] * (window is not None) + ["aten.bitwise_and"] * padded
    assert mine == sorted(want)
    assert len(mine) <= len(theirs) - 1
    assert len(theirs) == (4 if window is None else 8) + 2 * padded, theirs
    assert torch.equal(decoder_mask(5, window=window, padding=padding), float_of_the_seed(5, window, padding) == 0)


def test_one_kernel_less_than_the_same_mask_made_float() -> None:
    """What models do that have the boolean mask: one more kernel to make it additive."""

    def additive() -> Tensor:
        return torch.zeros(()).masked_fill(~decoder_mask(5, window=2), INFINITE)

    assert len(kernels(decoder_mask, 5, window=2)) < len(kernels(additive))


def test_padding_is_a_view() -> None:
    padding = padded_batch([1, 3], 3, "right")
    assert kernels(padding_mask, padding) == []
    assert padding_mask(padding).data_ptr() == padding.data_ptr()
    assert torch.equal(padding_mask(padding.long() * 7), padding_mask(padding))


def boolean_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> Any:
    """An attention for transformers' models that takes boolean masks: Gemma 2's own adds its mask to the scores."""
    assert mask.dtype is torch.bool
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_gemma2_with_these_masks(musa: str, device: str, side: str) -> None:
    """The whole model: eager with its own float masks, ours with boolean ones, and each sequence alone."""
    from transformers import AttentionInterface, Gemma2Config, Gemma2Model

    AttentionInterface.register("boolean", boolean_attention)
    config = Gemma2Config(
        num_hidden_layers=3, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32,
        intermediate_size=16, sliding_window=3, attn_implementation="eager", attn_logit_softcapping=None,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2Model(config).eval().to(device)
    padding = padded_batch([7, 4, 1], 7, side).to(device)
    ids = torch.randint(3, 32, (3, 7)).to(device)
    places = (padding.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        theirs = model(ids, attention_mask=padding, position_ids=places, use_cache=False).last_hidden_state
        alone = [
            model(row[real][None], use_cache=False).last_hidden_state[0] for row, real in zip(ids, padding, strict=True)
        ]
        masks = {
            "full_attention": decoder_mask(7, padding=padding),
            "sliding_attention": decoder_mask(7, window=3, padding=padding),
        }
        model.set_attn_implementation("boolean")
        mine = model(ids, attention_mask=masks, position_ids=places, use_cache=False).last_hidden_state
    assert torch.isfinite(mine.cpu()).all()
    for row in range(3):
        for want in (theirs[row][padding[row]], alone[row]):
            torch.testing.assert_close(mine[row][padding[row]].cpu(), want.cpu(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- rows that see nothing


def left_padded() -> tuple[Tensor, Tensor]:
    padding = padded_batch([2, 4], 4, "left")
    return padding, torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=lambda b: b.name)
def test_torchs_attention_gives_zeros_for_rows_that_see_nothing(backend: SDPBackend) -> None:
    padding, x = left_padded()
    x.requires_grad_()
    mask = decoder_mask(4, padding=padding)
    assert mask[0, 0].any(1).tolist() == [False, False, True, True]
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(x, x, x, attn_mask=mask)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out[0, 0, :2], torch.zeros(2, 8))
    assert torch.isfinite(out).all()
    assert torch.isfinite(gradient).all()


def test_on_the_device_as_on_the_cpu(musa: str) -> None:
    padding, x = left_padded()
    want = decoder_mask(4, padding=padding, window=2)
    mask = decoder_mask(4, padding=padding.to(musa), window=2)
    assert mask.device.type == musa
    assert torch.equal(mask.cpu(), want)
    assert causal_mask(3, device=musa).device.type == musa
    on_device = x.to(musa)
    got = scaled_dot_product_attention(on_device, on_device, on_device, attn_mask=mask)
    torch.testing.assert_close(got.cpu(), scaled_dot_product_attention(x, x, x, attn_mask=want))


def test_sees_itself_keeps_nan_away_from_a_softmax_written_by_hand() -> None:
    padding, x = left_padded()

    def two_layers(mask: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            y = torch.softmax((y @ y.mT).masked_fill(~mask, INFINITE), -1) @ y
        return y

    keep = decoder_mask(4, padding=padding)
    filled = decoder_mask(4, padding=padding, sees_itself=True)
    assert torch.isnan(two_layers(keep)[0, 0, 2:]).any()  # weight 0 times NaN, in a real token's row
    assert torch.isfinite(two_layers(filled)).all()
    assert torch.equal(two_layers(filled)[1], two_layers(keep)[1])


@settings(max_examples=EXAMPLES)
@given(data=st.data(), width=st.integers(1, 9), window=st.none() | st.integers(1, 9), seen=st.integers(0, 3))
def test_sees_itself_changes_only_the_diagonal_of_padded_queries(
    data: st.DataObject, width: int, window: int | None, seen: int
) -> None:
    row = st.lists(st.booleans(), min_size=width + seen, max_size=width + seen)
    padding = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    kwargs: dict[str, Any] = {"window": window, "padding": padding, "first_query": seen}
    plain = decoder_mask(width, width + seen, **kwargs)
    mask = decoder_mask(width, width + seen, sees_itself=True, **kwargs)
    added = (mask & ~plain).nonzero()
    assert (plain & ~mask).sum() == 0
    assert mask.any(-1).all()
    assert all(key == query + seen and not padding[b, key] for b, _, query, key in added.tolist())


# ------------------------------------------------------------------------------------------------------ compile


def test_no_graph_break_and_dynamic_lengths() -> None:
    frames: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        frames.append(gm)
        return gm.forward

    def masks(padding: Tensor, x: Tensor) -> Tensor:
        mask = decoder_mask(x.shape[2], window=3, padding=padding, sees_itself=True)
        return scaled_dot_product_attention(x, x, x, attn_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(masks, backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 7, 12):
        padding = padded_batch([length, 2], length, "left")
        x = torch.randn(2, 2, length, 8)
        assert torch.equal(compiled(padding, x), masks(padding, x))
    assert len(frames) == 1


@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_no_graph_break_with_a_cache(kind: str) -> None:
    def masks(padding: Tensor, queries: int, first: int | Tensor) -> Tensor:
        return decoder_mask(queries, padding.shape[1], window=3, padding=padding, first_query=first)

    torch._dynamo.reset()
    compiled = torch.compile(masks, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries, first in ((2, 3), (4, 7), (3, 5)):
        padding = padded_batch([first + queries, 2], first + queries, "left")
        offset = first if kind == "int" else torch.tensor(first)
        assert torch.equal(compiled(padding, queries, offset), masks(padding, queries, first))


class Attends(torch.nn.Module):
    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mask = decoder_mask(x.shape[1], window=3, padding=padding)
        return scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


def test_in_captured_graphs(musa: str) -> None:
    """A runner pads to a captured size with zeros: in a padding mask, False. Then the mask excludes what it added."""
    runner = fxpatch.PiecewiseRunner(
        Attends(), dynamic={"x": 1, "padding": 1}, sizes=[4, 8], compiler="aot_eager", progress=False
    )
    cases = [
        (torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)), padded_batch([n, 2], n, "left"))
        for n in (3, 4, 5, 7, 8)
    ]
    with torch.no_grad():
        runner.prepare(*(each.to(musa) for each in cases[0]))
        for x, padding in cases:
            torch.testing.assert_close(runner(x.to(musa), padding.to(musa)).cpu(), Attends()(x, padding))
    assert runner.counts == {"captured": len(cases)}, (runner.counts, runner.report)


@pytest.mark.slow
def test_inductor() -> None:
    def masks(padding: Tensor) -> tuple[Tensor, Tensor]:
        length = padding.shape[1]
        return decoder_mask(length, window=3, padding=padding), decoder_mask(length, padding=padding, sees_itself=True)

    torch._dynamo.reset()
    compiled = torch.compile(masks, fullgraph=True, dynamic=True)
    for length in (4, 9):
        padding = padded_batch([length, 1], length, "left")
        for got, want in zip(compiled(padding), masks(padding), strict=True):
            assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------------------- bad input

REAL = torch.ones(2, 4, dtype=torch.bool)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "window 0": (lambda: sliding_window_mask(4, 0), "seen: window=0\n  expected: an int of at least 1"),
    "window -1": (lambda: decoder_mask(4, window=-1), "seen: window=-1\n  expected: an int of at least 1"),
    "window True": (lambda: decoder_mask(4, window=True), "seen: window=True\n"),
    "window 2.5": (lambda: decoder_mask(4, window=2.5), "seen: window=2.5\n"),  # type: ignore[arg-type]
    "rank 4": (lambda: padding_mask(REAL[:, None, None]), "seen: shape [2, 1, 1, 4]\n  expected: [batch, keys]"),
    "rank 1": (lambda: decoder_mask(4, padding=REAL[0]), "seen: shape [4]\n  expected: [batch, keys]"),
    "additive": (lambda: decoder_mask(4, padding=REAL.float()), "is it additive, 0 for real tokens and -inf"),
    "empty batch": (lambda: decoder_mask(4, padding=REAL[:0]), "There is no mask for an empty batch."),
    "no tokens": (lambda: causal_mask(0), "seen: 0 queries, 0 keys\n  expected: at least one of each"),
    "short": (lambda: decoder_mask(5, padding=REAL), "seen: 4 columns\n  expected: 5, of position 0 to the last key's"),
    "new token": (
        lambda: decoder_mask(1, 5, padding=REAL, first_query=4),
        "with a KV cache it covers the cached tokens and the new ones",
    ),
    "behind the keys": (
        lambda: causal_mask(2, 4, first_query=3),
        "seen: queries at 3 to 4, keys at 0 to 3\n  expected: 0 <= first_key <= first_query, and no query behind",
    ),
    "before the keys": (lambda: causal_mask(2, 4, first_key=2), "seen: queries at 0 to 1, keys at 2 to 5"),
    "offset per row": (
        lambda: causal_mask(2, 4, first_query=torch.tensor([1, 2])),
        "seen: torch.int64 of shape [2]\n  expected: an int, or an int64 tensor without dimensions",
    ),
    "two devices": (lambda: decoder_mask(4, padding=REAL, device="meta"), "seen: padding on cpu, device=meta"),
    "side": (lambda: check_padding_side(REAL, "middle"), "seen: 'middle'\n  expected: 'left' or 'right'"),
    "left, has to be right": (
        lambda: check_padding_side(padded_batch([4, 2], 4, "left"), "right"),
        "Padding has to be on the right.\n  seen: row 1: ..xx (x is a real token)\n  expected: xx...... padding",
    ),
    "right, has to be left": (
        lambda: check_padding_side(padded_batch([1, 4], 4, "right"), "left"),
        "Padding has to be on the left.\n  seen: row 0: x... (x is a real token)\n  expected: padding ......xx\n"
        "  to do: tokenize with padding_side='left', or give the attention a full mask",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert_refused(*REFUSED[name])


def test_a_hole_is_on_neither_side() -> None:
    hole = torch.tensor([[True, False, True]])
    for side in ("left", "right"):
        with pytest.raises(LayerError, match=r"seen: row 0: x\.x "):
            check_padding_side(hole, side)
