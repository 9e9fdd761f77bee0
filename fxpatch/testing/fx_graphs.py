"""A Hypothesis strategy for small FX graphs of tensors: device literals, views, in-place operators, operators with
several results, calls of functions, methods and modules, mixed dtypes, placeholders with awkward names.

The problem: a graph drawn node by node is mostly invalid (shapes), and shrinks badly, because every node depends on
those before. The rule: what is drawn is a list of steps, each a kind of operator and a few numbers, that make sense
in any state of the graph: a number picks among the values there are, modulo their count. So every list is valid, also
one with steps taken out.

Inputs are small integers, and no operator leaves the integers or lets them grow: results are exact in every dtype
drawn, whatever the order of a sum, and can be compared with `torch.equal`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.fx import GraphModule

from fxpatch.testing.fx_steps import KINDS, Builder


@dataclass(frozen=True)
class Step:
    """One operator: a key of `KINDS`, and the numbers that it takes its operands and parameters from.

    Args:
        kind: the operator.
        first, second: which earlier values are its operands.
        number: what its other parameters are drawn from.
    """

    kind: str
    first: int
    second: int
    number: int


@dataclass(frozen=True)
class Input:
    """A placeholder, and the tensor to call the graph with.

    Args:
        name: of the placeholder.
        shape: of the tensor.
        dtype: of its elements, which are small integers.
        transposed: its strides are those of the reversed shape, permuted back.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool

    def build(self, random: torch.Generator, device: str | torch.device) -> torch.Tensor:
        """The tensor, on `device`, with values from -3 to 3 that `random` draws on the CPU."""
        shape = tuple(reversed(self.shape)) if self.transposed else self.shape
        values = torch.randint(-3, 4, shape, generator=random).to(self.dtype).to(device)
        return values.permute(tuple(reversed(range(values.dim())))) if self.transposed else values


@dataclass(frozen=True)
class FxGraph:
    """A graph in words.

    Args:
        device: what its literals say.
        placeholders, steps: what it takes, and what it does.
        results: numbers that pick what is returned.
        returns: "one", "tuple" or "dict".
        seed: of the inputs' values.
    """

    device: str
    placeholders: tuple[Input, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    returns: str
    seed: int

    def inputs(self, device: str | torch.device | None = None) -> tuple[torch.Tensor, ...]:
        """Example inputs, new at each call and always the same; on the graph's device unless another is given.

        Args:
            device: where the inputs are made.
        """
        random = torch.Generator().manual_seed(self.seed)
        return tuple(each.build(random, self.device if device is None else device) for each in self.placeholders)

    def build(self, device: str | torch.device | None = None) -> GraphModule:
        """The graph module; with `device`, its literals name that device instead."""
        builder = Builder(torch.device(self.device if device is None else device))
        for placeholder, value in zip(self.placeholders, self.inputs("meta"), strict=True):
            builder.add(builder.graph.placeholder(placeholder.name), value)
        for step in self.steps:
            KINDS[step.kind](builder, builder.pick(step.first), builder.pick(step.second), step.number)
        nodes = [builder.pick(number).node for number in self.results]
        if self.returns == "one":
            builder.graph.output(nodes[0])
        elif self.returns == "tuple":
            builder.graph.output(tuple(nodes))
        else:
            builder.graph.output({"first": nodes[0], "all": nodes})
        return GraphModule({"relu": torch.nn.ReLU()}, builder.graph)


@st.composite
def fx_graphs(draw: st.DrawFn, device: str, *, max_inputs: int = 3, max_steps: int = 6) -> FxGraph:
    """Small FX graphs whose literals name `device`; `.build()` makes the module, `.inputs()` arguments for it.

    Args:
        device: a device type, or a device with an index.
        max_inputs, max_steps: how large they may get.
    """
    # `device` is what generated code calls to make a device (and `torch` is what it calls everything on: no placeholder
    # may have that name, on any device)
    inputs = st.builds(
        Input,
        name=st.sampled_from(["x", "y", "device", "input"]),
        shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
        dtype=st.sampled_from([torch.float32, torch.int64, torch.bfloat16]),
        transposed=st.booleans(),
    )
    numbers = st.integers(0, 59)
    steps = st.builds(Step, st.sampled_from(list(KINDS)), numbers, numbers, numbers)
    return FxGraph(
        device=device,
        placeholders=tuple(draw(st.lists(inputs, min_size=1, max_size=max_inputs, unique_by=lambda each: each.name))),
        steps=tuple(draw(st.lists(steps, max_size=max_steps))),
        results=tuple(draw(st.lists(numbers, min_size=1, max_size=3))),
        returns=draw(st.sampled_from(["one", "tuple", "dict"])),
        seed=draw(st.integers(0, 2**16)),
    )
