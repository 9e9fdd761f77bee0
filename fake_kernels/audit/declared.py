"""What a schema alone gives away: mutation that it hides, results that cannot stay symbolic, operators without a fake
kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fake_kernels.audit.adapter import keeps_calls, needs_no_fake
from fake_kernels.audit.findings import Confidence, Finding
from fake_kernels.audit.samples import kind_of
from fake_kernels.audit.target import Target

_BACKWARD = re.compile(r"backward|_grad(_|\.|$)|bk$")
_TENSORS = ("Tensor", "Tensor[]")


def is_backward(name: str) -> bool:
    """Whether an operator is called by a backward pass, by its name."""
    return bool(_BACKWARD.search(name.partition("::")[2]))


def check_declared(target: Target, siblings: dict[str, Any]) -> Iterator[Finding]:
    """Findings of the rules hidden-mutation, suspected-mutation, undeclared-effect, constant-result and
    missing-fake(-backward).

    Args:
        target: the operator.
        siblings: name without namespace -> schema, for the operators of the namespace.
    """
    schema, name = target.schema, target.name
    plain = name.partition("::")[2].partition(".")[0]
    has_tensors = any(kind_of(a)[0] in _TENSORS for a in schema.arguments)
    if not schema.is_mutable and not schema.returns:
        kept = keeps_calls(target.overload)
        hides = "takes tensors, returns nothing and declares no mutation" if has_tensors else "returns nothing"
        fate = ""
        if needs_no_fake(target.overload):
            fate = "; FX keeps the call (has_side_effect)" if kept else "; with its fake kernel the call is dead code"
        yield target.finding(
            "undeclared-effect" if kept else "hidden-mutation",
            f"{hides}: whatever it does is invisible to the compiler{fate}",
            confidence=Confidence.SHOWN if has_tensors and not kept else Confidence.ASK_KERNEL,
        )
    elif not schema.is_mutable and plain.endswith("_") and not plain.endswith("__"):
        yield target.finding("hidden-mutation", "the name ends in `_`, and the schema declares no mutation")
    elif not schema.is_mutable and not plain.endswith("_functional"):
        yield from _mutating_sibling(target, plain, siblings)
    yield from _constants(target)
    if needs_no_fake(target.overload) is None and (schema.returns or schema.is_mutable):
        rule = "missing-fake-backward" if is_backward(name) else "missing-fake"
        yield target.finding(rule, f"no fake kernel, no Meta kernel, no decomposition: {schema}")


def _mutating_sibling(target: Target, plain: str, siblings: dict[str, Any]) -> Iterator[Finding]:
    written = {argument.name for argument in target.schema.arguments}
    for other in (f"{plain}_v2", f"{plain}_v3", f"{plain}_"):
        schema = siblings.get(other)
        if schema is None or other.endswith("_"):
            continue  # `x` and `x_` are a functional and an in-place operator, as they should be
        declared = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        shared = [argument for argument in declared if argument in written]
        if shared:
            yield target.finding(
                "suspected-mutation",
                f"{other} declares that it writes {', '.join(shared)}; this one has the same arguments and declares "
                "nothing",
                confidence=Confidence.ASK_KERNEL,
            )
            return


def _constants(target: Target) -> Iterator[Finding]:
    schema = target.schema
    kinds = [str(r.real_type if hasattr(r, "real_type") else r.type) for r in schema.returns]
    plain = [
        f"result {i} ({kind})" for i, kind in enumerate(kinds) if kind in ("int", "float", "bool", "number", "str")
    ]
    if plain and needs_no_fake(target.overload) is not None:
        yield target.finding("constant-result", f"{', '.join(plain)}: traced as what the fake kernel returns")
