"""A module of a pipeline (diffusers' transformer or UNet) run in pieces, in two lines:

    fxpatch.install()
    run_in_pieces(pipeline.transformer, dynamic={"hidden_states": 0, "encoder_hidden_states": 0}, sizes=[2, 8])

The first call is the example that the runner is prepared with. Results are clones: schedulers with a history
(diffusers' PNDM) keep what the module returned over several steps, when a graph would have written over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.engines.attached import Attached, twin
from fxpatch.piecewise.arguments import Arguments
from fxpatch.piecewise.runner import PiecewiseRunner


def run_in_pieces(module: torch.nn.Module, *, dynamic: Mapping[str, int | Sequence[int]], **options: Any) -> Attached:
    """From its next call on, the module is run by a `PiecewiseRunner`.

    Args:
        module: called by its owner, always in the same form; sizes in `dynamic` may change.
        dynamic: parameter name of its `forward` -> dimension(s) whose size changes, the batch as a rule. A first call
            of one element is prepared for with two of them.
        options: of `PiecewiseRunner`; `clone_outputs` is True unless given.

    Returns:
        The handle: `.runner` (its report, its counts), `.calls` (what went to the module itself), `.undo()`.

    Raises:
        AlreadyInstalledError: it is already.
        OptionError, SizesError: an option has a value that there is not.
        InputError, SplitError and others: as of `PiecewiseRunner.prepare`, at the first call.
    """
    prepared = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal prepared
        if not prepared:
            longer_args, longer_kwargs = _of_two(runner.model, args, kwargs, dynamic)
            runner.prepare(*longer_args, **longer_kwargs)
            attached.snapshot()
        why = attached.changed()
        if why is not None:
            attached.calls[why] += 1
            return attached.plain(*args, **kwargs)
        returned = runner(*args, **kwargs)
        prepared = True  # only now: a call that the module itself refuses is no example
        return returned

    runner = PiecewiseRunner(twin(module), dynamic=dynamic, **{"clone_outputs": True, **options})
    attached = Attached(module, forward)
    attached.runner = runner
    return attached


def _of_two(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Mapping[str, Any]) -> Any:
    """An example call; one of one element twice, since a size of 1 is traced as a constant."""
    form = Arguments.of(model, args, kwargs, dynamic)
    leaves = form.leaves(args, kwargs)
    if form.size(leaves) != 1:
        return args, kwargs
    longer: dict[int, torch.Tensor] = {}
    for each in form.inputs:
        value = leaves[each.leaf]
        for dim in each.dims:
            value = torch.cat([value, value], dim)
        longer[id(leaves[each.leaf])] = value
    return pytree.tree_map_only(torch.Tensor, lambda tensor: longer[id(tensor)], (args, dict(kwargs)))
