"""A fake kernel held to what it has to keep: as many results as its schema, and no data read.

For these mistakes torch has no error, or one that does not say whose they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException

from fake_kernels.errors import FakeReadsDataError, FakeResultsError
from fake_kernels.kernel import number_of_results


def checked(overload: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, held to what a fake kernel has to keep: as many results as the schema has, and no data read.

    Raises, when it is called:
        FakeReadsDataError: it asked a tensor for its values.
        FakeResultsError: it returned another number of results.
    """
    expected = len(overload._schema.returns)

    @functools.wraps(fn)
    def fake(*args: Any, **kwargs: Any) -> Any:
        try:
            results = fn(*args, **kwargs)
        except DataDependentOutputException as error:
            raise FakeReadsDataError(
                f"The fake kernel of {overload.name()} reads data.",
                seen=f"{place_of(fn)} calls {error.func}",
                expected="shapes, strides and dtypes only: fake tensors have no values",
                hint="for a size that depends on data, return torch.library.get_ctx().new_dynamic_size()",
            ) from error
        seen = number_of_results(overload._schema, results)
        if seen != expected:
            raise FakeResultsError(
                f"The fake kernel of {overload.name()} returns another number of results than the operator.",
                seen=f"{seen} from {place_of(fn)}",
                expected=f"{expected}: {overload._schema}",
                hint="return one value for each result of the schema; None where it returns nothing",
            )
        return results

    return fake


def code_of(fn: Callable[..., Any]) -> CodeType | None:
    """The code of a function, through what wraps it; None where it is not Python's."""
    return getattr(inspect.unwrap(fn), "__code__", None)


def place_of(fn: Callable[..., Any]) -> str:
    """Where a function is written, for messages."""
    code = code_of(fn)
    name = getattr(fn, "__qualname__", repr(fn))
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"
