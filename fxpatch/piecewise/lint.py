"""What cannot be captured in a device graph, found before anything is captured.

Dynamo traces more than a device can capture: reading a value on the host, results whose size depends on data, tensors
on the host, collectives, random numbers on a device whose graphs have no generator. Each such operation gets a reason,
and with a reason it runs between the graphs. Capturing it would fail there at best; at worst the value of the capture
is replayed for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

Rule = Callable[[torch.fx.Node], str | None]


def reason(node: torch.fx.Node, rules: Iterable[Rule]) -> str | None:
    """The first reason that a rule gives."""
    return next(filter(None, (rule(node) for rule in rules)), None)


_READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
_RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *("multinomial", "poisson", "binomial", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_"),
    *("normal_", "random_", "uniform_", "rrelu", "gumbel_softmax"),
}
_WRITES = {  # besides those whose name ends with an underscore
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift"),
    *("irshift", "setitem", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "batch_norm"),
    *("relu", "dropout", "silu", "hardtanh", "elu", "selu", "celu", "leaky_relu", "threshold"),  # inplace by position
}
_DROPOUT = {"dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"}

_COLLECTIVES = {"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "_dtensor"}


def lint(device: str, *, registers_generator: bool) -> tuple[Rule, ...]:
    """The rules of a device type.

    Args:
        device: of the tensors that are captured, `"musa"`.
        registers_generator: whether its graphs advance the random state on replay.
    """

    def on_another_device(node: torch.fx.Node) -> str | None:
        found = {t.device.type for t in _tensors(node) if t.device.type != "meta"} - {device}
        return f"has tensors on {', '.join(sorted(found))}" if found else None

    def draws(node: torch.fx.Node) -> str | None:
        return "draws random numbers, and the device's graphs have no generator" if is_random(node) else None

    rules: list[Rule] = [reads_a_value, depends_on_data, is_collective]
    if device != "cpu":
        rules.append(on_another_device)
        if not registers_generator:
            rules.append(draws)
    return tuple(rules)


def reads_a_value(node: torch.fx.Node) -> str | None:
    """`.item()` and the like."""
    name = name_of(node)
    return f"reads a value on the host ({name})" if name in _READS or name == "_local_scalar_dense" else None


def depends_on_data(node: torch.fx.Node) -> str | None:
    """A size or number that is only known when the operation has run, among what goes in or comes out."""
    for value in (_value(node), *map(_value, node.all_input_nodes)):
        for leaf in pytree.tree_leaves(value):
            sizes = (*leaf.shape, leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else (leaf,)
            if any(map(unbacked, sizes)):
                return "has a size or number that depends on data"
    return None


def is_collective(node: torch.fx.Node) -> str | None:
    """What ranks do together, and the wait for it. A replay on one rank would wait inside of a graph for ranks that do
    not replay, and of the vendors' libraries few can be captured (Moore Threads' MCCL cannot)."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        return "is a collective" if target._qualified_op_name.split("::")[0] in _COLLECTIVES else None
    module = getattr(target, "__module__", None) or ""
    return "is a collective" if f"{module}.".startswith("torch.distributed.") else None


def is_random(node: torch.fx.Node) -> bool:
    """Whether an operation draws from a generator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(torch.Tag.nondeterministic_seeded in getattr(node.target, o).tags for o in node.target.overloads())
    name = name_of(node)
    if name in _DROPOUT:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return bool(training) and bool(node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5) != 0)
    if name == "scaled_dot_product_attention":
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) != 0)
    return name in _RANDOM


def writes(node: torch.fx.Node) -> bool:
    """Whether an operation may write to one of its arguments."""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        op: Any = node.target
        overloads = [op] if isinstance(op, torch._ops.OpOverload) else [getattr(op, name) for name in op.overloads()]
        return any(overload._schema.is_mutable for overload in overloads)
    name = name_of(node)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or bool(node.kwargs.get("out") is not None or node.kwargs.get("inplace", False))


def name_of(node: torch.fx.Node) -> str:
    """What an operation is called, whatever kind it is of: `"relu"`, `"item"`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _value(node: torch.fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _tensors(node: torch.fx.Node) -> Sequence[torch.Tensor]:
    values = [_value(node), *map(_value, node.all_input_nodes)]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def unbacked(size: Any) -> bool:
    """Whether a number is only known when the graph has run."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    return any(symbol_is_type(each, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) for each in size.node.expr.free_symbols)
