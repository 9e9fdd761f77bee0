"""Tensors that have no memory of their own: `DTensor`, and other classes that wrap tensors.

A replay reads and writes addresses, and such a tensor has none; what an operator does with it, its class decides while
it runs. A `DTensor`'s linear layer may communicate without a collective in the graph, and what it returns may still be
under way (`AsyncCollectiveTensor`). So no graph with them is captured: they are refused when the model is traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxpatch.errors import TraceError


def refuse_subclasses(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> None:
    """Checks what Dynamo traced.

    Args:
        gm: its graph.
        examples: what it takes.

    Raises:
        TraceError: it takes or makes a tensor that wraps others.
    """
    found = dict.fromkeys(_kinds(gm, examples))
    if found:
        raise TraceError(
            "The model computes with tensors that have no memory of their own.",
            seen=", ".join(found),
            expected="plain tensors: a replay reads and writes addresses",
            hint="give DTensor parameters as their local shards (to_local()), with functional collectives between "
            "them: examples/tensor_parallel.py",
        )


def _kinds(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Iterator[str]:
    values = [*examples, *(node.meta.get("example_value") for node in gm.graph.nodes)]
    for leaf in pytree.tree_leaves(values):
        if is_traceable_wrapper_subclass(leaf):
            yield type(leaf).__name__
