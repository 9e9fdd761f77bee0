"""Whether two schemas are the same operator's. Not by their text: it names alias sets as it likes (`a!`, `s0!`, `!`),
and prints numbers and types of arguments in ways that change between versions of torch."""

from __future__ import annotations

from typing import Any

import torch

from fake_kernels.kernel import type_of


def same_schema(one: torch.FunctionSchema, other: torch.FunctionSchema) -> bool:
    """The same name and overload; arguments and results of the same names, types, defaults, aliasing and mutation."""
    if str(one) == str(other):  # to the letter: most are, and this takes a tenth of the time
        return True
    return (one.name, one.overload_name) == (other.name, other.overload_name) and _parts(one) == _parts(other)


def _parts(schema: torch.FunctionSchema) -> list[Any]:
    sets: dict[str, int] = {}  # alias sets by the order of their first appearance

    def alias(info: Any) -> Any:
        if info is None:
            return None
        return bool(info.is_write), tuple(sorted(sets.setdefault(name, len(sets)) for name in info.before_set))

    arguments = [
        (a.name, type_of(a.real_type), a.kwarg_only, a.has_default_value(), a.default_value, alias(a.alias_info))
        for a in schema.arguments
    ]
    return [*arguments, *((type_of(r.real_type), alias(r.alias_info)) for r in schema.returns)]
