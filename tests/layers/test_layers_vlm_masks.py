"""Ragged batches to a model and back: round trips, what each device's model gets, and that real tokens come out right
with each mask, against every sequence computed alone (torch's attention, and CANN's formulas for the fused one)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fake_kernels import Registry
from fake_kernels.declare import declare
from fake_kernels.library import load
from fake_kernels.library.attention_reference_npu import Options, attend
from fxpatch.errors import LayerError
from fxpatch.layers.masks import causal_mask, decoder_mask
from fxpatch.layers.npu_masks import LAYOUTS, check_npu_mask, choose_mask, compressed_mask, npu_attention_mask
from fxpatch.layers.vlm_masks import EngineBatch, alignment, lengths_mask, postprocess, preprocess

EXAMPLES = max(20, settings.default.max_examples // 20)
PAD = 2
FOREVER = 2147483647

ragged = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=5).filter(any)  # PAD is among them
layouts = st.sampled_from(["bshd", "thd"])


def nested(rows: list[Any], device: str = "cpu") -> Tensor:
    return torch.nested.nested_tensor(
        [torch.as_tensor(row, dtype=torch.int64) for row in rows], layout=torch.jagged, device=device
    )


# ---------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_alignment(tp: int, cp: int) -> None:
    def fits(n: int) -> bool:
        return n % tp == 0 and (cp == 1 or n % (2 * cp) == 0)

    def splits(n: int) -> bool:  # a context-parallel rank's two equal pieces, each among tensor-parallel ranks
        return fits(n) and (cp == 1 or (n // cp % 2 == 0 and n // cp // 2 % tp == 0))

    numbers = range(1, 2 * tp * cp + 1)
    assert alignment(tp, cp) == min(filter(fits, numbers))
    assert alignment(tp, cp, sequence_parallel=True) == min(filter(splits, numbers))


def test_lcm_is_too_little_for_sequence_parallelism() -> None:
    assert alignment(4, 2) == 4
    assert (4 // 2) % 4 != 0  # tokens of a context-parallel rank, among 4 tensor-parallel ranks
    assert alignment(4, 2, sequence_parallel=True) == 16


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), align=st.integers(1, 6))
@settings(max_examples=EXAMPLES)
def test_lengths_mask(lengths: list[int], align: int) -> None:
    mask = lengths_mask(lengths, align)
    assert mask.dtype is torch.bool
    assert mask.tolist() == [[column < n for column in range(mask.shape[1])] for n in lengths]
    assert mask.shape[1] == math.ceil(max(lengths) / align) * align


# --------------------------------------------------------------------------------------------------- round trip


@given(
    rows=ragged,
    layout=layouts,
    align=st.integers(1, 6),
    width=st.none() | st.integers(1, 3),
    given_lengths=st.booleans(),
)
@settings(max_examples=2 * EXAMPLES)
def test_round_trip(rows: list[list[int]], layout: Any, align: int, width: int | None, given_lengths: bool) -> None:
    sequences = [torch.tensor(row, dtype=torch.int64) for row in rows]
    if width is not None:
        sequences = [each[:, None].expand(-1, width) + torch.arange(width) for each in sequences]
    if given_lengths:
        batch = preprocess(
            torch.cat(sequences),
            lengths=torch.tensor([len(row) for row in rows]),
            layout=layout,
            pad_token=PAD,
            align=align,
        )
    else:
        batch = preprocess(nested(sequences), layout=layout, pad_token=PAD, align=align)
    back = postprocess(batch.input_ids, batch)
    assert back.layout is torch.jagged
    assert len(back.unbind()) == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(back.unbind(), sequences, strict=True))
    check_batch(batch, sequences, layout, align)


def check_batch(batch: EngineBatch, sequences: list[Tensor], layout: str, align: int) -> None:
    """The record, said again in loops."""
    up = [math.ceil(len(each) / align) * align for each in sequences]
    rows = [max(up)] * len(up) if layout == "bshd" else up
    padded = [[*each.tolist(), *[(each[:1] * 0 + PAD).squeeze(0).tolist()] * (n - len(each))] if len(each) else None
              for each, n in zip(sequences, rows, strict=True)]  # fmt: skip
    flat = batch.input_ids.flatten(0, 1).tolist()
    start = 0
    for number, row in enumerate(padded):
        if row is not None:
            assert flat[start : start + rows[number]] == row
        n = len(sequences[number])
        places = slice(start, start + rows[number])
        assert batch.real_tokens.flatten()[places].tolist() == [i < n for i in range(rows[number])]
        assert batch.position_ids.flatten()[places].tolist() == list(range(rows[number]))
        if layout == "thd":
            assert batch.cu_seqlens is not None
            assert batch.ends is not None
            assert batch.cu_seqlens[number : number + 2].tolist() == [start, start + rows[number]]
            assert batch.ends[number] == start + rows[number]
        start += rows[number]
    assert start == len(flat)
    assert batch.input_ids.shape[:2] == ((len(rows), max(up)) if layout == "bshd" else (1, sum(up)))
    assert batch.real_tokens.shape == batch.position_ids.shape == batch.input_ids.shape[:2]
    assert batch.lengths == tuple(len(each) for each in sequences)
    assert batch.max_length == max(rows)
    if layout == "thd":
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype is torch.int32


@given(rows=ragged, align=st.integers(1, 4))
@settings(max_examples=EXAMPLES)
def test_padded_as_torch_pads(rows: list[list[int]], align: int) -> None:
    tokens = nested(rows)
    batch = preprocess(tokens, pad_token=PAD, align=align)
    size = tuple(batch.input_ids.shape)
    assert torch.equal(batch.input_ids, torch.nested.to_padded_tensor(tokens, PAD, output_size=size))
    assert torch.equal(batch.real_tokens, lengths_mask(batch.lengths, align))


def test_a_pad_token_within_a_sequence_is_real() -> None:
    batch = preprocess(nested([[PAD, 1, PAD], [PAD]]), pad_token=PAD)
    assert batch.real_tokens.tolist() == [[True, True, True], [True, False, False]]
    assert [each.tolist() for each in postprocess(batch.input_ids, batch).unbind()] == [[PAD, 1, PAD], [PAD]]


def test_holes_in_a_nested_tensor() -> None:
    """Where upstream looks, `offsets().diff()`, lengths are too long."""
    tokens = torch.nested.narrow(
        torch.arange(20).view(2, 10), 1, torch.tensor([0, 2]), torch.tensor([3, 4]), layout=torch.jagged
    )
    assert tokens.offsets().diff().tolist() != [3, 4]
    batch = preprocess(tokens, pad_token=PAD)
    assert batch.lengths == (3, 4)
    assert batch.input_ids.tolist() == [[0, 1, 2, PAD], [12, 13, 14, 15]]


@pytest.mark.parametrize("layout", ["bshd", "thd"])
@pytest.mark.parametrize("how", ["nested", "lengths"])
def test_gradients_flow_through(how: str, layout: Any) -> None:
    values = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(4, 4)
    if how == "nested":
        tokens = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 4, 6]))
        batch = preprocess(tokens, layout=layout, align=4)
    else:
        batch = preprocess(values, lengths=[3, 1, 2], layout=layout, align=4)
    out = postprocess((batch.input_ids @ weight).tanh(), batch)
    (got,) = torch.autograd.grad(out.values().sum(), values)
    (want,) = torch.autograd.grad((values @ weight).tanh().sum(), values)
    torch.testing.assert_close(got, want)


def test_another_default_device(musa: str) -> None:
    with torch.device(musa):
        batch = preprocess(nested([[1, 2], [3]]), align=2)
    assert {each.device.type for each in (batch.input_ids, batch.position_ids, batch.real_tokens)} == {"cpu"}


def test_the_record_is_frozen() -> None:
    batch = preprocess(nested([[1], [1, 2]]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.attention_mask = None  # type: ignore[misc]


# ---------------------------------------------------------------------------------------- what the model gets


def test_on_musa_the_model_gets_the_2d_mask(musa: str) -> None:
    tokens = nested([[1, 2, 3], [1]], musa)
    batch = preprocess(tokens, align=2)
    assert batch.attention_mask is not None
    assert torch.equal(batch.attention_mask, batch.real_tokens)
    assert {each.device.type for each in (batch.input_ids, batch.position_ids, batch.real_tokens)} == {musa}
    back = postprocess(batch.input_ids, batch)
    assert back.device.type == musa
    assert [each.tolist() for each in back.unbind()] == [[1, 2, 3], [1]]
    packed = preprocess(tokens, layout="thd", align=2)
    assert packed.attention_mask is None
    assert packed.cu_seqlens is not None
    assert packed.cu_seqlens.device.type == musa
    assert [each.tolist() for each in postprocess(packed.input_ids, packed).unbind()] == [[1, 2, 3], [1]]


def test_on_npu_the_model_gets_no_mask_and_the_2d_mask_is_kept(fresh: Callable[..., str]) -> None:
    out = fresh(
        """
        import torch, fxpatch
        from fxpatch.layers.vlm_masks import postprocess, preprocess
        fxpatch.simulate("npu")
        rows = [torch.tensor([1, 0, 3]), torch.tensor([1])]
        tokens = torch.nested.nested_tensor(rows, layout=torch.jagged, device="npu")
        for kwargs in ({}, {"layout": "thd"}, {"causal": False}, {"mask": "B1SS"}, {"mask": "compressed"},
                       {"mask": "BNSS", "heads": 3}, {"mask": "SS"}, {"mask": "11SS"}):
            batch = preprocess(tokens, **kwargs)
            mask = batch.attention_mask
            back = postprocess(batch.input_ids, batch)
            assert [each.tolist() for each in back.unbind()] == [[1, 0, 3], [1]] and back.device.type == "npu"
            print(kwargs, None if mask is None else (mask.device.type, mask.dtype, list(mask.shape)), batch.sparse_mode,
                  batch.real_tokens.tolist())
        """
    ).splitlines()
    padded, packed = "[[True, True, True], [True, False, False]]", "[[True, True, True, True]]"
    assert out == [
        f"{{}} None 0 {padded}",
        f"{{'layout': 'thd'}} None 0 {packed}",
        f"{{'causal': False}} ('npu', torch.bool, [2, 1, 3, 3]) 0 {padded}",
        f"{{'mask': 'B1SS'}} ('npu', torch.bool, [2, 1, 3, 3]) 0 {padded}",
        f"{{'mask': 'compressed'}} ('npu', torch.bool, [2048, 2048]) 2 {padded}",
        f"{{'mask': 'BNSS', 'heads': 3}} ('npu', torch.bool, [2, 3, 3, 3]) 0 {padded}",
        f"{{'mask': 'SS'}} ('npu', torch.bool, [3, 3]) 0 {padded}",
        f"{{'mask': '11SS'}} ('npu', torch.bool, [1, 1, 3, 3]) 0 {padded}",
    ]


@pytest.mark.parametrize(
    ("layout", "device", "causal", "padded", "want"),
    [
        ("bshd", "npu", True, True, "none"),
        ("bshd", "npu", False, False, "none"),
        ("bshd", "npu", False, True, "B1SS"),
        ("thd", "npu", True, True, "none"),
        ("thd", "npu", False, True, "B1SS"),
        ("bshd", "musa", True, True, "2d"),
        ("bshd", "cuda", False, True, "2d"),
        ("thd", "cpu", True, True, "none"),
        ("thd", "cpu", False, True, "4d"),
        ("thd", "xpu", False, False, "none"),
    ],
)
def test_what_auto_is(layout: str, device: str, causal: bool, padded: bool, want: str) -> None:
    assert choose_mask("auto", layout, device, causal=causal, padded=padded) == want


HEADS, WIDTH = 2, 4


def alone(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence `[n, heads, width]`, by torch."""
    out = scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in (q, k, v)), is_causal=causal)
    return out[0].transpose(0, 1)


def fused(q: Tensor, k: Tensor, v: Tensor, batch: EngineBatch, ends: tuple[int, ...] | None = None) -> Tensor:
    """`npu_fusion_attention` by CANN's formulas, on `[B, S, heads, width]`, or as TND where there are ends."""
    layout = "BSND" if ends is None else "TND"
    options = Options(HEADS, layout, WIDTH**-0.5, 1.0, FOREVER, FOREVER, batch.sparse_mode)
    if ends is not None:
        q, k, v = (each[0] for each in (q, k, v))
    out = attend(q, k, v, None, batch.attention_mask, None, options, ends, ends, 0, 0)[0]
    return out if ends is None else out[None]


KINDS = ["4d", "B1SS", "BNSS", "SS", "11SS", "compressed", "none"]


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any),
    layout=layouts,
    align=st.integers(1, 3),
    causal=st.booleans(),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=3 * EXAMPLES)
def test_real_tokens_come_out_as_alone(lengths: list[int], layout: Any, align: int, causal: bool, kind: Any) -> None:
    """Any mask that is given is right; one that cannot be is refused."""
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, HEADS, WIDTH, generator=generator)
    if kind in ("compressed", "none") and layout == "thd" and 0 in lengths:
        lengths = [n for n in lengths if n]  # CANN's formulas have no rows for an empty sequence of a packed batch
    up = [math.ceil(n / align) * align for n in lengths]
    padded = up != lengths if layout == "thd" else any(n != max(up) for n in lengths)
    cannot = (
        (kind == "compressed" and not causal)
        or (kind == "none" and not causal and padded)
        or (kind in ("SS", "11SS") and layout == "bshd" and not causal and len(set(lengths)) > 1 and max(up) > 1)
    )
    if cannot:
        with pytest.raises(LayerError):
            preprocess(qkv, lengths=lengths, layout=layout, align=align, causal=causal, mask=kind, heads=HEADS)
        return
    batch = preprocess(qkv, lengths=lengths, layout=layout, align=align, causal=causal, mask=kind, heads=HEADS)
    q, k, v = batch.input_ids.unbind(2)
    if kind in LAYOUTS:
        check_npu_mask(batch.attention_mask, 0, batch=q.shape[0], heads=HEADS, queries=q.shape[1], keys=q.shape[1])
        out = fused(q, k, v, batch)
    elif kind == "4d":
        out = scaled_dot_product_attention(
            *(each.transpose(1, 2) for each in (q, k, v)), attn_mask=batch.attention_mask
        ).transpose(1, 2)
    elif kind == "compressed" or (kind == "none" and layout == "thd" and not causal):
        out = fused(q, k, v, batch, batch.ends)
    elif layout == "thd":
        assert batch.cu_seqlens is not None
        pieces = batch.cu_seqlens.diff().tolist()
        parts = [torch.split(each[0], pieces) for each in (q, k, v)]
        out = torch.cat([alone(*part, causal) for part in zip(*parts, strict=True)])[None]
    else:
        out = scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), is_causal=causal)
        out = out.transpose(1, 2)
    for got, want in zip(postprocess(out, batch).unbind(), torch.split(qkv, lengths), strict=True):
        if len(want):
            torch.testing.assert_close(got, alone(*want.unbind(1), causal))


def test_the_2d_mask_makes_the_model_right() -> None:
    lengths = [4, 1, 3]
    qkv = torch.randn(8, 3, HEADS, WIDTH)
    batch = preprocess(qkv, lengths=lengths, align=4)
    q, k, v = (each.transpose(1, 2) for each in batch.input_ids.unbind(2))
    mask = decoder_mask(4, padding=batch.attention_mask)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    for got, want in zip(postprocess(out, batch).unbind(), torch.split(qkv, lengths), strict=True):
        torch.testing.assert_close(got, alone(*want.unbind(1), True))


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, npu: dict[str, Any], **_: Any
) -> Any:
    """What transformers calls: `npu_fusion_attention` with the batch's mask, `[B, heads, S, width]` in."""
    assert mask is None
    masked = npu["atten_mask"]
    sizes = {"batch": query.shape[0], "heads": query.shape[1], "queries": query.shape[2], "keys": key.shape[2]}
    check_npu_mask(masked, npu["sparse_mode"], **sizes)
    out = torch.ops.npu.npu_fusion_attention(query, key, value, query.shape[1], "BNSD", scale=scaling, **npu)[0]
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize(
    ("layout", "kind", "compiled"),
    [
        ("bshd", "B1SS", False),
        ("bshd", "B1SS", True),
        ("bshd", "BNSS", False),
        ("bshd", "11SS", False),
        ("bshd", "SS", False),
        ("bshd", "compressed", False),
        ("bshd", "compressed", True),
        ("thd", "B1SS", False),
        ("thd", "11SS", False),
        ("thd", "SS", True),
    ],
)
def test_qwen2_vl_on_the_fused_attention(musa: str, layout: Any, kind: Any, compiled: bool) -> None:
    """The operator with its real schema and CANN's formulas as its kernel, in transformers' model; and its fake one."""
    from transformers import AttentionInterface, Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    AttentionInterface.register("fused", fused_attention)
    config = Qwen2VLTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLTextModel(config).eval()
    sequences = [torch.randint(0, 32, (n,)) for n in (5, 1, 3)]
    with torch.no_grad():
        want = [model(each[None], use_cache=False).last_hidden_state[0] for each in sequences]
    model.to(musa).set_attn_implementation("fused")
    batch = preprocess(nested(sequences, musa), layout=layout, mask=kind, heads=4, align=4)
    (record,) = (each for each in load(["attention"]) if each.op == "npu::npu_fusion_attention")

    def run(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        npu = {"atten_mask": mask, "sparse_mode": batch.sparse_mode}
        out: Tensor = model(ids, position_ids=positions, use_cache=False, npu=npu).last_hidden_state
        return out

    with declare([record.schema], {record.op: record.reference}), torch.no_grad():
        registry = Registry([record] if compiled else [])
        registry.settle()
        torch._dynamo.reset()
        step = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
        try:
            got = postprocess(step(batch.input_ids, batch.position_ids, batch.attention_mask), batch)
        finally:
            registry.undo()
    for mine, theirs in zip(got.unbind(), want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- Ascend's masks


def test_true_is_masked_out() -> None:
    visible = causal_mask(3)
    assert npu_attention_mask(visible, "SS").tolist() == [[False, True, True], [False, False, True], [False] * 3]
    triangle = compressed_mask()
    assert triangle.shape == (2048, 2048)
    assert triangle.dtype is torch.bool
    rows, columns = torch.meshgrid(torch.arange(2048), torch.arange(2048), indexing="ij")
    assert torch.equal(triangle, columns > rows)
    assert torch.equal(triangle[:3, :3], npu_attention_mask(visible, "SS"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", ["all", "sequence", "head"])
def test_layouts(layout: Any, per: str) -> None:
    visible = torch.rand({"all": (3, 5), "sequence": (2, 1, 3, 5), "head": (2, 4, 3, 5)}[per]) > 0.5
    fits = {"all": LAYOUTS, "sequence": ("BNSS", "B1SS"), "head": ("BNSS",)}[per]
    if layout not in fits:
        with pytest.raises(LayerError, match="is one mask for"):
            npu_attention_mask(visible, layout, heads=4)
        return
    mask = npu_attention_mask(visible, layout, heads=4)
    batch = 2 if per != "all" else 1
    check_npu_mask(mask, 0, batch=batch, heads=4, queries=3, keys=5)
    assert mask.is_contiguous()
    assert torch.equal(mask.expand(batch, 4, 3, 5), (~visible).expand(batch, 4, 3, 5))


SIZES: dict[str, Any] = {"batch": 2, "heads": 3, "queries": 4, "keys": 4}
REAL = torch.ones(2, 4, dtype=torch.bool)
JAGGED = torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(1, 4)], layout=torch.jagged)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "layout of a batch": (lambda: preprocess(JAGGED, layout="sbhd"), "seen: 'sbhd'\n  expected: 'bshd' or 'thd'"),  # type: ignore[arg-type]
    "layout of a mask": (
        lambda: npu_attention_mask(causal_mask(4), "BS"),  # type: ignore[arg-type]
        "seen: 'BS'\n  expected: BNSS, B1SS, 11SS, SS\n  to do: [batch, keys] is none of them: B1SS says the same",
    ),
    "rank": (
        lambda: npu_attention_mask(REAL[:, None], "B1SS"),
        "seen: torch.bool of shape [2, 1, 4]\n  expected: bool [queries, keys] or [batch, 1 or heads, queries, keys]",
    ),
    "dtype": (lambda: npu_attention_mask(torch.zeros(4, 4), "SS"), "seen: torch.float32 of shape [4, 4]"),
    "no heads": (lambda: npu_attention_mask(causal_mask(4), "BNSS"), "seen: heads=None, a mask of shape [4, 4]"),
    "[B, S]": (
        lambda: check_npu_mask(REAL, 0, **SIZES),
        "seen: torch.bool of shape [2, 4]\n"
        "  expected: bool or uint8 of shape [2, 3, 4, 4] or [2, 1, 4, 4] or [1, 1, 4, 4] or [4, 4]",
    ),
    "full mask, compressed mode": (
        lambda: check_npu_mask(causal_mask(4), 2, **SIZES),
        "with sparse_mode=2.\n  seen: torch.bool of shape [4, 4]\n  expected: bool or uint8 of shape [2048, 2048]\n"
        "  to do: compressed_mask() makes it",
    ),
    "no mask, compressed mode": (lambda: check_npu_mask(None, 3, **SIZES), "with sparse_mode=3.\n  seen: none"),
    "float mask": (lambda: check_npu_mask(torch.zeros(4, 4), 0, **SIZES), "seen: torch.float32 of shape [4, 4]"),
    "mode": (lambda: check_npu_mask(None, 6, **SIZES), "seen: sparse_mode=6\n  expected: 0 to 4"),
    "ranks": (lambda: alignment(0, 2), "seen: tp=0, cp=2\n  expected: 1 or more"),
    "align": (lambda: preprocess(JAGGED, align=0), "seen: align=0\n  expected: 1 or more"),
    "empty batch": (lambda: lengths_mask([]), "seen: lengths []\n  expected: at least one sequence, and one token"),
    "no tokens": (lambda: preprocess(torch.zeros(0), lengths=[0, 0]), "seen: lengths [0, 0]"),
    "float lengths": (
        lambda: lengths_mask(torch.tensor([1.0, 2.0])),
        "seen: [1.0, 2.0]\n  expected: ints, or an integer tensor of one dimension\n  to do: cumulative lengths: pass",
    ),
    "one length": (lambda: preprocess(torch.zeros(3), lengths=torch.tensor(3)), "seen: 3\n  expected: ints"),
    "negative": (lambda: preprocess(torch.zeros(1), lengths=[2, -1]), "seen: lengths [2, -1]"),
    "sum": (lambda: preprocess(torch.zeros(4), lengths=[2, 3]), "seen: [4], [2, 3]\n  expected: one dimension of sum"),
    "both": (lambda: preprocess(JAGGED, lengths=[3, 1]), "seen: a nested tensor and lengths"),
    "dense": (lambda: preprocess(REAL), "seen: a dense tensor of layout torch.strided"),
    "ragged elsewhere": (
        lambda: preprocess(JAGGED.transpose(1, 2)),
        "The second dimension of a ragged batch is the ragged one.",
    ),
    "unknown mask": (lambda: preprocess(JAGGED, mask="3d"), "seen: '3d'\n  expected: auto, none, 2d, 4d, compressed"),  # type: ignore[arg-type]
    "none, not causal": (
        lambda: preprocess(JAGGED, mask="none", causal=False),
        "Without a mask, tokens of this model would see the padding.",
    ),
    "2d, packed": (
        lambda: preprocess(JAGGED, mask="2d", layout="thd"),
        "A 2-D mask of packed sequences cannot keep them apart.",
    ),
    "2d on npu": (
        lambda: choose_mask("2d", "bshd", "npu", causal=True, padded=True),
        "seen: mask='2d' on npu\n  expected: 'none' or one of BNSS, B1SS, 11SS, SS\n  to do: for a model that makes a "
        "mask of it by itself, pass it the batch's real_tokens",
    ),
    "compressed, not causal": (
        lambda: preprocess(JAGGED, mask="compressed", causal=False),
        "seen: causal=False\n  expected: a causal model",
    ),
    "SS, not causal": (
        lambda: preprocess(JAGGED, mask="SS", causal=False),
        "SS is one mask for the whole batch.\n  seen: shape [2, 1, 3, 3]\n  expected: [1, 1, queries, keys]\n"
        "  to do: use B1SS: sequences are padded differently",
    ),
    "other output": (
        lambda: postprocess(torch.zeros(2, 5, 7), preprocess(JAGGED)),
        "seen: [2, 5] on cpu\n  expected: [2, 3] on cpu\n  to do: with context parallelism gather the ranks' pieces",
    ),
    "other device": (
        lambda: postprocess(torch.zeros(2, 3, device="meta"), preprocess(JAGGED)),
        "seen: [2, 3] on meta\n  expected: [2, 3] on cpu",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert_refused(*REFUSED[name])


def test_a_strided_nested_tensor_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once per process that these are a prototype
        strided = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)])
    with pytest.raises(LayerError, match=r"seen: a nested tensor of layout torch\.strided"):
        preprocess(strided)
