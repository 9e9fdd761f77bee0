"""Several checks of one probe: each runs whatever became of those before it, and what failed makes one diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.doctor.probe import Broken, NotApplicable

_SHOWN = 6
_LONGEST = 300


def run_all(checks: Mapping[str, Callable[[], object]], *, why: str = "", todo: str = "") -> str:
    """Runs every check; `"a, b, c"` of their names if all of them pass. A check fails by raising.

    Raises:
        Broken: those that failed, each with its error.
        NotApplicable: a check said so, and none failed.
    """
    failed: list[str] = []
    inapplicable: NotApplicable | None = None
    for name, check in checks.items():
        try:
            check()
        except NotApplicable as error:
            inapplicable = error
        except Exception as error:  # whatever a broken device raises is the finding
            failed.append(f"{name}: {in_words(error)}")
    if failed:
        raise Broken(listed(failed), why=why, todo=todo)
    if inapplicable is not None:
        raise inapplicable
    return ", ".join(checks)


def listed(items: list[str], between: str = "; ") -> str:
    """The first few, and how many more there are."""
    more = f"{between}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return between.join(items[:_SHOWN]) + more


def in_words(error: BaseException) -> str:
    """An error as one line: its class, unless it is a finding of ours, and the first line of its text."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 3]}..."
    if isinstance(error, Differs | Broken):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Differs(Exception):
    """Something is not what it should be; the text says what, and what it should be."""


def expect(got: object, want: object, what: str) -> None:
    """Raises:
    Differs: they are not equal.
    """
    if type(got) is not type(want) or got != want:
        raise Differs(f"{what} is {got!r}, and should be {want!r}")


def expect_close(got: Any, want: Any, what: str) -> None:
    """Compares trees of tensors, wherever they are, within `torch.testing`'s tolerances by dtype; NaN is NaN.

    Raises:
        Differs: they differ in structure, dtype, shape or value.
    """
    given, wanted = pytree.tree_leaves(got), pytree.tree_leaves(want)
    expect(len(given), len(wanted), f"the number of results of {what}")
    for mine, theirs in zip(given, wanted, strict=True):
        if not isinstance(theirs, torch.Tensor):
            expect(mine, theirs, what)
            continue
        expect(mine.dtype, theirs.dtype, f"the dtype of {what}")
        expect(tuple(mine.shape), tuple(theirs.shape), f"the shape of {what}")
        try:
            torch.testing.assert_close(mine.detach().cpu(), theirs.detach().cpu(), equal_nan=True)
        except AssertionError as error:
            said = " ".join(str(error).split())
            raise Differs(f"{what} is wrong: {said}") from error


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two CPU tensors of one dtype and shape hold the same values to the last bit, the sign of zero included;
    any NaN is as good as any other."""
    if got.dtype.is_complex:
        return same_bits(torch.view_as_real(got), torch.view_as_real(want))
    same = _bits(got) == _bits(want)
    if got.dtype.is_floating_point:  # float8 has no isnan
        same |= (got.float().isnan() & want.float().isnan()).flatten()
    return bool(same.all())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.flatten().contiguous().view(whole)
