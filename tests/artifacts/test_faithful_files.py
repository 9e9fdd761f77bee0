"""What a file cannot hold is refused when it is saved: nothing that changes results is dropped without a word."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fxpatch
from fxpatch.artifacts import files
from fxpatch.errors import ArtifactError

X = torch.arange(4.0)


def again(what: Any, **options: Any) -> Any:
    return files.loads(files.dumps(what), **options)


def adds_one() -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(lambda x: x + 1)


class Scaled(torch.fx.GraphModule):
    """Its call does more than its graph."""

    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class Holds(torch.nn.Module):
    """A leaf of a graph, with an attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.held["missing"]


def around(leaf: torch.nn.Module) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.call_module("leaf", (graph.placeholder("x"),)))
    return torch.fx.GraphModule(torch.nn.ModuleDict({"leaf": leaf}), graph)


def with_subclass() -> torch.fx.GraphModule:
    traced = adds_one()
    return Scaled(traced, traced.graph)


def with_forward() -> torch.fx.GraphModule:
    traced = adds_one()
    traced.forward = types.MethodType(lambda self, x: x * 100, traced)
    return traced


def with_other_code() -> torch.fx.GraphModule:
    traced = adds_one()
    traced.graph.on_generate_code(lambda _: lambda body: [line.replace("+ 1", "+ 50") for line in body])
    traced.recompile()
    return traced


@pytest.mark.parametrize(
    ("make", "result", "words"),
    [
        (with_subclass, [2, 4, 6, 8], "is a Scaled, of which only a GraphModule's own part could be saved"),
        (with_forward, [0, 100, 200, 300], "has a forward of its own"),
        (with_other_code, [50, 51, 52, 53], r"changed after it is generated \(Graph.on_generate_code\)"),
        (lambda: around(Holds(collections.Counter())), [0, 1, 2, 3], "an attribute is a collections.Counter"),
        (lambda: around(Holds(collections.defaultdict(int))), [0, 1, 2, 3], "collections.defaultdict"),
    ],
)
def test_what_is_more_than_its_graph(make: Callable[[], Any], result: list[float], words: str) -> None:
    made = make()
    assert made(X).tolist() == result
    with pytest.raises(ArtifactError, match=words):
        files.dumps(made)


def test_lists_and_dicts_of_fx_are_plain() -> None:
    graph = torch.fx.Graph()
    graph.output({"list": [graph.placeholder("x")], "more": {"n": [1, 2]}})
    found = again(torch.fx.GraphModule({}, graph))(3)
    assert found == {"list": [3], "more": {"n": [1, 2]}}


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_tensor_is_refused(hook: str) -> None:
    made = adds_one()
    made.weight = torch.nn.Parameter(torch.ones(2))
    handle = getattr(made.weight, hook)(lambda given: given)
    with pytest.raises(ArtifactError, match=r"weight is a tensor with hooks(?s:.*)remove its hooks"):
        files.dumps(made)
    handle.remove()
    assert again(made).weight.tolist() == [1, 1]


def written_and_read(one: torch.Tensor, other: torch.Tensor) -> torch.fx.GraphModule:
    root, graph = torch.nn.Module(), torch.fx.Graph()
    root.register_buffer("one", one)
    root.register_buffer("other", other)
    graph.call_method("add_", (graph.get_attr("one"), graph.placeholder("x")))
    graph.output(graph.call_method("clone", (graph.get_attr("other"),)))
    return torch.fx.GraphModule(root, graph)


def test_memory_that_is_in_two_storages_is_shared_again() -> None:
    memory = bytearray(16)
    one, other = (torch.frombuffer(memory, dtype=torch.float32) for _ in range(2))
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    made = written_and_read(one, other)
    loaded = again(made)
    assert loaded(X).tolist() == made(X).tolist() == X.tolist()


@pytest.mark.parametrize("turned", [False, True])
def test_memory_that_is_partly_in_two_storages_is_refused(turned: bool) -> None:
    memory = bytearray(32)
    pair = [torch.frombuffer(memory, dtype=torch.float32, offset=at, count=4) for at in (0, 8)]
    apart = [torch.frombuffer(memory, dtype=torch.float32, offset=at, count=4) for at in (0, 16)]
    with pytest.raises(ArtifactError, match="shares some of its memory with a tensor before it"):
        files.dumps(written_and_read(*(pair[::-1] if turned else pair)))
    assert again(written_and_read(*apart))(X).tolist() == [0] * 4


# -- what can be saved -------------------------------------------------------------------------------------------------


def test_graphs_of_functions_without_a_name() -> None:
    """FX calls their class `<lambda>`; so it calls graphs of AOTAutograd and of make_fx, and their subgraphs."""
    made = adds_one()
    assert type(made).__name__ == "<lambda>"
    assert again(made)(X).tolist() == [1, 2, 3, 4]

    def branches(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))

    loaded = again(make_fx(branches)(X))
    assert [loaded(X).tolist(), loaded(-X).tolist()] == [[1, 2, 3, 4], [-1, -2, -3, -4]]


def test_dynamos_graph_with_branches() -> None:
    """Its subgraphs have attributes that no module has, `__name__`; nothing of the graph reads them."""
    got: list[torch.fx.GraphModule] = []

    def f(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))

    torch.compile(f, backend=lambda made, _: got.append(made) or made)(X)
    torch._dynamo.reset()
    assert again(got[0])(-X)[0].tolist() == [-1, -2, -3, -4]


def test_a_module_within_itself() -> None:
    leaf = Holds({})
    leaf.again = leaf
    with pytest.raises(ArtifactError, match=r"leaf.again is a module that it is part of"):
        files.dumps(around(leaf))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path.name} is no regular file"):
        fxpatch.load(tmp_path)


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    fxpatch.save(adds_one(), path)
    assert fxpatch.load(path)(X).tolist() == [1, 2, 3, 4]


# -- exported programs -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    one: torch.Tensor
    other: torch.Tensor


class OfPair(torch.nn.Module):
    def forward(self, pair: Pair) -> torch.Tensor:
        return pair.one + pair.other


class GivesText(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x + 1, "text"


def test_a_program_that_torch_cannot_write() -> None:
    torch.export.register_dataclass(Pair)
    try:
        program = torch.export.export(OfPair(), (Pair(X, X),))
        with pytest.raises(ArtifactError, match=r"torch cannot write this program(?s:.*)serialized_type_name"):
            files.dumps(program)
    finally:
        pytree._deregister_pytree_node(Pair)


def test_a_program_that_torch_writes_and_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="torch cannot write this program, or read it again: SerializeError"):
        fxpatch.save(torch.export.export(GivesText(), (X,)), tmp_path / "p.fx")
    assert list(tmp_path.glob("*.fx")) == []


def test_example_inputs_keep_their_gradients() -> None:
    program = torch.export.export(torch.nn.Linear(4, 2), (X.clone().requires_grad_(),))
    assert again(program).example_inputs[0][0].requires_grad
