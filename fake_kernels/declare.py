"""Declares a vendor's operators in a process that does not have them, so that code calling them runs and compiles.

On a simulated device there is no vendor library; its operators are declared from their schemas
(`fake_kernels.schemas`) and computed by plain torch. The schema decides what `torch.compile` believes, so it has to be
the vendor's to the letter: an operator that hides a mutation is declared hiding it.

Everything is checked before anything is defined, and `remove` takes back exactly what was defined. An operator that is
there already, with the same schema, stays as it is; with another one, nothing is declared at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from fake_kernels.adapter import check_torch, destroy, overload_of
from fake_kernels.errors import RegisteredTwiceError, SchemaError, UnknownOperatorError
from fake_kernels.kernel import parse, split_name
from fake_kernels.same_schema import same_schema

_NONE: Mapping[str, Callable[..., Any]] = MappingProxyType({})
_held: list[Declared] = []  # a library that is dropped takes its operators with it: they stay until they are removed


class Declared:
    """Operators declared by `declare`, until `remove()` or the end of a `with` block.

    Args:
        operators: those defined here, in the order of their schemas.
        present: those left alone, because they were there with the same schema.
    """

    def __init__(
        self, operators: tuple[str, ...], present: tuple[str, ...], libraries: list[torch.library.Library]
    ) -> None:
        self.operators, self.present, self._libraries = operators, present, libraries

    def remove(self) -> None:
        """Takes the operators and their kernels back. Calling it again does nothing.

        What Dynamo compiled with them still refers to them: `torch._dynamo.reset()` before they are declared anew.
        """
        while self._libraries:
            destroy(self._libraries.pop())
        if self in _held:
            _held.remove(self)

    def __enter__(self) -> Declared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def declare(
    schemas: Iterable[str],
    implementations: Mapping[str, Callable[..., Any]] = _NONE,
    *,
    key: str = "PrivateUse1",
) -> Declared:
    """Defines the operators of `schemas` in this process, and gives some of them a kernel.

        with declare(load("sgl_kernel_musa").schemas, {"sgl_kernel::silu_and_mul": silu_and_mul}):
            ...

    Args:
        schemas: with namespace. Any namespace will do, `aten` too.
        implementations: operator, as in its schema -> function with the arguments of the schema. It may call any
            operator of torch on the tensors it is given; what the kernel writes to, it writes to.
        key: the dispatch key that the functions are kernels for. `"PrivateUse1"` is the simulated device, where they
            get its tensors.

    Raises:
        SchemaError: a schema cannot be parsed, has no namespace, or contradicts the one that is registered.
        UnknownOperatorError: an implementation belongs to none of the schemas.
        RegisteredTwiceError: an implementation is for an operator that is there already with a kernel for `key`.
    """
    wanted = _wanted(schemas)
    given = {_written(operator): function for operator, function in implementations.items()}
    check_torch()
    here = {operator: overload_of(operator) for operator in wanted}
    for operator, (schema, parsed) in wanted.items():
        seen = here[operator]
        if seen is not None and not same_schema(seen._schema, parsed):
            raise SchemaError(
                f"{operator} is registered with another schema.",
                seen=str(seen._schema),
                expected=schema,
                hint="declare the version of the library that is loaded, or none: its operators are there",
            )
    for operator in given:
        if operator not in wanted:
            raise UnknownOperatorError(
                f"There is an implementation for {operator}, and no schema.",
                seen=operator,
                expected=f"one of {', '.join(wanted) or 'no operator'}",
                hint="give its schema too; an overload is written 'namespace::name.overload'",
            )
        if here[operator] is not None and torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
            raise RegisteredTwiceError(
                f"{operator} has a kernel for {key} already.",
                seen=f"a second one, {getattr(given[operator], '__name__', given[operator])}",
                expected="one kernel for one operator and dispatch key",
                hint="remove the first declaration, or leave the implementation out",
            )
    new = tuple(operator for operator in wanted if here[operator] is None)
    declared = Declared(new, tuple(operator for operator in wanted if here[operator] is not None), [])
    libraries: dict[str, torch.library.Library] = {}
    try:
        for operator in dict.fromkeys((*new, *given)):
            namespace, _, name = operator.partition("::")
            if namespace not in libraries:
                libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
                declared._libraries.append(libraries[namespace])
            if here[operator] is None:
                libraries[namespace].define(wanted[operator][0].partition("::")[2])
            if operator in given:
                libraries[namespace].impl(name, given[operator], key)
    except BaseException:
        declared.remove()
        raise
    if declared._libraries:
        _held.append(declared)
    return declared


def _wanted(schemas: Iterable[str]) -> dict[str, tuple[str, torch.FunctionSchema]]:
    """Text and parsed form by operator; the same schema twice counts once."""
    wanted: dict[str, tuple[str, torch.FunctionSchema]] = {}
    for schema in schemas:
        parsed = parse(schema)
        operator = f"{parsed.name}.{parsed.overload_name}".rstrip(".")
        before = wanted.setdefault(operator, (schema, parsed))
        if not same_schema(before[1], parsed):
            raise SchemaError(
                f"Two schemas are given for {operator}.",
                seen=f"{before[0]}\n        {schema}",
                expected="one schema for one operator",
                hint="declare one version of the library",
            )
    return wanted


def _written(operator: str) -> str:
    namespace, name, overload = split_name(operator)
    return f"{namespace}::{name}.{overload}".rstrip(".")
