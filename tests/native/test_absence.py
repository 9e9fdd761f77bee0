"""The native path is not in the graph, asserted on the graph; a graph in which it is, or may be, is refused by name."""

from __future__ import annotations

from typing import Any

import operators_zoo as zoo
import pytest
import torch

from fxpatch.native import Decision, Decisions, NativePathError, assert_native_absent, find_operators, native


@pytest.fixture(autouse=True)
def no_compiled_code() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def promoted(model: torch.nn.Module, *names: str) -> Decisions:
    """Decisions that promote these operators."""
    operators = find_operators(model, "musa")
    chosen = {op.name: "optimized" if op.name in names else "native" for op in operators}
    return Decisions(operators, [Decision(op.name, op.kind, "forward_musa", chosen[op.name], "") for op in operators])


def traced(model: torch.nn.Module) -> torch.fx.GraphModule:
    graphs: list[torch.fx.GraphModule] = []
    with torch.no_grad():
        torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(torch.ones(4, 16))
    (graph,) = graphs
    return graph


def test_a_graph_traced_by_the_decisions_passes() -> None:
    model = zoo.Model(zoo.Good, zoo.Good, zoo.Good)
    decisions = promoted(model, "layers.0", "layers.2")
    with decisions.apply():
        graph = traced(model)
    assert assert_native_absent(graph, decisions) > 40  # the native one is in it, by right


def test_a_stale_trace_is_refused_and_names_operator_and_nodes() -> None:
    model = zoo.Model(zoo.Good, zoo.Good)
    with native(find_operators(model, "musa")):
        graph = traced(model)
    decisions = promoted(model, "layers.1")
    with pytest.raises(NativePathError) as caught:
        assert_native_absent(graph, decisions)
    assert caught.value.what == "The native forward of a promoted operator is in the graph."
    assert caught.value.seen.startswith("layers.1: y_")
    assert "layers.0" not in caught.value.seen
    assert caught.value.seen.endswith(" more")
    assert caught.value.expected == "nodes of forward_musa only"


@pytest.mark.parametrize("kind", [zoo.Delegating, zoo.FallingBackWhileTracing])
def test_an_optimized_forward_that_calls_the_native_one_is_refused(kind: type[zoo.Good]) -> None:
    model = zoo.Model(kind)
    decisions = promoted(model, "layers.0")
    with decisions.apply():
        graph = traced(model)
    with pytest.raises(NativePathError, match=r"layers\.0: "):
        assert_native_absent(graph, decisions)


def test_without_markers_the_module_stack_tells_equal_instances_apart() -> None:
    model = zoo.Model(zoo.Good, zoo.Good)
    model.layers[0].forward = model.layers[0].forward_native  # an engine's own dispatch
    graph = traced(model)
    assert assert_native_absent(graph, promoted(model, "layers.1")) > 0
    with pytest.raises(NativePathError, match=r"layers\.0: "):
        assert_native_absent(graph, promoted(model, "layers.0"))


def test_without_the_module_stack_markers_tell_equal_instances_apart() -> None:
    model = zoo.Model(zoo.Good, zoo.Good)
    decisions = promoted(model, "layers.0")
    with decisions.apply():
        graph = traced(model)
    for node in graph.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    assert assert_native_absent(graph, decisions) > 0
    with pytest.raises(NativePathError, match=r"layers\.1: "):
        assert_native_absent(graph, promoted(model, "layers.0", "layers.1"))


def test_what_cannot_be_told_is_refused() -> None:
    model = zoo.Model(zoo.Good, zoo.Good)
    model.layers[0].forward = model.layers[0].forward_native
    graph = traced(model)
    for node in graph.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(NativePathError, match=r"layers\.1: "):
        assert_native_absent(graph, promoted(model, "layers.1"))
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)
    with pytest.raises(NativePathError, match="It cannot be told whether the native forwards are in the graph"):
        assert_native_absent(graph, promoted(model, "layers.1"))
    assert assert_native_absent(graph, promoted(model)) == 0


def test_graphs_within_graphs_are_looked_at() -> None:
    model = zoo.Model(zoo.Good)
    with native(find_operators(model, "musa")):
        inner = traced(model)
    outer = torch.fx.symbolic_trace(torch.nn.Identity())
    outer.add_submodule("piece", inner)
    with pytest.raises(NativePathError):
        assert_native_absent(outer, promoted(model, "layers.0"))


def test_it_holds_for_the_graph_that_aot_autograd_makes() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    model = zoo.Model(zoo.Good, zoo.Good)
    decisions = promoted(model, "layers.0")
    with torch.no_grad(), decisions.apply():
        torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(torch.ones(4, 16))
    assert assert_native_absent(graphs[0], decisions) > 0
    with pytest.raises(NativePathError, match=r"layers\.1: "):
        assert_native_absent(graphs[0], promoted(model, "layers.0", "layers.1"))
