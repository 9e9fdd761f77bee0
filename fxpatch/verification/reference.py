"""Who is right, where two low-precision results differ: a third result, computed on the CPU, in float64 or in the
model's own dtypes.

Compiled code may round less often than eager does, so that both are right and differ by more than a table allows. It
counts as rounding where compiled code is as near to the reference as eager is: its error is at most three times eager's
(root mean square, as `torch._dynamo.utils.same` has it), and five times at the worst element, which finds a single
wrong one among many.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.verification.example import Example
from fxpatch.verification.outcome import Outcome
from fxpatch.verification.running import Bench, eagerly

RMS, WORST = 3.0, 5.0
_HALF = (torch.float16, torch.bfloat16)


class NoReferenceError(Exception):
    """There is none; `str()` says why."""


def reference_outcome(bench: Bench, kind: str, *, backward: bool) -> Outcome:
    """What the model does on the CPU.

    Args:
        kind: `"cpu"` or `"float64"`.

    Raises:
        NoReferenceError: the model cannot be copied there, or does not run there.
    """
    bench.restore()
    model: Callable[..., Any] = bench.model
    if isinstance(model, nn.Module):
        try:
            model = copy.deepcopy(model).to("cpu")
        except Exception as error:
            raise NoReferenceError(f"the model cannot be copied to the CPU: {_first_line(error)}") from error
        if kind == "float64":
            model.double()
    elif bench.held.tensors or bench.held.parameters:
        raise NoReferenceError("the model is a function that holds tensors, which cannot be moved")

    def there(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().cpu()
        moved = moved.double() if kind == "float64" and moved.is_floating_point() else moved.clone()
        return moved.requires_grad_(tensor.requires_grad)

    call = bench.example.call()
    args, kwargs = pytree.tree_map_only(torch.Tensor, there, (call.args, call.kwargs))
    try:
        other = Bench(model, Example(args, kwargs))
        return other.run(eagerly(model), backward=backward)
    except Exception as error:
        raise NoReferenceError(f"the model does not run on the CPU in this way: {_first_line(error)}") from error
    finally:
        bench.restore()


def has_halves(outcome: Outcome) -> bool:
    """Whether there are tensors of half types in it."""
    return any(isinstance(one, torch.Tensor) and one.dtype in _HALF for one, _, _ in _leaves(*[outcome] * 3))


def is_rounding(seen: Outcome, eager: Outcome, reference: Outcome, *, halves: bool = False) -> bool:
    """Whether compiled code is as near to the reference as eager is, in floating point; the rest is equal.

    Args:
        halves: asks this of half types only, and lets eager be off by half a unit even where it is nearer by chance.
    """
    for one, other, right in _leaves(seen, eager, reference):
        if halves and not (isinstance(one, torch.Tensor) and one.dtype in _HALF):
            continue
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if one is not other and one != other:
                return False
            continue
        if one.shape != other.shape or one.dtype != other.dtype or one.shape != right.shape:
            return False
        a, b, c = (each.detach().cpu() for each in (one, other, right))
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        a, b, c = a.double(), b.double(), c.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        finite = a.isfinite() & c.isfinite()
        if not finite.any():
            continue
        mine, theirs = (a - c)[finite].abs(), (b - c)[finite].abs()
        least = torch.finfo(one.dtype).eps / 2 * _rms(c[finite]) if halves else 0.0
        if _rms(mine) > RMS * max(_rms(theirs), least) or float(mine.max()) > WORST * max(float(theirs.max()), least):
            return False
    return True


def moved(outcome: Outcome, like: Outcome | None = None) -> Outcome:
    """An outcome on the CPU, in the dtypes of another."""

    def place(value: Any, other: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.cpu()
        return value.to(other.dtype) if isinstance(other, torch.Tensor) and value.is_floating_point() else value

    parts = (outcome.result, dict(outcome.argument), dict(outcome.state), dict(outcome.gradient))
    leaves, spec = pytree.tree_flatten(parts)
    others = leaves
    if like is not None:
        theirs = pytree.tree_leaves((like.result, dict(like.argument), dict(like.state), dict(like.gradient)))
        others = theirs if len(theirs) == len(leaves) else leaves
    return Outcome(*pytree.tree_unflatten(list(map(place, leaves, others)), spec))


def _leaves(seen: Outcome, eager: Outcome, reference: Outcome) -> Iterator[tuple[Any, Any, Any]]:
    trees = [
        pytree.tree_flatten((each.result, dict(each.argument), dict(each.state), dict(each.gradient)))
        for each in (seen, eager, reference)
    ]
    if trees[0][1] != trees[1][1] or trees[1][1] != trees[2][1]:
        yield 0, 1, 2
        return
    yield from zip(*(leaves for leaves, _ in trees), strict=True)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
