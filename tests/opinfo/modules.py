"""One ModuleInfo on the device and on the CPU, in training and evaluation mode: results, buffers, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.testing._internal.common_utils import set_rng_seed

from opinfo.cases import DTYPES, Case, chosen, infos
from opinfo.eager import SEED, Call, gradients, seed, strictness
from opinfo.results import Result


def run(case: Case, device: str) -> Result:
    """All inputs of a module at one eager stage."""
    result = Result(case)
    for position, call in calls(case, lambda module: module):
        result.add(position, call.verdict(device, strictness(case)))
    return result


def calls(case: Case, compiled: Callable[[torch.nn.Module], Callable[..., Any]]) -> Iterator[tuple[int, Call]]:
    """One call per input of a module, each with its position among all.

    Args:
        compiled: what to do with the module before it is called.
    """
    info, backward = infos("module")[case.name], case.stage.endswith("backward")
    set_rng_seed(SEED)
    every = [
        (training, each)
        for training in ((True, False) if info.train_and_eval_differ else (True,))
        for each in info.module_inputs_func(
            info, device="cpu", dtype=DTYPES[case.dtype], requires_grad=backward, training=training
        )
    ]
    taken = chosen(len(every), case.samples)
    for position, (training, each) in enumerate(every):
        if position in taken:
            torch.manual_seed(SEED)
            constructor = each.constructor_input
            original = info.module_cls(*constructor.args, **constructor.kwargs).to(DTYPES[case.dtype]).train(training)
            yield position, _call(original, each.forward_input, backward, compiled)


def _call(
    original: torch.nn.Module, inputs: Any, backward: bool, compiled: Callable[[torch.nn.Module], Callable[..., Any]]
) -> Call:
    def function(tree: Any) -> Any:
        args, kwargs, like = tree
        module = copy.deepcopy(original).to(like.device)
        seed(like.device.type)
        result = compiled(module)(*args, **kwargs)
        state = [*module.parameters(), *module.buffers()]
        return (gradients(result, (tree, state)) if backward else result), list(module.buffers())

    return Call(function, (inputs.args, inputs.kwargs, torch.zeros(())))
