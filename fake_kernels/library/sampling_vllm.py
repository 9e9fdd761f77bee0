"""vLLM's repetition penalty, and its choice of the tokens that sparse attention looks at.

All of them declare what they write, so that torch makes the fake itself; ours check what the kernels check. The two
`top_k_per_row_*` operators check nothing at all: they read `numRows` rows by the strides they are told, and a wrong
number is a read outside the tensor. So the references read that way too, by `as_strided`, which refuses.

Sources: vllm-project/vllm csrc/sampler.cu, in the state before `topK` became an argument (it was 2048); schemas of
0.33.0 from the wheel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = "vllm-project/vllm csrc/sampler.cu"


def _penalties(logits: Tensor, prompt_mask: Tensor, output_mask: Tensor, repetition_penalties: Tensor) -> None:
    if not all(t.is_contiguous() for t in (logits, prompt_mask, output_mask, repetition_penalties)):
        raise ValueError("all contiguous")
    penalty, values = repetition_penalties.float()[:, None], logits.float()
    repeated = prompt_mask | output_mask
    logits.copy_(torch.where(repeated, torch.where(values > 0, values / penalty, values * penalty), values))


def _penalties_arguments(draw: Draw) -> Call:
    dtype = draw.choice(*FLOATS)
    rows, vocabulary = draw.size(), draw.size()

    def mask() -> Tensor:
        return draw.integers(rows, vocabulary, low=0, high=2, dtype=torch.bool, layout="contiguous")

    logits = draw.floats(rows, vocabulary, dtype=dtype, layout="contiguous")
    penalties = draw.floats(rows, dtype=torch.float32, layout="contiguous").exp().to(dtype)
    return (logits, mask(), mask(), penalties), {}


def _not_contiguous(draw: Draw) -> Call:
    mask = torch.ones(3, 4, dtype=torch.bool, device=draw.device)
    logits = draw.floats(3, 4, dtype=torch.float32, layout="transposed")
    return (logits, mask, mask, torch.ones(3, device=draw.device)), {}


@fake_kernel(
    "_C::apply_repetition_penalties_(Tensor! logits, Tensor prompt_mask, Tensor output_mask, "
    "Tensor repetition_penalties) -> ()",
    reference=_penalties,
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=_penalties_arguments,
    refuses={"logits has to be contiguous": _not_contiguous},
)
def apply_repetition_penalties_(
    logits: Tensor, prompt_mask: Tensor, output_mask: Tensor, repetition_penalties: Tensor
) -> None:
    """Makes tokens that were seen less likely: positive logits divided by the penalty, the others multiplied.

    Args:
        logits: `[rows, vocabulary]`, float32, float16 or bfloat16. WRITTEN.
        prompt_mask, output_mask: bool, of the shape of `logits`. repetition_penalties: `[rows]`, dtype of `logits`.

    All contiguous.
    """
    tensors = {
        "logits": logits,
        "prompt_mask": prompt_mask,
        "output_mask": output_mask,
        "penalties": repetition_penalties,
    }
    for name, tensor in tensors.items():
        torch._check(tensor.is_contiguous(), lambda name=name: f"{name} has to be contiguous")


def _best(logits: Tensor, starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """Indices `[rows, count]`, from the row's start on; in order where they are all, otherwise the largest first."""
    place = torch.arange(max(count, logits.shape[1]), device=logits.device)
    start, length = starts.long()[:, None], (ends - starts).long()[:, None]
    padded = torch.nn.functional.pad(logits.float(), (0, len(place) - logits.shape[1]), value=float("-inf"))
    section = padded.gather(1, (place + start).clamp(max=len(place) - 1)).masked_fill(place >= length, float("-inf"))
    first = place[:count].expand(len(logits), -1)
    largest = section.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.where(length > count, largest, first).masked_fill(first >= length, -1)


def _prefill(
    logits: Tensor,
    rowStarts: Tensor,
    rowEnds: Tensor,
    indices: Tensor,
    numRows: int,
    stride0: int,
    stride1: int,
    topK: int,
) -> None:
    rows = logits.as_strided((numRows, logits.shape[1]), (stride0, stride1))
    indices.copy_(_best(rows, rowStarts, rowEnds, topK))


def _rows_arguments(draw: Draw) -> tuple[Tensor, Tensor, int, int]:
    count, rows, length = draw.choice(4, 2048), draw.choice(4, 2, 1), draw.choice(6, 3000)
    # contiguous: the strides are arguments too, and what copies the logits on the way does not change those
    logits = draw.floats(rows, length, dtype=torch.float32, layout="contiguous")
    return logits, torch.zeros(rows, count, dtype=torch.int32, device=draw.device), count, length


def _prefill_arguments(draw: Draw) -> Call:
    logits, indices, count, length = _rows_arguments(draw)
    rows = len(logits)
    starts = draw.integers(rows, low=0, high=length // 2, dtype=torch.int32, layout="contiguous")
    ends = draw.integers(rows, low=length // 2, high=length + 1, dtype=torch.int32, layout="contiguous")
    return (logits, starts, ends, indices, rows, *logits.stride(), count), {}


@fake_kernel(
    "_C::top_k_per_row_prefill(Tensor logits, Tensor rowStarts, Tensor rowEnds, Tensor! indices, int numRows, "
    "int stride0, int stride1, int topK) -> ()",
    reference=_prefill,
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=_prefill_arguments,
)
def top_k_per_row_prefill(
    logits: Tensor,
    rowStarts: Tensor,
    rowEnds: Tensor,
    indices: Tensor,
    numRows: int,
    stride0: int,
    stride1: int,
    topK: int,
) -> None:
    """Indices of the `topK` largest of each row from its start to its end, counted from its start; then -1.

    Args:
        logits: float32 `[numRows, length]` of strides `stride0` and `stride1`. rowStarts, rowEnds: int32 `[numRows]`.
        indices: int32 `[numRows, topK]`. WRITTEN, in no order that is promised.
    """


def _decode(
    logits: Tensor, next_n: int, seq_lens: Tensor, indices: Tensor, numRows: int, stride0: int, stride1: int, topK: int
) -> None:
    row = torch.arange(numRows, device=logits.device)
    ends = seq_lens.long()[row // next_n] - next_n + row % next_n + 1
    rows = logits.as_strided((numRows, logits.shape[1]), (stride0, stride1))
    indices.copy_(_best(rows, torch.zeros_like(ends), ends, topK))


def _decode_arguments(draw: Draw) -> Call:
    next_n = draw.choice(1, 2)
    logits, indices, count, length = _rows_arguments(draw)
    rows = len(logits)
    lengths = draw.integers(-(-rows // next_n), low=next_n, high=length + 1, dtype=torch.int32, layout="contiguous")
    return (logits, next_n, lengths, indices, rows, *logits.stride(), count), {}


@fake_kernel(
    "_C::top_k_per_row_decode(Tensor logits, int next_n, Tensor seq_lens, Tensor! indices, int numRows, int stride0, "
    "int stride1, int topK) -> ()",
    reference=_decode,
    source=_SOURCE,
    library="vllm._C_stable_libtorch",
    arguments=_decode_arguments,
)
def top_k_per_row_decode(
    logits: Tensor, next_n: int, seq_lens: Tensor, indices: Tensor, numRows: int, stride0: int, stride1: int, topK: int
) -> None:
    """As `top_k_per_row_prefill`, from 0, for `next_n` rows per sequence, of which each sees one token more.

    Args:
        seq_lens: int32 `[numRows / next_n]`: what a sequence's last row sees.
    """


KERNELS = (apply_repetition_penalties_, top_k_per_row_prefill, top_k_per_row_decode)
