"""What one call did: its result, what it wrote into its arguments and its module, and whose memory the result lies in.
All of it counts when two forwards are compared; each call gets fresh arguments, and the module is put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.native.agreement import Deviation, Tolerance, compare
from fxpatch.native.copies import Fresh, Saved, same_memory
from fxpatch.native.state import State


@dataclass(frozen=True)
class Outcome:
    """Args:
    result: leaves of what was returned, copied; `spec` puts them together.
    arguments: leaves of the arguments, as the call left them.
    state: the module's buffers and other tensors, as the call left them.
    shares: for each leaf of the result the numbers of the arguments whose memory it lies in.
    parameters: names of parameters that were written.
    """

    result: list[Any]
    spec: pytree.TreeSpec
    arguments: list[Any]
    state: dict[str, torch.Tensor]
    shares: list[tuple[int, ...]]
    parameters: list[str]


def observe(module: nn.Module, fresh: Fresh, call: Callable[[], Any], *, keep_new: bool = False) -> Outcome:
    """Runs `call`, which is made with `fresh`, and says what it did; the module is put back, also when it raises.

    `keep_new`: leave what the call has added to the module.
    """
    before = State(module)
    try:
        result = call()
        leaves, spec = pytree.tree_flatten(result)
        shares = [_shared(leaf, fresh.leaves) for leaf in leaves]
        return Outcome(
            result=Saved(leaves).fresh().leaves,
            spec=spec,
            arguments=Saved(fresh.leaves).fresh().leaves,
            state=dict(zip(before.tensors, Saved(list(before.tensors.values())).fresh().leaves, strict=True)),
            shares=shares,
            parameters=before.changed_parameters(),
        )
    finally:
        before.restore(keep_new=keep_new)


def differences(
    native: Outcome,
    optimized: Outcome,
    names: Sequence[str],
    table: Mapping[torch.dtype, Tolerance],
    *,
    ignore: frozenset[int] = frozenset(),
) -> tuple[Deviation, str | None]:
    """The largest deviation, and the first thing that is wrong, in words; None where both did the same.

    Args:
        names: of the arguments, by leaf number.
        ignore: arguments by leaf number that may be overwritten, and returned, since nobody reads them afterwards.
    """
    if optimized.spec != native.spec:
        return Deviation(), f"returns another structure: {optimized.spec}, native {native.spec}"
    worst = Deviation()
    places = [
        *((f"result {n}" if len(native.result) > 1 else "the result", a, b)
          for n, (a, b) in enumerate(zip(native.result, optimized.result, strict=True))),
        *((f"argument {names[n]} after the call", a, b)
          for n, (a, b) in enumerate(zip(native.arguments, optimized.arguments, strict=True)) if n not in ignore),
        *((f"its {name} after the call", a, optimized.state[name]) for name, a in native.state.items()),
    ]  # fmt: skip
    complaint = None
    for place, a, b in places:
        deviation, wrong = compare(a, b, table)
        worst |= deviation
        complaint = complaint or (wrong and f"{place}: {wrong}")
    if complaint is None and optimized.parameters != native.parameters:
        complaint = f"writes its parameters {', '.join(optimized.parameters)}"
    for n, (theirs, ours) in enumerate(zip(native.shares, optimized.shares, strict=True)):
        if complaint is None and set(theirs) - ignore != set(ours) - ignore:
            a, b = (", ".join(names[k] for k in numbers) or "no argument" for numbers in (theirs, ours))
            complaint = f"result {n} lies in the memory of {b}, native's in that of {a}"
    return worst, complaint


def written(before: list[Any], after: Outcome) -> frozenset[int]:
    """The leaf numbers of arguments that a call has changed, bit by bit."""
    return frozenset(
        n
        for n, (old, new) in enumerate(zip(before, after.arguments, strict=True))
        if isinstance(old, torch.Tensor) and not _identical(old, new)
    )


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.layout is not torch.strided:
        return torch.equal(a.to_dense(), b.to_dense())
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _shared(leaf: Any, arguments: list[Any]) -> tuple[int, ...]:
    if not isinstance(leaf, torch.Tensor):
        return ()
    return tuple(n for n, other in enumerate(arguments) if isinstance(other, torch.Tensor) and same_memory(leaf, other))
