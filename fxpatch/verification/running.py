"""Runs that can be compared: each from the same state of the model, with its own arguments and the same random numbers.

A backward pass is a part of a run: results are differentiated by the model's parameters and the arguments that require
grad, and nothing is accumulated anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fxpatch.verification.example import Example
from fxpatch.verification.held import Held
from fxpatch.verification.outcome import Outcome, outcome_of
from fxpatch.verification.randomness import Randomness


class Bench:
    """A model and what it is run from.

    Args:
        model: a module, or a function.
        example: what it is called with.
    """

    def __init__(self, model: Callable[..., Any], example: Example) -> None:
        self.model, self.example = model, example
        self.held = Held(model)
        devices = {each.device for each in example.call().tensors.values()}
        self.randomness = Randomness(devices | self.held.devices)

    def run(self, function: Callable[..., Any], *, backward: bool, other_numbers: bool = False) -> Outcome:
        """Calls a function that stands for the model, and says what it did.

        Args:
            function: called with the example's arguments.
            backward: with gradients; without, no graph of autograd is made.
            other_numbers: with other random numbers than everybody else.
        """
        self.restore()
        if other_numbers:
            self.randomness.other()
        call = self.example.call()
        with torch.set_grad_enabled(backward):
            result = function(*call.args, **call.kwargs)
            return outcome_of(result, call, self.held.now(), self._wrt(call.tensors) if backward else None)

    def restore(self) -> None:
        """The model and all generators as they were."""
        self.held.restore()
        self.randomness.restore()

    def differentiable(self) -> bool:
        """Whether anything could have a gradient."""
        return self.example.differentiable or any(each.requires_grad for each in self.held.parameters.values())

    def _wrt(self, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {f"argument {name}": each for name, each in arguments.items() if each.requires_grad and each.is_leaf}
        parameters = {name: each for name, each in self.held.parameters.items() if each.requires_grad}
        return {**inputs, **parameters}


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which nothing is compiled, whatever inside of it was given to `torch.compile`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return call


@contextmanager
def bench(model: Callable[..., Any], example: Example) -> Iterator[Bench]:
    """A bench; the model and all generators are afterwards what they were before, whatever happens."""
    made = Bench(model, example)
    try:
        yield made
    finally:
        made.restore()
