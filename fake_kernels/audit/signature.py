"""A Python fake kernel's parameters against its operator's schema, without calling it.

The dispatcher calls a Python kernel with positional arguments by position and keyword-only ones by name, and leaves out
what equals the schema's default (trailing positional ones, any keyword). So a kernel must accept every argument the
way the schema has it, and must repeat every default with the same value; parameter names matter for keyword-only
arguments alone.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch

from fake_kernels.audit.findings import Finding
from fake_kernels.audit.kernels import PythonKernel

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_signature(operator: str, schema: Any, kernel: PythonKernel) -> Iterator[Finding]:
    """Findings of the rules missing-default, refused-argument and swapped-arguments."""
    parameters = inspect.signature(kernel.function).parameters
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL]
    takes_any = {p.kind for p in parameters.values()}
    by_position = [a for a in schema.arguments if not a.kwarg_only]
    fed: set[str] = set()

    def finding(rule: str, message: str) -> Finding:
        return Finding(operator, rule, f"{kernel.name}: {message}", file=kernel.short_file, line=kernel.line)

    for index, argument in enumerate(by_position):
        if index < len(positional):
            fed.add(positional[index].name)
            yield from (finding(*f) for f in _default(argument, positional[index], kernel))
            elsewhere = next((i for i, p in enumerate(positional) if p.name == argument.name), index)
            here = positional[index].name
            if elsewhere != index and here in [a.name for a in by_position]:  # else it is only another name
                yield finding(
                    "swapped-arguments",
                    f"argument {index} is `{argument.name}` in the schema and `{here}` here; `{argument.name}` "
                    f"stands at {elsewhere}",
                )
        elif inspect.Parameter.VAR_POSITIONAL not in takes_any:
            where = "takes it by keyword only" if argument.name in parameters else "has no parameter for it"
            when = "whenever it differs from the default" if argument.has_default_value() else "in every call"
            yield finding(
                "refused-argument", f"`{argument.name}` is positional in the schema; the kernel {where}: fails {when}"
            )
            fed.add(argument.name)
    for argument in schema.arguments:
        if not argument.kwarg_only:
            continue
        parameter = parameters.get(argument.name)
        if parameter is None or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            if inspect.Parameter.VAR_KEYWORD not in takes_any:
                when = "whenever it differs from the default" if argument.has_default_value() else "in every call"
                yield finding(
                    "refused-argument",
                    f"`{argument.name}` is a keyword of the schema; the kernel has none: fails {when}",
                )
            continue
        if parameter.name in fed:
            yield finding(
                "refused-argument", f"`{argument.name}` is a keyword of the schema; here a positional argument takes it"
            )
        fed.add(parameter.name)
        yield from (finding(*f) for f in _default(argument, parameter, kernel))
    for parameter in parameters.values():
        if (
            parameter.default is inspect.Parameter.empty
            and parameter.name not in fed
            and parameter.kind
            in (
                *_POSITIONAL,
                inspect.Parameter.KEYWORD_ONLY,
            )
        ):
            yield finding("refused-argument", f"the kernel requires `{parameter.name}`, which the schema does not have")


def parameter_names(schema: Any, kernel: PythonKernel) -> dict[str, str]:
    """Schema argument -> the kernel's parameter that receives it."""
    parameters = inspect.signature(kernel.function).parameters
    positional = [p.name for p in parameters.values() if p.kind in _POSITIONAL]
    by_position = [a.name for a in schema.arguments if not a.kwarg_only]
    by_name = {a.name: a.name for a in schema.arguments if a.kwarg_only and a.name in parameters}
    return dict(zip(by_position, positional, strict=False)) | by_name


def undefined_names(operator: str, kernel: PythonKernel) -> Iterator[Finding]:
    """Findings of the rule undefined-name: globals that the kernel reads and nobody defines."""
    known = kernel.function.__globals__
    seen: set[str] = set()
    for code in _codes(kernel.function.__code__):
        line = code.co_firstlineno
        for instruction in dis.get_instructions(code):
            line = instruction.starts_line or line
            name = instruction.argval
            if instruction.opname != "LOAD_GLOBAL" or name in known or hasattr(builtins, name) or name in seen:
                continue
            seen.add(name)
            yield Finding(
                operator,
                "undefined-name",
                f"{kernel.name} reads `{name}`, which is not defined",
                file=kernel.short_file,
                line=line,
            )


def constants(kernel: PythonKernel | None) -> tuple[list[str], list[int]]:
    """Strings and numbers that a kernel and the helpers it calls compare with: what it may want as arguments."""
    if kernel is None:
        return [], []
    strings: dict[str, None] = {}
    numbers: dict[int, None] = {}
    known = kernel.function.__globals__
    codes = list(_codes(kernel.function.__code__))
    for name in [name for code in codes for name in code.co_names]:
        helper = known.get(name)
        if inspect.isfunction(helper) and helper.__module__ == kernel.function.__module__:
            codes.extend(_codes(helper.__code__))
        elif isinstance(helper, dict):
            numbers.update((key, None) for key in helper if type(key) is int)
        elif type(helper) is int:
            numbers[helper] = None
    for code in codes:
        for constant in _flat(code.co_consts):
            if isinstance(constant, str) and 0 < len(constant) <= 16 and " " not in constant:
                strings[constant] = None
            elif type(constant) is int and -8 <= constant <= 512:
                numbers[constant] = None
    return list(strings), list(numbers)


def _default(argument: Any, parameter: inspect.Parameter, kernel: PythonKernel) -> Iterator[tuple[str, str]]:
    if not argument.has_default_value():
        return
    wanted = argument.default_value
    if parameter.default is inspect.Parameter.empty:
        yield "missing-default", f"`{parameter.name}` has no default; the schema says {argument.name}={wanted!r}"


def differing_defaults(schema: Any, kernel: PythonKernel) -> Iterator[tuple[Any, inspect.Parameter]]:
    """Schema arguments and parameters whose defaults differ, where the kernel reads the parameter at all."""
    parameters = inspect.signature(kernel.function).parameters
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL]
    by_position = [a for a in schema.arguments if not a.kwarg_only]
    pairs = list(zip(by_position, positional, strict=False))
    pairs += [(a, parameters[a.name]) for a in schema.arguments if a.kwarg_only and a.name in parameters]
    for argument, parameter in pairs:
        if not argument.has_default_value() or parameter.default is inspect.Parameter.empty:
            continue
        if not _same(argument.default_value, parameter.default) and _reads(kernel, parameter.name):
            yield argument, parameter


def _same(wanted: Any, given: Any) -> bool:
    if isinstance(given, torch.dtype | torch.device | torch.layout):
        return True  # the schema holds an enumeration's number, the kernel gets the object: not comparable here
    if isinstance(wanted, int | float) and isinstance(given, int | float):
        return math.isclose(wanted, given, rel_tol=1e-6) or wanted == given
    if isinstance(wanted, list | tuple) and isinstance(given, list | tuple):
        return list(wanted) == list(given)
    return bool(wanted == given)


def _reads(kernel: PythonKernel, name: str) -> bool:
    return any(
        instruction.argval == name and instruction.opname in ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")
        for code in _codes(kernel.function.__code__)
        for instruction in dis.get_instructions(code)
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _flat(constants: Any) -> Iterator[Any]:
    for constant in constants:
        if isinstance(constant, tuple | frozenset):
            yield from _flat(sorted(constant, key=repr))
        else:
            yield constant
