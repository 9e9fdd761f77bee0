"""One OpInfo, eagerly, on the device and on the CPU: the call, its in-place and `out=` variants, its gradients.

Both sides start from copies of the same sample and the same seed, so that random operators have to agree as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.testing._internal.common_utils import set_rng_seed
from torch.utils import _pytree as pytree

from opinfo.cases import DTYPES, Case, chosen, infos
from opinfo.compare import STRICT, Observed, Strictness, Verdict, differences, observe
from opinfo.mirror import mirror, names_a_device
from opinfo.results import Result

SEED = 2024


@dataclass(frozen=True)
class Call:
    """`function(tree)`, to be made with a copy of `tree` on either side."""

    function: Callable[[Any], Any]
    tree: Any
    keep: tuple[torch.Tensor, ...] = ()  # what torch wants on the CPU, whatever the device of the others

    def observed(self, device: str) -> Observed:
        """What the call does on the device; an argument that cannot even be moved there is an error of the call."""
        try:
            tree = mirror(self.tree, device, self.keep)
        except Exception as error:
            return Observed(error=error)
        moved = [
            copy
            for original, copy in zip(pytree.tree_leaves(self.tree), pytree.tree_leaves(tree), strict=True)
            if not any(original is kept for kept in self.keep)
        ]
        seed(device)
        return observe(lambda: self.function(tree), moved)

    def goes_to(self, device: str) -> str:
        """Where its results are to be: a factory that is told no device makes CPU tensors."""
        return device if any(names_a_device(leaf) for leaf in pytree.tree_leaves(self.tree)) else "cpu"

    def verdict(self, device: str, strict: Strictness = STRICT) -> Verdict:
        """How the device differs from the CPU."""
        return differences(self.observed("cpu"), self.observed(device), self.goes_to(device), strict)


def run(case: Case, device: str) -> Result:
    """All samples of an OpInfo at one eager stage."""
    info, strict, result = infos("op")[case.name], strictness(case), Result(case)
    for position, sample in samples(case):
        verdicts = [call.verdict(device, strict) for call in _calls(case.stage, info, sample)]
        if verdicts:  # not every sample of an operator has variants
            result.add(position, Verdict.of(verdicts))
    return result


def samples(case: Case) -> Iterator[tuple[int, Any]]:
    """The samples of a case on the CPU, each with its position among all."""
    info, differentiates = infos("op")[case.name], case.stage.endswith("backward")
    set_rng_seed(SEED)
    every = list(info.sample_inputs("cpu", DTYPES[case.dtype], requires_grad=differentiates, set_seed=False))
    taken = chosen(len(every), case.samples)
    yield from (pair for pair in enumerate(every) if pair[0] in taken)


# where torch computes in another way on a device it does not know: sums in another order, results of other strides
_ATTENTION = "the CPU has a fused kernel for attention, other devices compose operators"
OTHER_ALGORITHM = {
    "nn.functional.scaled_dot_product_attention": _ATTENTION,
    "nn.Transformer": _ATTENTION,
    "nn.TransformerEncoder": _ATTENTION,
    "nn.TransformerEncoderLayer": _ATTENTION,
    "nn.TransformerDecoderLayer": _ATTENTION,
    "nn.LSTMCell": "accelerators fuse recurrent cells; as on CUDA, both biases get one gradient",
    "nn.functional.linear_cross_entropy": "torch chooses how to accumulate by the name of the device",
    "nn.LinearCrossEntropyLoss": "torch chooses how to accumulate by the name of the device",
}
_TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (2e-2, 2e-2)}


def strictness(case: Case) -> Strictness:
    """How much the same a device can be."""
    if case.name.partition(":")[0] in OTHER_ALGORITHM:
        return Strictness(layout=False, tolerance=_TOLERANCE[DTYPES[case.dtype]])
    return Strictness(values=not getattr(infos(case.suite)[case.name], "has_nondeterministic_output", False))


def seed(device: str) -> None:
    """What torch.manual_seed does to two devices; that one formats a stack trace each time, and we are called often."""
    torch.default_generator.manual_seed(SEED)
    if device != "cpu":
        torch.get_device_module(device).manual_seed(SEED)


def forward(op: Callable[..., Any], info: Any, sample: Any) -> Call:
    """The call of `op` with a sample, out of place."""
    return Call(lambda tree: op(tree[0], *tree[1], **tree[2]), _arguments(sample), _kept(info, sample))


def backward(op: Callable[..., Any], info: Any, sample: Any) -> Call:
    """The gradients of all that requires one."""

    def function(tree: Any) -> Any:
        return gradients(sample.output_process_fn_grad(op(tree[0], *tree[1], **tree[2])), tree)

    return Call(function, _arguments(sample), _kept(info, sample))


def gradients(result: Any, tree: Any) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the tensors in `tree`, where each result gets a random one that every device agrees on."""
    inputs = [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.requires_grad]
    outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not inputs or not outputs:
        return ()
    draw = torch.Generator().manual_seed(SEED)
    cotangents = [torch.randn(x.shape, dtype=x.dtype, generator=draw).to(x.device) for x in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)


def _calls(stage: str, info: Any, sample: Any) -> Iterator[Call]:
    if stage == "variants":
        yield from _variants(info, sample)
    else:
        yield (backward if stage == "backward" else forward)(info.op, info, sample)


def _variants(info: Any, sample: Any) -> Iterator[Call]:
    """In place; into memory of the right size, of other strides, and of no size yet."""
    arguments, kept = _arguments(sample), _kept(info, sample)
    if info.inplace_variant is not None and not sample.broadcasts_input:
        yield Call(lambda tree: info.inplace_variant(tree[0], *tree[1], **tree[2]), arguments, kept)
    if not info.supports_out or "out" in sample.kwargs:
        return
    fitting = forward(info.op, info, sample).observed("cpu")
    results = [x for name, x in fitting.tensors.items() if name.startswith("result")]
    if not results or fitting.others:
        return  # it raised, or returns what cannot be written into

    def into(tree: Any) -> Any:
        (input, args, kwargs), outs = tree
        return info.op(input, *args, **kwargs, out=outs[0] if len(outs) == 1 else tuple(outs))

    for out in (_dense, _strided, _empty):
        yield Call(into, (arguments, [out(result) for result in results]), kept)


def _arguments(sample: Any) -> Any:
    return sample.input, sample.args, sample.kwargs


def _kept(info: Any, sample: Any) -> tuple[torch.Tensor, ...]:
    # the places to split at are read by the host
    return tuple(x for x in sample.args if isinstance(x, torch.Tensor)) if info.name == "tensor_split" else ()


def _dense(result: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(result, memory_format=torch.contiguous_format)


def _strided(result: torch.Tensor) -> torch.Tensor:
    # not all dimensions turned around: into such memory, with four of them, torch 2.13's own tril writes past the end
    if result.dim() < 2:
        return torch.ones(*result.shape, 2, dtype=result.dtype)[..., 0]
    return torch.ones_like(result.mT, memory_format=torch.contiguous_format).mT


def _empty(result: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=result.dtype)
