"""The first operator that compiled code gets wrong, found by bisection over Dynamo's graph.

The graph up to a node, with that node as its only result, is compiled by the stage's own backend and compared with
`torch.fx.Interpreter` on the same graph: whatever is wrong in between (a decomposition, a fusion, a kernel, a backward)
is in one and not in the other. The search halves between a node that agrees and one that differs. Errors need not be
monotone, so what it ends with is checked: the node differs, and everything it reads agrees, each compiled on its own;
where an operand differs, the search goes on there.

Where a single result hides the error (a compiler may merge operations only where both are kept), all values that are
still needed behind the node are results too; where that hides it as well, the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from fxpatch.difference import Difference
from fxpatch.native.copies import Saved
from fxpatch.piecewise.roundings import roundings
from fxpatch.tolerance import Tolerance
from fxpatch.verification.example import Call
from fxpatch.verification.nodes import is_in, line_of, named, operator_name, prefix, shapes_of, writes_in_place
from fxpatch.verification.outcome import Outcome, outcome_of
from fxpatch.verification.randomness import Randomness

Way = Callable[[GraphModule], Callable[..., Any]]


@dataclass(frozen=True)
class Operator:
    """The first operator that differs.

    Args:
        node: its name in Dynamo's graph.
        operator: what it calls: `"aten::add"`, `"softmax"`.
        line: the source line that calls it, with its file; empty where tracing did not keep it.
        shapes: of what it reads and returns.
        what: how it differs, in words.
        written: operators before it that write in place to what it reads: the order of these and of the reads is what
            compilers get wrong.
        certain: it differs, and what it reads agrees.
        doubt: why that is not certain.
        tries: how many graphs were compiled.
    """

    node: str
    operator: str
    line: str
    shapes: str
    what: str
    written: tuple[str, ...] = ()
    certain: bool = field(init=False)
    doubt: str = ""
    tries: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "certain", not self.doubt)

    def __str__(self) -> str:
        text = f"{self.operator} ({self.node}) {self.shapes}"
        if self.line:
            text += f"\n  {self.line}"
        text += f"\n  {self.what}"
        if self.written:
            text += f"\n  what it reads is written in place by {'; '.join(self.written)}"
        return text if self.certain else f"{text}\n  ({self.doubt})"


class GraphCall:
    """A graph of Dynamo's and what it was called with.

    Args:
        gm: the graph.
        inputs: tensors and sizes.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self.gm = gm
        self._saved = Saved(list(inputs))
        self._requires_grad = [isinstance(each, torch.Tensor) and each.requires_grad for each in inputs]

    def inputs(self) -> list[Any]:
        """Copies."""
        fresh = self._saved.fresh().leaves
        for each, wanted in zip(fresh, self._requires_grad, strict=True):
            if wanted:
                each.requires_grad_()
        return fresh


class Recording:
    """A backend that interprets, and keeps every graph with its inputs, in the order of their calls."""

    def __init__(self) -> None:
        self.calls: list[GraphCall] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls.append(GraphCall(gm, args))
            return Interpreter(gm).run(*args)

        return run


class Search:
    """The search in one graph.

    Args:
        recorded: the graph and its inputs.
        way: makes of a graph what is to be compared with interpreting it.
        backward: with gradients.
        randomness: put back before each run.
        tolerances: by dtype.
        strict: with one rounding, however many there are on the way.
        strides: whether they count.
    """

    def __init__(
        self,
        recorded: GraphCall,
        way: Way,
        *,
        backward: bool,
        randomness: Randomness,
        tolerances: Mapping[torch.dtype, Tolerance],
        strict: bool = False,
        strides: bool = False,
    ) -> None:
        self.recorded, self.way, self.backward = recorded, way, backward
        self.randomness, self.tolerances, self.strict = randomness, tolerances, strict
        self.strides = strides
        self.nodes = [node for node in recorded.gm.graph.nodes if node.op in ("call_function", "call_method")]
        self._known: dict[tuple[Node, bool], Difference | None] = {}

    @property
    def tries(self) -> int:
        """How many graphs have been compiled."""
        return len(self._known) + 1

    def whole(self) -> Difference | None:
        """Whether the graph differs at all."""
        return self._difference(self.recorded.gm)

    def find(self, layer: str = "") -> Operator | None:
        """The first operator that differs; None where the graph as a whole does not.

        Args:
            layer: where to look first, by its name in the model: it takes fewer compilations.
        """
        whole = self.whole()
        if whole is None:
            return None
        inside = [i for i, node in enumerate(self.nodes) if layer and is_in(node, layer)]
        if inside and self._at(inside[-1], False) is not None:
            return self._operator(self._first(inside[-1], False, inside[0] - 1), False)
        for live in (False, True):
            last = self._last(live)
            if last is not None:
                i = self._first(last, live)
                late = inside and inside[-1] < i
                doubt = f"{layer} is wrong before it: the mistake is made only in a graph with both" if late else ""
                return self._operator(i, live, doubt)
        node, what = self.nodes[-1], f"only the whole graph differs: {whole}"
        names = (node.name, operator_name(node), line_of(node), shapes_of(node), what, self._written(node))
        doubt = "the last one: no part of the graph differs on its own"
        return Operator(*names, doubt=doubt, tries=self.tries)

    def _last(self, live: bool) -> int | None:
        """A node that differs: the last one that does among the graph's results."""
        (output,) = (node for node in self.recorded.gm.graph.nodes if node.op == "output")
        results = sorted(
            (self.nodes.index(each) for each in output.all_input_nodes if each in self.nodes), reverse=True
        )
        if self.nodes and len(self.nodes) - 1 not in results:
            results.insert(0, len(self.nodes) - 1)  # it may write to an argument
        return next((i for i in results if self._at(i, live) is not None), None)

    def _first(self, differs: int, live: bool, agrees: int = -1) -> int:
        """The node that differs while what it reads agrees, each in a graph that ends with it.

        Args:
            differs: a node that does.
            agrees: one before it that may agree; nothing is concluded from that.
        """
        while True:
            while differs - agrees > 1:
                middle = (agrees + differs) // 2
                if self._at(middle, live) is None:
                    agrees = middle
                else:
                    differs = middle
            if live:
                return differs
            read = [self.nodes.index(each) for each in self._reads(self.nodes[differs]) if each in self.nodes]
            wrong = [i for i in read if i < differs and self._at(i, live) is not None]
            if not wrong:
                return differs
            agrees, differs = -1, min(wrong)  # earlier every time, so this ends

    def _at(self, i: int, live: bool) -> Difference | None:
        key = (self.nodes[i], live)
        if key not in self._known:
            self._known[key] = self._difference(prefix(self.recorded.gm, self.nodes[i], live=live))
        return self._known[key]

    def _difference(self, gm: GraphModule) -> Difference | None:
        expected = self._run(Interpreter(gm).run)
        seen = self._run(self.way(gm))
        found = 1 if self.strict else roundings([gm], backward=self.backward)
        return seen.difference(expected, self.tolerances, found, self.strides)

    def _run(self, function: Callable[..., Any]) -> Outcome:
        self.randomness.restore()
        inputs = self.recorded.inputs()
        call = Call(tuple(inputs), {})
        wrt = {name: each for name, each in call.tensors.items() if each.requires_grad} if self.backward else None
        with torch.set_grad_enabled(self.backward):
            return outcome_of(function(*inputs), call, {}, wrt)

    def _reads(self, node: Node) -> list[Node]:
        """What a node reads: its operands, and what has written to them before."""
        order = {each: i for i, each in enumerate(self.recorded.gm.graph.nodes)}
        found = list(node.all_input_nodes)
        found += [user for each in node.all_input_nodes for user in each.users if writes_in_place(user)]
        return [each for each in dict.fromkeys(found) if order[each] < order[node]]

    def _written(self, node: Node) -> tuple[str, ...]:
        """The operators before a node that write to something it depends on, also after that has been read."""
        order = {each: i for i, each in enumerate(self.recorded.gm.graph.nodes)}
        depends = {node}
        todo = [node]
        while todo:
            new = [each for each in self._reads(todo.pop()) if each not in depends]
            depends.update(new)
            todo += new
        found = [each for each in self.nodes if order[each] < order[node] and writes_in_place(each)]
        return tuple(named(each) for each in found if depends & set(each.all_input_nodes))[-3:]

    def _operator(self, i: int, live: bool, doubt: str = "") -> Operator:
        node = self.nodes[i]
        what = str(self._at(i, live))
        if live:
            what += " (only with all values kept that are needed behind it)"
        names = (node.name, operator_name(node), line_of(node), shapes_of(node), what, self._written(node))
        return Operator(*names, doubt=doubt, tries=self.tries)
