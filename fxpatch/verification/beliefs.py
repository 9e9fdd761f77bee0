"""What tracing believes of each operator, against what the operator does. A fake kernel that says another dtype makes
compiled code read past the end of memory, so this is asked before any such code runs; one that says another stride, or
another number, makes it wrong. So does an operator that writes to an argument and does not say so in its schema.

Dynamo's graph is interpreted on real tensors, and each node's value compared with the fake one that tracing kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fxpatch.piecewise.bits import same_bits
from fxpatch.piecewise.lint import name_of

_TORCHS = frozenset({"aten", "prims", "prim"})  # their schemas are right: torch tests them
_IN_PLACE = frozenset(
    (
        "unsqueeze_",
        "squeeze_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "resize_",
        "resize_as_",
        "set_",
        "as_strided_",
    )
)


@dataclass(frozen=True)
class Lie:
    """An operator that is not what tracing believes.

    Args:
        node: of Dynamo's graph.
        what: in words.
        unsafe: whether compiled code could reach memory that is not its own.
    """

    node: Node
    what: str
    unsafe: bool


class Believed:
    """A backend that interprets, and collects `lies`."""

    def __init__(self) -> None:
        self.lies: list[Lie] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return lambda *args: _Watching(gm, self.lies).run(*args)


class _Watching(Interpreter):
    def __init__(self, gm: GraphModule, lies: list[Lie]) -> None:
        super().__init__(gm)
        self._lies = lies
        self._values: list[tuple[Node, Any, bool]] | None = [] if any(map(_reshapes, gm.graph.nodes)) else None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run(*args, **kwargs)
        for node, value, layout in self._values or ():
            self._believe(node, value, layout)
        return result

    def run_node(self, n: Node) -> Any:
        watched = _custom(n)
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        if watched is not None and not watched._schema.is_mutable:
            given = pytree.tree_leaves(self.fetch_args_kwargs_from_env(n))
            before = [(each, each.detach().clone()) for each in given if isinstance(each, torch.Tensor)]
        value = super().run_node(n)
        written = [i for i, (tensor, copy) in enumerate(before) if same_bits(tensor, copy) is False]
        if written:
            arguments = ", ".join(map(str, written))
            what = f"writes to its tensor argument {arguments}, and its schema does not say so: compiled code drops it"
            self._lies.append(Lie(n, what, unsafe=False))
        if n.op in ("call_function", "call_method") and "example_value" in n.meta:
            if self._values is None:
                self._believe(n, value, watched is not None)
            else:  # tracing has kept what became of each tensor in the end
                self._values.append((n, value, watched is not None))
        return value

    def _believe(self, node: Node, value: Any, layout: bool) -> None:
        lie = _lie(node, node.meta["example_value"], value, layout=layout)
        if lie is not None:
            self._lies.append(lie)


def _reshapes(node: Node) -> bool:
    """Whether an operator changes the shape or the strides of its argument in place."""
    return "out" in node.kwargs or name_of(node).split(".")[0] in _IN_PLACE


def _lie(node: Node, fake: Any, real: Any, *, layout: bool) -> Lie | None:
    """The first thing that is not as believed."""
    believed, found = pytree.tree_leaves(fake), pytree.tree_leaves(real)
    if len(believed) != len(found):
        return Lie(node, f"returns {len(found)} values, and its fake {len(believed)}", unsafe=True)
    for one, other in zip(believed, found, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            for what in ("dtype", "device", "shape"):
                is_, said = getattr(other, what), getattr(one, what)
                if not _agree(is_, said):
                    return Lie(node, f"returns {what} {_words(is_)}, and its fake says {_words(said)}", unsafe=True)
            if layout and other.numel() and not _strided_alike(other, one):
                said = _words(one.stride())
                return Lie(node, f"returns strides {_words(other.stride())}, and its fake says {said}", unsafe=True)
        elif type(one) in (int, float, bool, str) and type(other) is type(one) and one != other:
            what = f"returns {other!r} in this call, and its fake says {one!r}, which is a constant in compiled code"
            return Lie(node, what, unsafe=False)
    return None


def _strided_alike(real: torch.Tensor, fake: torch.Tensor) -> bool:
    sides = zip(real.shape, real.stride(), fake.stride(), strict=True)
    return all(_agree(one, other) for side, one, other in sides if side > 1)


def _agree(real: Any, fake: Any) -> bool:
    """Whether they are the same, as far as tracing says: a size that it left open is any."""
    if isinstance(real, torch.Size):
        return len(real) == len(fake) and all(map(_agree, real, fake))
    if isinstance(fake, torch.SymInt):
        return True
    if isinstance(real, torch.device):
        return real.type == fake.type and (fake.index is None or real.index is None or real.index == fake.index)
    return bool(real == fake)


def _words(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _custom(node: Node) -> Any:
    """The overload that a node calls, where that is not torch's own."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in _TORCHS:
        return target
    return None
