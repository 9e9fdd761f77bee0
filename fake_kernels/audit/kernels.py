"""Which Python function is an operator's fake kernel: the dispatcher knows, and does not tell.

`torch.library.register_fake` keeps the function where it can be found; `Library.impl(..., "Meta")`, which vendors use,
hands it to C++ and keeps nothing. So registrations are overheard: `Recorder` has to be active while the vendor's
package is imported, which is why the audit imports it in a process of its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fake_kernels.audit.adapter import registered_fake

_KEYS = ("Meta", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


@dataclass(frozen=True)
class PythonKernel:
    """A fake kernel written in Python. `key` is the dispatch key it was registered for, or `register_fake`."""

    function: Callable[..., Any]
    key: str

    @property
    def file(self) -> str:
        """Where it was written, as frames know it."""
        return self.function.__code__.co_filename

    @property
    def short_file(self) -> str:
        """The same, below the directory it was imported from: the same on every machine."""
        path = Path(self.file)
        roots = [Path(root).resolve() for root in sys.path if root]
        inside = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
        return min(map(str, inside), key=len, default=str(path))

    @property
    def line(self) -> int:
        """The line of its `def`, or of its first decorator."""
        return self.function.__code__.co_firstlineno

    @property
    def name(self) -> str:
        """The function's own name: it is what a `TypeError` at the call says."""
        return self.function.__name__


class Recorder:
    """Context manager: overhears `torch.library.Library.impl`."""

    def __init__(self) -> None:
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {}
        self._original: Any = None

    def __enter__(self) -> Recorder:
        self._original = original = torch.library.Library.impl
        functions = self._functions

        def impl(
            library: torch.library.Library, op_name: Any, fn: Any, dispatch_key: str = "", *args: Any, **kwargs: Any
        ) -> Any:
            name = op_name if isinstance(op_name, str) else op_name.name()
            name = name if "::" in name else f"{library.ns}::{name}"
            functions[name.removesuffix(".default"), dispatch_key or library.dispatch_key] = fn
            return original(library, op_name, fn, dispatch_key, *args, **kwargs)

        setattr(torch.library.Library, "impl", impl)  # noqa: B010 - to mypy a method cannot be assigned
        return self

    def __exit__(self, *exc: object) -> None:
        setattr(torch.library.Library, "impl", self._original)  # noqa: B010 - to mypy a method cannot be assigned

    def kernel_of(self, name: str) -> PythonKernel | None:
        """The Python fake kernel of `namespace::name[.overload]`; None where it is in C++ or there is none."""
        fake = registered_fake(name)
        if fake is not None and _is_python(inspect.unwrap(fake)):
            return PythonKernel(inspect.unwrap(fake), "register_fake")
        for key in _KEYS:
            function = self._functions.get((name, key))
            if function is not None and _is_python(inspect.unwrap(function)):
                return PythonKernel(inspect.unwrap(function), key)
        return None


def _is_python(function: Any) -> bool:
    return inspect.isfunction(function)
