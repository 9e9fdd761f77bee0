"""Ascend's attention for training, forward: `npu_fusion_attention`, and `npu_fusion_attention_v3`.

The first returns seed, offset and number of elements of its dropout mask as ints. A graph takes what a fake returns for
an int as a constant, so the traced backward would draw another mask than the forward: with `keep_prob` below 1 its fake
refuses. `v3` has them as tensors (on the host, unless it runs within a capture of a graph) and is the one to compile.
Without dropout the ints are not used; the kernel leaves seed and offset uninitialised then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel
from fake_kernels.library.attention_reference_npu import LAYOUTS, Options, attend, refuse_as_kernel

SOURCE = "Ascend/op-plugin op_plugin/ops/opapi/FlashAttentionKernelNpuOpApi.cpp"
_FOREVER = 2147483647


def _fusion(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = _FOREVER, next_tockens: int = _FOREVER, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: Tensor | None = None, dropout_mask: Tensor | None = None, seed: int = 0, offset: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    options = Options(head_num, input_layout.upper(), scale, keep_prob, pre_tockens, next_tockens, sparse_mode)
    refuse_as_kernel(input_layout, options, query, key, value)
    if softmax_layout not in ("", "TND") or (softmax_layout and input_layout != "TND"):
        raise ValueError(f"softmax_layout {softmax_layout!r} with {input_layout}")
    if keep_prob < 1:
        seed, offset = (int(each) for each in torch.randint(2**31, (2,)))
    found = attend(query, key, value, pse, atten_mask, sink, options, actual_seq_qlen, actual_seq_kvlen, seed, offset)
    return *found, query.new_empty(0), seed, offset, 0


def _fusion_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    *tensors, seed, offset, _ = _fusion(*args, **kwargs)
    return *tensors, torch.tensor([seed]), torch.tensor([offset])


def draw_attention(draw: Draw, ends_are_tensors: bool) -> tuple[list[Tensor], tuple[int, str], dict[str, Any]]:
    """Draws query, key and value; head_num and layout; and what else both directions take, by name."""
    dtype, layout, heads, shared = draw.choice(*FLOATS), draw.choice(*LAYOUTS), draw.choice(2, 3), draw.choice(1, 2)
    extras = {name: draw.flag() for name in ("pse", "shared", "sink")}
    mode, mask_kind = draw.choice(0, 0, 1, 2, 3, 4), draw.choice(None, "[S, S]", "[B, 1, S, S]", "[B, N, S, S]")
    mask_dtype = draw.choice(torch.bool, torch.uint8)
    given: dict[str, Any] = {"sparse_mode": mode, "scale": draw.choice(1.0, 0.25)}
    b, d, d2 = draw.sizes(3, least=1)
    s, s2 = draw.sizes(2, least=1)
    n = heads * shared
    if mode == 4:
        given |= {"pre_tokens": 1, "next_tokens": 1}
    if layout == "TND":
        ends = draw.choice((3,), (2, 6), (1, 4, 4)) if not ends_are_tensors else (s, s + s2)
        ends_of_keys = draw.choice(ends, tuple(2 * end for end in ends)) if not ends_are_tensors else ends
        s, s2 = ends[-1], ends_of_keys[-1]
        as_given = torch.tensor if ends_are_tensors else list
        given |= {"actual_seq_qlen": as_given(ends), "actual_seq_kvlen": as_given(ends_of_keys)}
        extras["pse"], mask_kind = False, None

    def shape(length: int, count: int, width: int) -> list[int]:
        sizes = {"B": b, "S": length, "T": length, "N": count, "D": width, "H": count * width}
        return [sizes[name] for name in layout]

    shapes = shape(s, n, d), shape(s2, heads, d), shape(s2, heads, d2)
    tensors = [draw.floats(*each, dtype=dtype) for each in shapes]
    if extras["pse"]:
        given["pse"] = draw.floats(1 if extras["shared"] else b, n, s, s2, dtype=dtype)
    if extras["sink"]:
        given["sink"] = draw.floats(n, dtype=torch.float32)
    if mask_kind and mode < 2:
        sizes = {"[S, S]": (s, s2), "[B, 1, S, S]": (b, 1, s, s2), "[B, N, S, S]": (b, n, s, s2)}[mask_kind]
        given["atten_mask"] = draw.placed((draw.floats(*sizes, dtype=torch.float32) > 0.5).to(mask_dtype))
    return tensors, (n, layout), given


def misspelt(given: dict[str, Any]) -> dict[str, Any]:
    """The names as the first and the third version of the operator have them."""
    return {name.replace("_tokens", "_tockens"): value for name, value in given.items()}


def _arguments(draw: Draw) -> Call:
    tensors, (heads, layout), given = draw_attention(draw, False)
    return (*tensors, heads, layout), misspelt(given)


def _arguments_v3(draw: Draw) -> Call:
    keep_prob = draw.choice(1.0, 0.5)
    tensors, (heads, layout), given = draw_attention(draw, True)
    return (*tensors, heads, layout), misspelt(given) | {"keep_prob": keep_prob}


def bad(layout: str = "BNSD", dims: int = 4, heads: int = 2, **kwargs: Any) -> Callable[[Draw], Call]:
    """Draws a call that is wrong in one place."""

    def call(draw: Draw) -> Call:
        x = draw.floats(*(1, 2, 3, 4, 5)[:dims], dtype=torch.float16)
        return (x, x, x, heads, layout), kwargs

    return call


REFUSES = {
    "input_layout should be one of": bad("BNDS"),
    "should have 4 dimensions": bad(dims=3),
    "head_num has to be positive": bad(heads=0),
    "keep_prob has to be in (0, 1]": bad(keep_prob=0.0),
    "sparse_mode has to be one of": bad(sparse_mode=7),
    "softmax_layout has to be": bad(softmax_layout="TND"),
}


def checked_layout(
    input_layout: str, head_num: int, keep_prob: float, sparse_mode: int, softmax_layout: str, **tensors: Tensor
) -> str:
    """The fakes' checks, with the kernel's conditions; the layout in capitals."""
    layout = input_layout.upper()
    torch._check(layout in LAYOUTS, lambda: f"input_layout should be one of {'/'.join(LAYOUTS)}, not {input_layout!r}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    torch._check(
        all(len(shape) == len(layout) for shape in shapes.values()),
        lambda: f"each of {', '.join(shapes)} should have {len(layout)} dimensions for {layout}, and they are {shapes}",
    )
    torch._check(head_num > 0, lambda: f"head_num has to be positive, and is {head_num}")
    torch._check(0 < keep_prob <= 1, lambda: f"keep_prob has to be in (0, 1], and is {keep_prob}")
    modes = (*range(5), 6, 7, 8) if input_layout == "TND" else tuple(range(7))
    torch._check(sparse_mode in modes, lambda: f"sparse_mode has to be one of {modes}, and is {sparse_mode}")
    torch._check(
        softmax_layout == "" or (softmax_layout == "TND" and input_layout == "TND"),
        lambda: f"softmax_layout has to be '', or TND for TND, and is {softmax_layout!r} for {input_layout}",
    )
    return layout


def forward_results(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str) -> list[Tensor]:
    """The fakes' output, maximum, sum, and the tensor without elements that stands for the probabilities."""
    if layout in ("BSH", "SBH"):
        heads_of_keys = key.shape[2] // (query.shape[2] // head_num)
        output = (query.shape[0], query.shape[1], head_num * (value.shape[2] // heads_of_keys))
    else:
        output = (*query.shape[:-1], value.shape[-1])
    if layout == "TND":
        rows = (*query.shape[:2], 8)
    else:
        rows = (query.shape[layout.index("B")], head_num, query.shape[layout.index("S")], 8)
    statistics = [query.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return [query.new_empty(output), *statistics, query.new_empty((0,))]


@fake_kernel(
    "npu::npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) '
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    reference=_fusion,
    source=f"{SOURCE} (npu_fusion_attention)",
    library="torch_npu",
    arguments=_arguments,
    refuses=REFUSES | {"have to be given for TND, equally many": bad("TND", 3)},
)
def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = _FOREVER, next_tockens: int = _FOREVER, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None, dropout_mask: Tensor | None = None,
    seed: int = 0, offset: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Attention: the output, each row's maximum and sum, no probabilities, and three ints (0 here).

    `query` in `input_layout` with `head_num` heads, `key` and `value` with as many or a divisor. Output: as the query,
    with the last dimension `D2` (`head_num * D2`) of the value, query's dtype, contiguous. Maximum and sum: float32
    `[B, N, S, 8]`, or `[T, N, 8]` for TND. The fourth is `[0]`. `dropout_mask`, `seed` and `offset` are newer than the
    version of the kernel that could be read.

    Raises:
        RuntimeError: what the kernel refuses; and `keep_prob` below 1, which only `npu_fusion_attention_v3` survives.
    """
    layout = checked_layout(
        input_layout, head_num, keep_prob, sparse_mode, softmax_layout, query=query, key=key, value=value
    )
    ends = [list(each or ()) for each in (actual_seq_qlen, actual_seq_kvlen)]
    torch._check(
        input_layout != "TND" or (len(ends[0]) == len(ends[1]) and len(ends[0]) > 0),
        lambda: f"actual_seq_qlen and actual_seq_kvlen have to be given for TND, equally many, and are {ends}",
    )
    refuse_dropout("npu_fusion_attention", keep_prob)
    return *forward_results(query, key, value, head_num, layout), 0, 0, 0


def refuse_dropout(operator: str, keep_prob: float) -> None:
    """`RuntimeError` where ints would tell which elements were dropped."""
    torch._check(
        keep_prob == 1,
        lambda: (
            f"{operator} cannot be traced with keep_prob={keep_prob}: its seed and offset are ints, which become "
            "constants of the graph, so that the backward would draw another dropout mask than the forward. Call "
            "npu_fusion_attention_v3, which has them as tensors, or keep this call out of compiled code"
        ),
    )


@fake_kernel(
    "npu::npu_fusion_attention_v3(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, SymInt[]? prefix=None, "
    "Tensor? actual_seq_qlen=None, Tensor? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_fusion_v3,
    source=f"{SOURCE} (npu_fusion_attention_v3_symint, dropout_gen_mask_tensor)",
    library="torch_npu",
    arguments=_arguments_v3,
    refuses=REFUSES | {"have to be given for TND, equally many": bad("TND", 3)},
)
def fusion_attention_v3(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = _FOREVER, next_tockens: int = _FOREVER, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Tensor | None = None, actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the first version, with seed and offset int64 `[1]` on the host, and the ends of the sequences as int64
    tensors on the host. Within a capture of a graph the kernel has seed and offset on the device, which no fake can
    know."""
    layout = checked_layout(
        input_layout, head_num, keep_prob, sparse_mode, softmax_layout, query=query, key=key, value=value
    )
    ends = (actual_seq_qlen, actual_seq_kvlen)
    if input_layout == "TND":
        torch._check(
            all(each is not None for each in ends) and ends[0].numel() == ends[1].numel(),  # type: ignore[union-attr]
            lambda: "actual_seq_qlen and actual_seq_kvlen have to be given for TND, equally many",
        )
    results = forward_results(query, key, value, head_num, layout)
    return *results, *(torch.empty((1,), dtype=torch.int64, device="cpu") for _ in range(2))


KERNELS = (fusion_attention, fusion_attention_v3)
