"""Whether two calls did the same. The problem: equal values are the smaller part of being the same: a result also has
a geometry, shares memory with arguments or not, and arguments may have been written. The rule: `observe` notes all of
that about a call, and `differences` lists what differs, in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass
class Observed:
    """What a call did: raised, or returned a tree; and the tensors to look at, by a name that says where they are."""

    error: Exception | None = None
    structure: str = ""
    others: list[Any] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Strictness:
    """What has to be the same, besides shapes and dtypes.

    Args:
        values: False where memory was left uninitialized.
        layout: strides and sharing; False where they are another kernel's or a compiler's choice.
        tolerance: relative and absolute, where `torch.testing.assert_close` would use its own.
    """

    values: bool = True
    layout: bool = True
    tolerance: tuple[float, float] | None = None


STRICT = Strictness()


@dataclass
class Verdict:
    """What differs; whether values were close only, not the same bits; whether both raised the same."""

    problems: list[str] = field(default_factory=list)
    close: bool = False
    raised: bool = False

    @staticmethod
    def of(verdicts: list[Verdict]) -> Verdict:
        """About several calls at once."""
        return Verdict(
            [problem for each in verdicts for problem in each.problems],
            close=any(each.close for each in verdicts),
            raised=any(each.raised for each in verdicts),
        )


def observe(call: Callable[[], Any], arguments: Any = ()) -> Observed:
    """Makes the call, and notes what it returned and what became of `arguments`."""
    seen = Observed()
    try:
        result = call()
    except Exception as error:
        seen.error = error
        return seen
    leaves, spec = pytree.tree_flatten(result)
    seen.structure = str(spec)
    for kind, those in (("argument", pytree.tree_leaves(arguments)), ("result", leaves)):
        for position, leaf in enumerate(those):
            if isinstance(leaf, torch.Tensor):
                seen.tensors[f"{kind} {position}"] = leaf
            elif kind == "result":
                seen.others.append(leaf)
    return seen


def differences(want: Observed, got: Observed, device: str, strict: Strictness = STRICT) -> Verdict:
    """What `got`, on `device`, does differently from `want`, on the CPU."""
    if want.error is not None or got.error is not None:
        same = type(want.error) is type(got.error)
        return Verdict([] if same else [f"{_in_short(got.error)}, expected {_in_short(want.error)}"], raised=same)
    verdict = Verdict()
    if want.structure != got.structure or want.tensors.keys() != got.tensors.keys():
        verdict.problems.append(f"returned {got.structure}, expected {want.structure}")
        return verdict
    for mine, theirs in zip(want.others, got.others, strict=True):
        if type(mine) is not type(theirs) or not (mine == theirs or (mine != mine and theirs != theirs)):
            verdict.problems.append(f"returned {theirs!r}, expected {mine!r}")
    for name, mine in want.tensors.items():
        _compare_tensors(name, mine, got.tensors[name], device, verdict, strict)
    if strict.layout and _shared(want) != _shared(got):
        verdict.problems.append(f"shares memory as {_shared(got)}, expected {_shared(want)}")
    return verdict


def _compare_tensors(
    name: str, want: torch.Tensor, got: torch.Tensor, device: str, verdict: Verdict, strict: Strictness
) -> None:
    def check(what: str, theirs: object, mine: object) -> None:
        if theirs != mine:
            verdict.problems.append(f"{name}: {what} {theirs}, expected {mine}")

    check("type", type(got), type(want))
    check("device", got.device.type, device)
    check("dtype", got.dtype, want.dtype)
    check("layout", got.layout, want.layout)
    check("shape", tuple(got.shape), tuple(want.shape))
    check("requires_grad", got.requires_grad, want.requires_grad)
    if verdict.problems or want.layout is not torch.strided:
        return
    if strict.layout:
        check("strides", got.stride(), want.stride())
        check("is_conj", got.is_conj(), want.is_conj())
        check("is_neg", got.is_neg(), want.is_neg())
    if not strict.values:
        return
    here = got.detach().cpu()
    if not same_bits(want.detach(), here):
        try:
            rtol, atol = strict.tolerance or (None, None)
            torch.testing.assert_close(here, want.detach(), rtol=rtol, atol=atol, equal_nan=True)
            verdict.close = True
        except AssertionError as error:
            verdict.problems.append(f"{name}: " + " ".join(str(error).split()))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two CPU tensors hold the same bits; one NaN is as good as another."""
    a, b = a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg()
    if torch.equal(_bytes(a), _bytes(b)):
        return True
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        _bytes(a.masked_fill(a.isnan(), 0)), _bytes(b.masked_fill(b.isnan(), 0))
    )


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _in_short(error: Exception | None) -> str:
    return "no error" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _shared(seen: Observed) -> dict[str, tuple[str, int, bool]]:
    """For each tensor that shares memory with an earlier one: with which, from where on, and whether as a view."""
    first: dict[int, str] = {}
    shared = {}
    for name, tensor in seen.tensors.items():
        if tensor.layout is torch.strided and tensor.untyped_storage().nbytes():
            owner = first.setdefault(tensor.untyped_storage()._cdata, name)
            if owner != name:
                shared[name] = (owner, tensor.storage_offset(), tensor._is_view())
    return shared
