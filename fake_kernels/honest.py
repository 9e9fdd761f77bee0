"""The honest form of a schema that lies or that torch cannot functionalize, and what a request for one has to keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fake_kernels.errors import SchemaError, SignatureError
from fake_kernels.kernel import type_of


def declared_aliases(schema: torch.FunctionSchema) -> tuple[tuple[str, ...], dict[int, str]]:
    """What a schema says: the arguments that are written, and for each result that is one of them, which."""
    written = {a.name: a.alias_info for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    returned = {
        number: next(name for name, info in written.items() if info.before_set == result.alias_info.before_set)
        for number, result in enumerate(schema.returns)
        if result.alias_info is not None and result.alias_info.is_write
    }
    return tuple(written), returned


def honest_schema(overload: Any, name: str, mutates_args: Sequence[str], returned: Mapping[int, str]) -> str:
    """The operator's schema as it should have been, under another name; all its arguments are positional."""
    arguments, _, results = str(overload._schema).partition("(")[2].rpartition(") -> ")
    arguments = re.sub(r"Tensor\([^)]*\)", "Tensor", arguments.replace("*, ", "", 1))
    for number, argument in enumerate(mutates_args):
        arguments = re.sub(rf"\bTensor(\S*) {argument}\b", rf"Tensor(s{number}!)\1 {argument}", arguments)
    # functionalization passes arguments by name, past functions that have these parameters themselves
    arguments = re.sub(r" (self|mode|ctx|op)\b(?=[,=]|$)", r" \1_", arguments)
    each = (results[1:-1] if results.startswith("(") else results).split(", ")
    fresh = [result for number, result in enumerate(each) if result and number not in returned]
    return f"{name}({arguments}) -> ({', '.join(fresh)})"


def check_request(
    overload: Any, mutates_args: Sequence[str], returned: Mapping[int, str], fake: Callable[..., Any] | None
) -> None:
    """Raises what `shadow` raises for an operator and its arguments, results and fake kernel."""
    schema = overload._schema
    if schema.is_mutable and not declared_aliases(schema)[1]:
        raise SchemaError(
            f"{overload.name()} needs no shadow.",
            seen=f"{schema} declares what it writes",
            expected="a schema that hides it",
            hint="call it as it is; for a fake kernel: register_fake_if_exists",
        )
    tensors = {a.name for a in schema.arguments if "Tensor" in type_of(a.real_type)}
    wrong = [repr(name) for name in (*mutates_args, *returned.values()) if name not in tensors]
    wrong += [f"result {number}" for number in returned if not 0 <= number < len(schema.returns)]
    if wrong or not (mutates_args or returned):
        raise SignatureError(
            f"{overload.name()} cannot be shadowed like this.",
            seen=", ".join(wrong) or "nothing that it writes or returns",
            expected=f"tensor arguments and results of {schema}",
            hint="correct `mutates_args` and `returns_args`",
        )
    if len(schema.returns) > len(returned) and fake is None:
        raise SignatureError(
            f"The shadow of {overload.name()} needs a fake kernel.",
            seen=f"no `fake`, and {len(schema.returns) - len(returned)} results that are no arguments",
            expected="fake=function, in the operator's own arguments and with all its results",
            hint="write one; fake_kernels/library has examples",
        )
