"""Cutting a graph, on graphs built by hand: the pieces one after the other give what the graph gives, each operation
with a reason runs between the others, and a piece is called views only if nothing in it computes."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule, Interpreter, Node, symbolic_trace

from fxpatch.piecewise.split import Piece, Split, Value, only_views, split

CUT = {"exp", "aminmax", "mul"}


def rule(node: Node) -> str | None:
    return "cut here" if getattr(node.target, "__name__", node.target) in CUT else None


class WithExamples(Interpreter):
    """Leaves each node's value where Dynamo does."""

    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


def with_examples(gm: GraphModule, *args: Any) -> GraphModule:
    WithExamples(gm).run(*args)
    return gm


def run(pieces: Split, *args: Any) -> list[Any]:
    """The results, by the numbers of the values alone."""
    values = dict(zip(pieces.feed, args, strict=True))
    for number, piece in enumerate(pieces.pieces):
        assert piece.index == number
        results = piece.gm(*(values[each] for each in piece.inputs))
        assert type(results) is tuple
        values.update(zip(piece.outputs, results, strict=True))
    assert sorted(values) == list(range(pieces.count))
    return [values[each.number] if isinstance(each, Value) else each for each in pieces.results]


STEPS = ("sin", "add", "exp", "mul", "aminmax", "chunk", "take")


def program(steps: list[tuple[str, int, int]], picks: list[int]) -> GraphModule:
    """Steps over a growing list of values of shape (4, 4); two placeholders."""
    graph = Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    tuples: list[Node] = []
    for kind, first, second in steps:
        a, b = values[first % len(values)], values[second % len(values)]
        if kind in ("sin", "exp"):
            values.append(graph.call_function(getattr(torch, kind), (a,)))
        elif kind in ("add", "mul"):
            values.append(graph.call_function(getattr(operator, kind), (a, b)))
        elif kind == "aminmax":
            tuples.append(graph.call_function(torch.aminmax, (a,), {"dim": 1, "keepdim": True}))
        elif kind == "chunk":
            tuples.append(graph.call_method("chunk", (a, 2, 1)))
        elif tuples:
            pair = tuples[first % len(tuples)]
            part = graph.call_function(operator.getitem, (pair, second % 2))
            values.append(graph.call_method("repeat", (part, 1, 2 if pair.target == "chunk" else 4)))
    graph.output((*(values[pick % len(values)] for pick in picks), 7, None))
    return with_examples(GraphModule({}, graph), torch.randn(4, 4), torch.randn(4, 4))


steps = st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=60)  # split_module takes 10 ms for each
@given(st.lists(steps, max_size=12), st.lists(st.integers(0, 20), max_size=3))
def test_the_pieces_give_what_the_graph_gives(drawn: list[tuple[str, int, int]], picks: list[int]) -> None:
    gm = program(drawn, picks)
    args = torch.randn(4, 4), torch.randn(4, 4)
    wanted = Interpreter(gm).run(*args)
    pieces = split(gm, [rule])
    for one, other in zip(run(pieces, *args), wanted, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one is other
    assert_what_has_a_reason_and_nothing_else_runs_between(gm, pieces.pieces)


def assert_what_has_a_reason_and_nothing_else_runs_between(gm: GraphModule, pieces: list[Piece]) -> None:
    assert sum(len(piece.reasons) for piece in pieces) == sum(rule(node) is not None for node in gm.graph.nodes)
    for piece in pieces:
        names = [getattr(n.target, "__name__", n.target) for n in piece.gm.graph.nodes if n.op.startswith("call_")]
        assert (piece.kind == "split") == bool(CUT & {*names})
        assert piece.reasons == tuple(f"{name}: cut here" for name in names if name in CUT)
        if piece.kind == "split":
            assert {*names} <= CUT | {"getitem"}
        else:
            assert piece.kind == ("views" if {*names} <= {"chunk", "getitem"} else "graph")
    for one, following in pairwise(piece.kind == "split" for piece in pieces):
        assert one is not following, "neighbours of one kind share a piece"


def test_taking_a_result_out_of_a_tuple_follows_it_past_other_pieces() -> None:
    """Both halves of what a split operator returns come out of its piece, also the one that is wanted later."""

    def function(x: torch.Tensor) -> torch.Tensor:
        pair = torch.aminmax(x, dim=1, keepdim=True)
        return (x + pair[0]).sin() + pair[1]

    x = torch.randn(4, 4)
    pieces = split(with_examples(symbolic_trace(function), x), [rule])
    assert [piece.kind for piece in pieces.pieces] == ["split", "graph"]
    assert len(pieces.pieces[0].outputs) == 2
    assert torch.equal(run(pieces, x)[0], function(x))


def test_a_row_of_a_split_operators_result_is_not_part_of_it() -> None:
    """`result[0]` of a tensor is a view, and no taking of one of several results."""
    x = torch.randn(4, 4)
    pieces = split(with_examples(symbolic_trace(lambda x: x.exp()[0]), x), [rule])
    assert [piece.kind for piece in pieces.pieces] == ["split", "views"]
    assert torch.equal(run(pieces, x)[0], x.exp()[0])


def test_a_result_alone_and_a_graph_without_operations() -> None:
    x = torch.randn(4)
    assert torch.equal(run(split(with_examples(symbolic_trace(lambda x: x.sin()), x), []), x)[0], x.sin())
    nothing = split(with_examples(symbolic_trace(lambda x, y: (y, 3)), x, x), [rule])
    assert (nothing.pieces, nothing.feed, nothing.results, nothing.count) == ([], [0, 1], [Value(1), 3], 2)


def test_values_and_pieces_without_a_reason() -> None:
    assert Value(1) == Value(1)
    assert {Value(1): "a"}[Value(1)] == "a"
    (piece,) = split(with_examples(symbolic_trace(lambda x: x.sin()), torch.randn(2)), []).pieces
    assert (piece.kind, piece.reasons, piece.inputs, piece.outputs) == ("graph", (), (0,), (1,))


@pytest.mark.parametrize("function", [lambda x: x.sin(), lambda x: torch.sin(x)])
def test_what_is_left_outside_of_the_pieces_is_an_error(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setattr("fxpatch.piecewise.split.split_module", lambda gm, *_, **__: gm)
    with pytest.raises(AssertionError, match=r"split_module left %sin .* outside of the pieces"):
        split(with_examples(symbolic_trace(function), torch.randn(2)), [])


VIEWS: dict[str, Any] = {
    "view": lambda x: x.view(16),
    "view_as": lambda x: x.view_as(x),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(0),
    "expand": lambda x: x.expand(2, 4, 4),
    "expand_as": lambda x: x.expand_as(x),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "select": lambda x: x.select(0, 1),
    "split": lambda x: x.split(2)[0],
    "chunk": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unbind()[1],
    "t": lambda x: x.t(),
    "movedim": lambda x: x.movedim(0, 1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "unflatten": lambda x: x.unflatten(0, (2, 2)),
    "detach": lambda x: x.detach(),
    "diagonal": lambda x: x.diagonal(),
    "an attribute": lambda x: x.mT,
    "sizes": lambda x: x.view(x.size(0) * x.size(1) + x.dim() - x.numel() // 8 % 3, -x.dim() + 3),
    "a row": lambda x: x[1],
    "rows": lambda x: x[1:3],
    "a column": lambda x: x[:, 2],
    "by a number of the graph": lambda x: x[x.dim() - 1],
    "by numbers of the graph": lambda x: x[x.dim() - 1, None, x.dim()],
    "an axis, and the rest": lambda x: x[None, ..., 1],
}
OTHERS: dict[str, Any] = {
    "sin": lambda x: x.sin(),
    "clone": lambda x: x.clone(),
    "a view and more": lambda x: x.t().sin().t(),
    "more and a view": lambda x: x.sin().t(),
    "a view of what is computed first": lambda x: x.t() + 1,
    "add": lambda x: x + 2,
    "sub": lambda x: x - 2,
    "mul": lambda x: x * 2,
    "floordiv": lambda x: x // 2,
    "mod": lambda x: x % 2,
    "neg": lambda x: -x,
    "by a list": lambda x: x[[0, 1]],
    "by a list, and more": lambda x: x[:, [0, 1]],
    "by True": lambda x: x[True],
    "by True, and more": lambda x: x[None, True],
    "by a tensor": lambda x: x[x.argmax(0)],
}


def addresses(gm: GraphModule, x: torch.Tensor) -> bool:
    """Whether every tensor of the graph lies in x's memory."""
    tensors = [v for n in gm.graph.nodes if isinstance(v := n.meta["example_value"], torch.Tensor)]
    return all(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in tensors)


@pytest.mark.parametrize("what", [*VIEWS, *OTHERS])
def test_only_views(what: str) -> None:
    function = {**VIEWS, **OTHERS}[what]
    x = torch.randn(4, 4)
    gm = with_examples(symbolic_trace(function), x)
    assert only_views(gm) is addresses(gm, x) is (what in VIEWS)


@pytest.mark.parametrize("index", [lambda i: i, lambda i: (slice(None), i), lambda i: (i, slice(None))])
def test_indexing_by_a_tensor_that_comes_in_is_no_view(index: Any) -> None:
    x, rows = torch.randn(4, 4), torch.tensor([1, 2])
    gm = with_examples(symbolic_trace(lambda x, rows: x[index(rows)]), x, rows)
    assert not only_views(gm)


def test_a_constant_of_the_module_computes_nothing() -> None:
    module = torch.nn.Linear(4, 4)
    graph = Graph()
    graph.placeholder("x")
    graph.output(graph.call_method("t", (graph.get_attr("weight"),)))
    assert only_views(with_examples(GraphModule(module, graph), torch.randn(4)))
