"""What a traced function leaves changed besides tensors: a list that it appends to, an attribute that it sets.

Dynamo leaves that to the code around its graph, and a replay has no such code: the change would be missing from the
second call on. What is set and set back within the call (transformers does so around every model, to collect outputs)
leaves nothing changed, though Dynamo lists it too. So attributes are compared: those that would be given the constant
that they have are no effect.
"""

from __future__ import annotations

from typing import Any

from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import ConstantVariable
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

_MISSING = object()


def lasting() -> list[str]:
    """Names of the objects that would be changed. For a Dynamo backend, while it is called to compile."""
    effects = InstructionTranslator.current_tx().output.side_effects
    found = []
    for variable in effects._get_modified_vars():
        kind = variable.mutation_type
        if not isinstance(kind, (AttributeMutationExisting, ValueMutationExisting)):
            continue  # made by the function itself: it is in what it returns, or gone
        if not (isinstance(kind, AttributeMutationExisting) and _set_back(effects, variable)):
            found.append(str(getattr(variable.source, "name", variable)))
    return found


def _set_back(effects: Any, variable: Any) -> bool:
    """Whether every attribute that is stored is a constant, and the object has it already."""
    stored = effects.store_attr_mutations.get(variable)
    own = getattr(getattr(variable, "value", None), "__dict__", None)
    is_container = getattr(variable, "is_base_vt_modified", lambda effects: False)
    if not stored or own is None or is_container(effects):
        return False
    return all(
        isinstance(value, ConstantVariable) and own.get(name, _MISSING) is value.value for name, value in stored.items()
    )
