"""`fxpatch.verify(model, inputs)`: eager against every stage of compilation, and where the first difference is.

    report = fxpatch.verify(model, (x,))
    print(report)
    report.raise_if_wrong()

Eager runs twice before anybody is compared with it: a model that disagrees with itself says nothing about a compiler.
What tracing believes of each operator is checked before compiled code runs, since a wrong dtype there takes the process
down. What differs is looked for layer by layer, and then operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxpatch.errors import OptionError
from fxpatch.tolerance import TOLERANCES, Tolerance
from fxpatch.verification.comparison import Comparison, Request
from fxpatch.verification.example import examples
from fxpatch.verification.report import Row, Verification
from fxpatch.verification.running import bench
from fxpatch.verification.stages import STAGES, Backend

_REFERENCES = ("auto", "cpu", "float64", None)


def verify(
    model: Callable[..., Any],
    inputs: Any,
    *,
    stages: Sequence[str] = STAGES,
    backends: Mapping[str, Backend | str] | None = None,
    backward: bool | None = None,
    reference: str | None = "auto",
    runner: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    locate: bool = True,
    tolerances: Mapping[torch.dtype, Tolerance] = TOLERANCES,
) -> Verification:
    """Whether a model's compiled forms compute what the model does. The model, its gradients, hooks and modes, and the
    state of all random generators are afterwards what they were.

    Args:
        model: a module, in the mode in which it is to be verified; or a function of tensors.
        inputs: a tuple of positional arguments, a dict of named ones, or a tensor; a list of these is verified one by
            one, with what was compiled for those before.
        stages: of "interpreter" (Dynamo's graph, node by node), "codegen" (its generated code), "aot_eager",
            "inductor" and "captured" (a `PiecewiseRunner` with device graphs, where the device has them).
        backends: more stages by name: backends of `torch.compile`, or the names of those that Dynamo knows.
        backward: whether training graphs and gradients are verified too; None where anything requires grad.
        reference: who decides where low-precision results differ: "float64" or "cpu", computed on the CPU, and eager is
            compared with it; "auto": float64, and only where something differs; None: nobody, a difference is one.
        runner: options of the `PiecewiseRunner`; `dynamic` is guessed otherwise.
        dynamic: of `torch.compile`.
        locate: False reports only that something differs, and not where.
        tolerances: by dtype; see `fxpatch.tolerance`.

    Raises:
        OptionError: a stage or a reference that there is not.
        InputError: inputs that nothing can be called with, or that cannot be copied.
        Exception: what the model raises when it is run eagerly.
    """
    more = dict(backends or {})
    _check("stages", stages, STAGES)
    _check("reference", [reference], _REFERENCES)
    _check("backends", [name for name in more if name in STAGES], ())
    model = _before_compiling(model)
    request = Request(
        *(tuple(stages), more, reference, dict(runner or {}), dynamic, locate, tolerances),
    )
    rows: list[Row] = []
    notes: dict[str, None] = {}
    comparison = Comparison(model, request)
    device = "cpu"
    for number, example in enumerate(examples(inputs)):
        with bench(model, example) as made:
            used = {each.type for each in made.held.devices}
            used |= {each.device.type for each in example.call().tensors.values()}
            device = ", ".join(sorted(used - {"cpu"})) or device
            both = made.differentiable() if backward is None else backward
            for direction in (False, True)[: 1 + both]:
                rows += comparison.rows(made, number, backward=direction, notes=notes)
    return Verification(_name(model), device, torch.__version__, tuple(rows), tuple(notes))


def _before_compiling(model: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was given; the model, where that was never asked. (What is disabled for Dynamo is a wrapper
    of the same kind, and stays one.)"""
    if getattr(model, "_torchdynamo_disable", False):
        return model
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def _check(option: str, given: Sequence[Any], choices: Sequence[Any]) -> None:
    wrong = [each for each in given if each not in choices]
    if wrong:
        raise OptionError(
            f"verify() cannot have {option}={wrong[0]!r}.",
            seen=repr(wrong[0]),
            expected=f"one of {', '.join(map(repr, choices))}" if choices else "a name that is not yet a stage's",
            hint="see fxpatch.verify",
        )


def _name(model: Callable[..., Any]) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__name__", type(model).__name__))
