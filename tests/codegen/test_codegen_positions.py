"""Every place in which a device can stand in FX source: the generated code gives what `Interpreter` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from codegen_oracle import assert_rewritten
from torch.fx import Graph, GraphModule
from torch.fx.graph import _BoxedCodeGen, _ExportCodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_flatten

from fxpatch.patching import Edits
from fxpatch.simulator.shim import replaced_torch_device
from fxpatch.testing.device_literals import POSITIONS, Pair, assert_runs_as_interpreted, constant, graph_module

LOOKS_LIKE = "device(type='musa', index=0)"


class Opaque:
    """Prints text that is code, and not a device's."""

    def __repr__(self) -> str:
        return "torch.device(type='musa', index=0)"


DEVICES = (("musa", 0), ("musa",), ("musa", 128), ("musa", 255), ("cpu",), ("meta",), ("cuda", 1), ("cuda",))


def stock_code(graph: Graph, edits: Edits, **kwargs: Any) -> str:
    """The source without the patch."""
    edits.active = False
    try:
        return graph.python_code("self", **kwargs).src
    finally:
        edits.active = True


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "names", [("x",), ("device",), ("torch", "_fxpatch_torch"), ("x", "device", "torch")], ids=" ".join
)
def test_each_position(active: Edits, position: str, names: tuple[str, ...]) -> None:
    for arguments in DEVICES:
        gm = graph_module(position, torch.device(*arguments), *names)
        assert_rewritten(stock_code(gm.graph, active), gm.code)
        assert_runs_as_interpreted(gm, *names)


@pytest.mark.parametrize("position", POSITIONS)
def test_each_position_under_a_shim(active: Edits, position: str) -> None:
    """Custom devices work with no other repair; torch's own stay exact where the rewrite touches them at all."""
    with replaced_torch_device("musa"):
        assert_runs_as_interpreted(graph_module(position, torch._C.device("musa", 0), "x"), "x")
        for arguments in DEVICES:
            gm = graph_module(position, torch._C.device(*arguments), "device")
            assert_runs_as_interpreted(gm, "x")


@pytest.mark.parametrize("expanded", [False, True])
def test_colour_and_layout_change_nothing_in_what_is_rewritten(active: Edits, expanded: bool) -> None:
    graph = graph_module("positional", torch.device("musa", 0), "x").graph
    coloured = graph.python_code("self", colored=True, expanded_def=expanded, verbose=True).src
    assert "\x1b[34mtorch.device('musa', 0)\x1b[0m" in coloured
    plain = graph.python_code("self", expanded_def=expanded, verbose=True).src
    assert "torch.device('musa', 0)" in plain
    assert LOOKS_LIKE not in coloured + plain


def test_the_wrapped_indices_of_a_byte_stay_equal(active: Edits) -> None:
    device = torch.device("musa", 128)
    gm = graph_module("output alone", device, "x")
    assert device.index == -128
    assert "torch.device('musa', 65408)" in gm.code
    assert gm("x") == device


def test_defaults_are_evaluated_in_the_signature(active: Edits) -> None:
    graph = Graph()
    for name, default in (("x", torch.device("musa", 0)), ("device", torch.device("cuda", 1)), ("s", LOOKS_LIKE)):
        graph.placeholder(name, type_expr=torch.device, default_value=default)
    graph.output(tuple(graph.nodes))
    gm = GraphModule({}, graph)
    assert gm.code.startswith(
        "\n\n\ndef forward(self, x : device = torch.device('musa', 0), device : device = torch._C.device('cuda', 1), "
    )
    assert gm() == (torch.device("musa", 0), torch.device("cuda", 1), LOOKS_LIKE)


@pytest.mark.parametrize("name", ["torch", "device", "_fxpatch_torch"])
def test_starred_parameters(active: Edits, name: str) -> None:
    graph = Graph()
    args, kwargs = graph.placeholder(f"*{name}"), graph.placeholder(f"**{name}_")
    graph.output((args, kwargs, torch.device("musa", 0), torch.device("cpu")))
    gm = GraphModule({}, graph)
    assert gm(1, 2, a=3) == ((1, 2), {"a": 3}, torch.device("musa", 0), torch.device("cpu"))
    for node, target in zip(graph.nodes, (f"*{name}_", f"**{name}"), strict=False):
        node.target = target
    gm.recompile()
    assert gm(1, 2, a=3) == ((1, 2), {"a": 3}, torch.device("musa", 0), torch.device("cpu"))


def test_comments_show_the_users_source(active: Edits) -> None:
    gm = graph_module("positional", torch.device("musa", 0), "x")
    line = "y = torch.zeros(3, device=device(type='musa', index=0))  # it's"
    for node in gm.graph.nodes:
        node.meta["stack_trace"] = f'File "model.py", line 1, in forward\n    {line}\n'
    printed = gm.print_readable(print_output=False)
    assert f"code: {line}" in printed
    assert "(x, torch.device('musa', 0))" in printed


def test_docstrings_of_meta_are_left_alone(active: Edits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FX_GRAPH_SHOW_META", "1")
    gm = graph_module("positional", torch.device("musa", 0), "x")
    for node in gm.graph.nodes:
        node.meta["example"] = {"a": torch.device("musa", 0)}
        node.meta["note"] = "it's"
    gm.recompile()
    assert gm.code.count("device(type='musa', index=0)") == 3
    assert_runs_as_interpreted(gm, "x")


@pytest.mark.parametrize("name", ["device", "torch", "_fxpatch_torch"])
def test_boxed(active: Edits, name: str) -> None:
    gm = graph_module("output", torch.device("musa", 0), name, "y")
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    assert f"    {name} = next(args_iter)" in gm.code
    assert_runs_as_interpreted(gm, 1, 2, boxed=True)


def pytree_module(placeholders: list[str], arguments: list[str], device: torch.device) -> GraphModule:
    graph = Graph()
    nodes = [graph.placeholder(name, type_expr=torch.device) for name in placeholders]
    graph.output((*nodes, device, torch.device("cuda", 1)))
    example = ({"a": 0}, *range(1, len(placeholders)))
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, tree_flatten(example)[1], None)))
    return GraphModule({}, graph)


@pytest.mark.parametrize("name", ["device", "torch", "_fxpatch_torch"])
def test_pytree(active: Edits, name: str) -> None:
    for placeholders, arguments in (([name, "y"], ["a", "b"]), (["x", name], ["a", "b"]), (["x", "y"], ["a", name])):
        gm = pytree_module(placeholders, arguments, torch.device("musa", 0))
        assert gm({"a": 1}, 2) == (1, 2, torch.device("musa", 0), torch.device("cuda", 1)), gm.code
        assert_runs_as_interpreted(gm, {"a": 1}, 2)


@pytest.mark.parametrize("leaf", ["device", "torch", "_fxpatch_torch", "other"])
def test_export(active: Edits, leaf: str) -> None:
    """The leaves of `_ExportCodeGen` are names of its own; a device goes through the body here, see below."""
    shuffle = Graph()
    shuffle.output((shuffle.placeholder("a"), shuffle.placeholder("b")))
    unshuffle = Graph()
    _, _, out = (unshuffle.placeholder(n) for n in "abc")
    unshuffle.output((out,))
    gm = graph_module("list, tuple", torch.device("musa", 0), "x", "y")
    (output,) = gm.graph.find_nodes(op="output")
    output.args = (output.args,)
    gm.graph.set_codegen(
        _ExportCodeGen(
            _PyTreeInfo(["p", "q"], tree_flatten((0, 0))[1], tree_flatten((0,))[1]),
            GraphModule({}, shuffle),
            GraphModule({}, unshuffle),
            [leaf, "leaf_1"],
            None,
        )
    )
    gm._in_shuffle_graph, gm._out_shuffle_graph = GraphModule({}, shuffle), GraphModule({}, unshuffle)
    gm.recompile()
    assert f"    {leaf}, leaf_1, = pytree.tree_leaves(" in gm.code
    assert constant(gm(1, 2)) == constant((graph_module("list, tuple", torch.device("musa", 0), "x")(1),))


def test_a_body_transformer_sees_and_keeps_torchs_text(active: Edits) -> None:
    seen = []

    def transform(body: list[str]) -> list[str]:
        seen.extend(body)
        return ["torch = 'mine'\n", *body]

    gm = graph_module("positional", torch.device("musa", 0), "x")
    with gm.graph.on_generate_code(lambda _: transform):
        gm.recompile()
    assert any(LOOKS_LIKE in line for line in seen)
    assert gm(1) == ((1, torch.device("musa", 0)), {})


def test_text_of_other_objects_is_left_alone(active: Edits) -> None:
    graph = Graph()
    graph.output((Opaque(), torch.device("musa", 0)))
    gm = GraphModule({}, graph)
    assert "(torch.device(type='musa', index=0), torch.device('musa', 0))" in gm.code
    assert gm() == (torch.device("musa", 0), torch.device("musa", 0))


def nested_namedtuple() -> None:
    graph = Graph()
    graph.output((torch.device("musa", 0), Pair(Pair(torch.device("musa", 0), 1), 2)))
    GraphModule({}, graph)()


def export_returns_device() -> None:
    graph = Graph()
    graph.output((torch.device("musa", 0),))
    info = _PyTreeInfo([], tree_flatten(())[1], tree_flatten((0,))[1])
    graph.set_codegen(_ExportCodeGen(info, torch.nn.Module(), torch.nn.Module(), ["a"], None))
    GraphModule({}, graph)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (nested_namedtuple, NameError, "name 'Pair' is not defined"),  # prints the inner one without its module
        (export_returns_device, SyntaxError, "invalid syntax"),  # prints the outputs with str()
    ],
)
def test_failures_of_torch_itself_stay_what_they_are(
    active: Edits, patched: bool, build: Callable[[], None], error: type[Exception], message: str
) -> None:
    active.active = patched
    with pytest.raises(error, match=message):
        build()
