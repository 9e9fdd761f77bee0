"""Ascend's token permutation for training: tokens copied expert by expert, and summed back, with their gradients.

The numbers of rows are symbols, and `num_out_tokens` is an `int` of the schema: their minimum is `torch.sym_min`, with
which one graph serves any number of tokens.

Sources: Ascend/op-plugin op_plugin/utils/KernelNpuOutputSize.cpp (npu_moe_token_*_out_size) and op_plugin/ops/opapi
(the file that defines npu_moe_token_unpermute and the two v2 gradients), all of the padded mode excepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fake_kernels.drawing import FLOATS, Draw
from fake_kernels.kernel import Call, fake_kernel

_SIZES = "Ascend/op-plugin op_plugin/utils/KernelNpuOutputSize.cpp"
_GRADS = "Ascend/op-plugin op_plugin/ops/opapi ({})"


def _check_dims(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, dims) in tensors.items():
        if tensor is not None:
            seen, wanted = tensor.dim(), " or ".join(map(str, dims))
            torch._check(seen in dims, lambda n=name, s=seen, w=wanted: f"{n} has to have {w} dimensions, not {s}")


def _check_mode(padded_mode: bool) -> None:
    torch._check(not padded_mode, lambda: "padded_mode is not described here: its sizes were not read")


def _permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    if tokens.dim() != 2 or indices.dim() not in (1, 2) or padded_mode:
        raise ValueError("tokens [tokens, hidden], and the experts of each")
    pairs = indices.reshape(-1)
    order = pairs.argsort(stable=True)
    wanted = num_out_tokens or 0
    kept = order[:wanted] if wanted > 0 else order[: len(pairs) + wanted]
    copied = tokens[kept // (indices.shape[1] if indices.dim() == 2 else 1)] if len(pairs) else tokens[kept]
    return copied.contiguous(), order.argsort().to(torch.int32)


def _permute_arguments(draw: Draw) -> Call:
    dtype, index, places = draw.choice(*FLOATS), draw.choice(torch.int64, torch.int32), draw.choice(2, None, 1)
    count = draw.choice(None, 0, 3, 100, -1)
    tokens = draw.size(least=1)
    x = draw.floats(tokens, draw.size(), dtype=dtype)
    experts = draw.integers(*((tokens,) if places is None else (tokens, places)), low=0, high=4, dtype=index)
    return (x, experts), {"num_out_tokens": count}


@fake_kernel(
    "npu::npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False) "
    "-> (Tensor, Tensor)",
    reference=_permute,
    source=_SIZES,
    library="torch_npu",
    arguments=_permute_arguments,
    refuses={
        "tokens has to have 2 dimensions": lambda draw: (
            (draw.floats(2, 3, 4, dtype=torch.float32), draw.integers(2, 2, low=0, high=2)),
            {},
        ),
        "indices has to have 1 or 2 dimensions": lambda draw: (
            (draw.floats(2, 3, dtype=torch.float32), draw.integers(2, 2, 2, low=0, high=2)),
            {},
        ),
        "padded_mode is not described": lambda draw: (
            (draw.floats(2, 3, dtype=torch.float32), draw.integers(2, 2, low=0, high=2)),
            {"padded_mode": True},
        ),
    },
)
def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """A row of `tokens` per (token, expert) pair, sorted by expert.

    Args:
        tokens: `[tokens, hidden]`, float32, float16 or bfloat16.
        indices: experts `[tokens]` or `[tokens, k]`.
        num_out_tokens: how many rows stay; if not positive, how many more than all (so fewer).

    Returns the rows `[kept, hidden]` of the dtype of `tokens`, and where each pair went, int32 `[tokens * k]`, of all
    pairs also when rows are left out. Both contiguous.
    """
    _check_dims(tokens=(tokens, (2,)), indices=(indices, (1, 2)))
    _check_mode(padded_mode)
    pairs, wanted = indices.numel(), num_out_tokens or 0
    kept = torch.sym_min(wanted, pairs) if wanted > 0 else pairs + wanted
    return tokens.new_empty((kept, tokens.shape[1])), tokens.new_empty((pairs,), dtype=torch.int32)


def _permute_grad(
    grad_permuted_tokens: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,
    padded_mode: bool = False,
) -> Tensor:
    if grad_permuted_tokens.dim() != 2 or sorted_indices.dim() != 1 or padded_mode:
        raise ValueError("the gradient of permuted rows, and where each pair went")
    grad = grad_permuted_tokens.float()
    grad = torch.cat((grad, grad.new_zeros(1, grad.shape[1])))  # pairs that were left out
    rows = sorted_indices.long().clamp(max=len(grad) - 1).view(tokens_size_0, num_topK)
    return grad[rows].sum(1).to(tokens_dtype)


def _grad_arguments(draw: Draw) -> Call:
    dtype, to, left_out = draw.choice(*FLOATS), draw.choice(*FLOATS), draw.choice(0, 1)
    tokens, places = draw.size(least=2), draw.size(least=2, most=4)
    grad = draw.floats(tokens * places - left_out, draw.size(), dtype=dtype)
    return (grad, draw.permutation(tokens * places, dtype=torch.int32), tokens, to, places), {}


@fake_kernel(
    "npu::npu_moe_token_permute_grad_v2(Tensor grad_permuted_tokens, Tensor sorted_indices, SymInt tokens_size_0, "
    "ScalarType tokens_dtype, SymInt num_topK, bool padded_mode=False) -> Tensor",
    reference=_permute_grad,
    source=_GRADS.format("npu_moe_token_permute_grad_v2_symint"),
    library="torch_npu",
    arguments=_grad_arguments,
    refuses={
        "grad_permuted_tokens has to have 2": lambda draw: (
            (draw.floats(4, dtype=torch.float32), draw.permutation(4), 2, torch.float32, 2),
            {},
        ),
        "sorted_indices has to have 1": lambda draw: (
            (draw.floats(4, 3, dtype=torch.float32), draw.permutation(4).view(2, 2), 2, torch.float32, 2),
            {},
        ),
    },
)
def token_permute_grad_v2(
    grad_permuted_tokens: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,
    padded_mode: bool = False,
) -> Tensor:
    """The gradient of the tokens of `npu_moe_token_permute`: for each token, the sum over its `num_topK` rows.

    Args:
        grad_permuted_tokens: `[kept, hidden]`. sorted_indices: `[tokens_size_0 * num_topK]`, as permuting returned it.

    Returns `[tokens_size_0, hidden]` of `tokens_dtype`, contiguous.
    """
    _check_dims(grad_permuted_tokens=(grad_permuted_tokens, (2,)), sorted_indices=(sorted_indices, (1,)))
    _check_mode(padded_mode)
    return grad_permuted_tokens.new_empty((tokens_size_0, grad_permuted_tokens.shape[1]), dtype=tokens_dtype)


def _unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    if permuted_tokens.dim() != 2 or sorted_indices.dim() != 1 or padded_mode:
        raise ValueError("permuted rows, and where each pair went")
    if probs is not None and probs.dim() != 2:
        raise ValueError("a probability per pair, [tokens, k]")
    rows = torch.cat((permuted_tokens, permuted_tokens.new_zeros(1, permuted_tokens.shape[1]))).float()
    places = 1 if probs is None else probs.shape[1]
    where = sorted_indices.long().clamp(max=len(rows) - 1).view(len(sorted_indices) // places, places)
    weights = torch.ones_like(where, dtype=torch.float32) if probs is None else probs.float()
    return (rows[where] * weights[..., None]).sum(1).to(permuted_tokens.dtype)


def _unpermute_arguments(draw: Draw) -> Call:
    dtype, left_out, with_probs = draw.choice(*FLOATS), draw.choice(0, 1), draw.choice(True, False)
    kind, shape = draw.choice(*FLOATS), draw.choice(None, [1])
    tokens, places = draw.size(least=1), draw.size(least=1, most=4) if with_probs else 1
    rows = draw.floats(tokens * places - left_out, draw.size(), dtype=dtype)
    probs = draw.floats(tokens, places, dtype=kind) if with_probs else None
    return (rows, draw.permutation(tokens * places, dtype=torch.int32), probs), {"restore_shape": shape}


@fake_kernel(
    "npu::npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, "
    "bool padded_mode=False, int[]? restore_shape=None) -> Tensor",
    reference=_unpermute,
    source=_SIZES,
    library="torch_npu",
    arguments=_unpermute_arguments,
    refuses={
        "permuted_tokens has to have 2": lambda draw: ((draw.floats(4, dtype=torch.float32), draw.permutation(4)), {}),
        "sorted_indices has to have 1": lambda draw: (
            (draw.floats(4, 3, dtype=torch.float32), draw.permutation(4).view(2, 2)),
            {},
        ),
        "probs has to have 2": lambda draw: (
            (draw.floats(4, 3, dtype=torch.float32), draw.permutation(4), draw.floats(4, dtype=torch.float32)),
            {},
        ),
    },
)
def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """The rows of each token summed, weighted with `probs`: `[pairs // k, hidden]`, dtype of the rows, contiguous.

    Args:
        permuted_tokens: `[kept, hidden]`. sorted_indices: int32 `[pairs]`; beyond `kept`: the row was left out.
        probs: `[tokens, k]`; without, `k` is 1. restore_shape: counts in the padded mode only.
    """
    tensors = {
        "permuted_tokens": (permuted_tokens, (2,)),
        "sorted_indices": (sorted_indices, (1,)),
        "probs": (probs, (2,)),
    }
    _check_dims(**tensors)
    _check_mode(padded_mode)
    places = 1 if probs is None else probs.shape[1]
    return permuted_tokens.new_empty((sorted_indices.shape[0] // places, permuted_tokens.shape[1]))


KERNELS = (token_permute, token_permute_grad_v2, token_unpermute)
