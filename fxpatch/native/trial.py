"""One operator's optimized forward tried: does it run, does it compute what the native one does, can Dynamo trace it
(in `graph_trial`: does a graph of it replay right, is it fast). The rule: every doubt is a refusal with a reason, and
nothing a trial does stays.

No trial runs an operator under FakeTensorMode: a kernel that takes raw pointers would get null there and take the
process with it. Dynamo is asked with real tensors; it refuses what takes pointers, and propagates fakes only through
operators that are registered as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxpatch.errors import FxPatchError
from fxpatch.native.absence import native_owners
from fxpatch.native.agreement import Deviation, Tolerance
from fxpatch.native.copies import Fresh, Saved, vary
from fxpatch.native.forwards import marked
from fxpatch.native.operators import NativeOperator
from fxpatch.native.outcome import Outcome, differences, observe
from fxpatch.native.recording import Call


class Captured(Protocol):
    """What a capture leaves: `result` is what the call returned, to be read after a `replay()`."""

    @property
    def result(self) -> Any: ...
    @property
    def replay(self) -> Callable[[], object]: ...
    @property
    def release(self) -> Callable[[], object]: ...


Capture = Callable[[Callable[[], Any]], Captured]


class Refused(Exception):
    """The optimized forward is not to be used; `str()` is the reason."""


@dataclass(frozen=True)
class Terms:
    """What all trials of one promotion share.

    Args:
        table: tolerances by dtype.
        capture: captures a call of no arguments; None: the device has no graphs, and capture is not tried.
        synchronize: waits for the device.
        splitting: whether a node of a graph stays outside captures; an operator with such a node is not captured.
        compiled: makes of a forward what is to be timed where replays cannot be.
    """

    table: Mapping[torch.dtype, Tolerance]
    capture: Capture | None
    synchronize: Callable[[], object]
    splitting: Callable[[torch.fx.Node], object] | None = None
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


class Trial:
    """One operator, and one example call of it.

    Args:
        op: the operator.
        call: its real arguments.
        ignore: leaf numbers of arguments that it may overwrite.
    """

    def __init__(self, op: NativeOperator, call: Call, terms: Terms, ignore: frozenset[int] = frozenset()) -> None:
        self.op, self.call, self.terms, self.ignore = op, call, terms, ignore
        self.error: Deviation | None = None

    def native(self, fresh: Fresh | None = None) -> Outcome:
        """What the native forward does; what it raises is the model's own error, and passes through."""
        return self.run(self.op.native, fresh or self.call.saved.fresh(), keep_new=True)

    def optimized(self) -> Outcome:
        """What the optimized forward does, on the real arguments.

        Raises:
            Refused: it raises.
        """
        try:
            seen = self.run(self.op.optimized, self.call.saved.fresh(), keep_new=True)
            self.terms.synchronize()
        except Exception as error:
            raise Refused(f"raises {first_line(error)}") from error
        return seen

    def numbers(self) -> Outcome:
        """Runs both forwards on the real arguments, and compares all that they did; returns what the optimized one did.

        What the optimized forward adds to its module stays: Dynamo could not add it. `promote` takes it away again
        where it refuses the operator.
        """
        expected, seen = self.native(), self.optimized()
        self.check(expected, seen, "differs from native")
        return seen

    def traces(self, sizes: Sequence[Call] = ()) -> torch.fx.GraphModule:
        """Has Dynamo alone trace the optimized forward into one graph, with the real arguments.

        Args:
            sizes: calls with other sizes; the dimensions that differ are traced as dynamic, and the graph has to serve
                them as well.
        """
        from torch._dynamo import config  # here: who only asks for a report or an operator needs no compiler

        graphs: list[torch.fx.GraphModule] = []

        def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
            graphs.append(gm)
            return gm.forward

        function = marked(self.op.optimized, f"<fxpatch trial {self.op.name}>")
        with torch.compiler.set_stance("default"), config.patch(disable=False):
            compiled = torch.compile(function, backend=backend, fullgraph=True)
            first = self.call.saved.fresh()
            _mark_dynamic(first, sizes)
            others = [vary(self.call.saved.fresh()), *(call.saved.fresh() for call in sizes)]
            for number, fresh in enumerate((first, *others)):
                expected = self.native(Saved(fresh.tree).fresh())
                try:
                    seen = self.run(compiled, fresh)
                except Exception as error:
                    raise Refused(f"Dynamo does not trace it: {first_line(error)}") from error
                self.check(expected, seen, "differs from native as Dynamo traced it")
                if len(graphs) != 1:
                    again = (
                        "another graph for other sizes or values" if number else "no graph (is Dynamo switched off?)"
                    )
                    raise Refused(f"Dynamo does not trace it for all calls: {again}")
        if any(self.op.name in native_owners(node, [self.op]) for node in graphs[0].graph.nodes):
            raise Refused(f"{self.op.optimized_name} calls forward_native itself")
        return graphs[0]

    def run(self, forward: Callable[..., Any], fresh: Fresh, *, keep_new: bool = False) -> Outcome:
        """Calls a forward with a copy of the arguments; random numbers are the same in every call."""
        args, kwargs = fresh.tree
        torch.manual_seed(0)
        return observe(self.op.module, fresh, lambda: forward(*args, **kwargs), keep_new=keep_new)

    def check(self, expected: Outcome, seen: Outcome, how: str) -> None:
        """Compares, and remembers the largest error.

        Raises:
            Refused: they differ.
        """
        error, wrong = differences(expected, seen, self.call.names, self.terms.table, ignore=self.ignore)
        self.error = error if self.error is None else self.error | error
        if wrong is not None:
            raise Refused(f"{how}: {wrong}")


def first_line(error: BaseException) -> str:
    """The error's type and the first line of what it says; for fxpatch's own errors, what was seen."""
    text = error.seen if isinstance(error, FxPatchError) else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "(no message)")
    return f"{type(error).__name__}: {line if len(line) <= 200 else line[:197] + '...'}"


def _mark_dynamic(fresh: Fresh, sizes: Sequence[Call]) -> None:
    """Marks the dimensions that have another size in another call. Sizes 0 and 1 are constants to Dynamo."""
    from torch._dynamo import mark_dynamic

    for call in sizes:
        others = call.saved.shapes()
        for leaf, other in zip(fresh.leaves, others, strict=False):
            if isinstance(leaf, torch.Tensor) and other is not None and len(other) == leaf.ndim:
                for dim, (ours, theirs) in enumerate(zip(leaf.shape, other, strict=True)):
                    if ours != theirs and min(ours, theirs) > 1:
                        mark_dynamic(leaf, dim)
