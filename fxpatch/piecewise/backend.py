"""`torch.compile(model, backend="piecewise")`: Dynamo's graph in pieces, each distinct one compiled once.

Dynamo keeps its guards and calls this for every graph it makes; the pieces run in order, without device graphs, since a
backend is not told which sizes to capture. For graphs: `PiecewiseRunner`. Found by torch through the entry point
`torch_dynamo_backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from compile_configs import builtin_names, load_profile
from fxpatch.piecewise.build import Compiler, build
from fxpatch.piecewise.flow import flow
from fxpatch.piecewise.lint import lint
from fxpatch.piecewise.rules import rules_of
from fxpatch.piecewise.split import split


def piecewise(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend. `torch.compile(..., options={"split": [...], "compiler": "inductor"})`.

    Args:
        gm, example_inputs: from Dynamo.
        options: `split`: what to split at besides what the device's profile says; `compiler`: of the pieces, the
            profile's by default.

    Raises:
        SplitError, CompileError: the options name what there is not, or a piece cannot be compiled.
    """
    given = dict(options or {})
    wanted: Iterable[Any] = given.pop("split", ())
    compiler: str | Compiler | None = given.pop("compiler", None)
    if given:
        raise TypeError(f"backend='piecewise' has the options split and compiler, not {', '.join(given)}")
    device = next(
        (each.device.type for each in example_inputs if isinstance(each, torch.Tensor) and each.device.type != "cpu"),
        "cpu",
    )
    profile = load_profile(device if device in builtin_names() else "cpu")
    rules = rules_of(wanted, operators=profile.splitting_operators, tags=profile.capture.split_tags)
    pieces = split(gm, (*rules, *lint(device, registers_generator=True)))
    built = build(pieces.pieces, compiler or profile.compiler)
    return flow(pieces, built, [None] * len(pieces.feed))
