"""Random graphs: generated code gives what `Interpreter` gives, and the syntax tree says what may have changed."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codegen_oracle import assert_rewritten
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch.fx import Graph, GraphModule
from torch.fx.graph import _BoxedCodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_flatten

from fxpatch.codegen import Rewritten
from fxpatch.patching import Edits
from fxpatch.testing.device_literals import assert_runs_as_interpreted

WHOLE_SOURCE = re.compile(r"\bdevice\(type='([^']+)'(?:,\s*index=(\d+))?\)")


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def shadow(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


shadow.__module__, shadow.__name__ = "_fxpatch", "torch"  # FX calls it `_fxpatch_torch`


@dataclasses.dataclass(frozen=True)
class Input:
    """Stands for the value of a placeholder while arguments are drawn."""

    number: int


names = st.sampled_from(
    ["x", "y", "device", "torch", "_fxpatch_torch", "_fxpatch_torch_1", "musa", "cpu", "type", "index"]
)
devices = st.builds(
    lambda kind, index: torch._C.device(kind) if index is None else torch._C.device(kind, index),
    st.sampled_from(["musa", "musa", "cpu", "meta", "cuda", "xpu"]),
    st.none() | st.sampled_from([0, 1, 7, 128, 255]),
)
looks_like = st.builds(
    lambda before, device, after: f"{before}{device!r}{after}",
    st.sampled_from(["", "'", '"', "\\", "#", "'''", '"""', "\n", "torch.", "f(", "\\'", "{"]),
    devices,
    st.sampled_from(["", "'", '"', "\\", "#", "'''", '"""', "\n", ")", ", ", "\\'", "}"]),
)
strings = looks_like | st.text(max_size=8)
leaves = (
    devices
    | strings
    | looks_like.map(str.encode)
    | st.integers(-3, 3)
    | st.sampled_from([None, True, float("inf"), float("nan")])
)
keys = devices | strings | looks_like.map(str.encode)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(slice, inner, inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
    )


values = st.recursive(leaves, containers, max_leaves=6) | st.frozensets(devices, max_size=1)
arguments = st.recursive(
    leaves | st.integers(0, 3).map(Input),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
keywords = st.dictionaries(names, arguments | values, max_size=2)
types = st.sampled_from([None, None, torch.device, list[torch.device], torch.Tensor, str])
methods = st.one_of(
    st.tuples(st.sampled_from([operator.eq, operator.ne]), st.tuples(values, values), st.just({}), types),
    st.tuples(st.sampled_from(["__str__", "__repr__"]), st.tuples(devices | strings), st.just({}), types),
    st.tuples(st.just("__eq__"), st.tuples(devices | strings, values), st.just({}), types),
)
echoes = st.tuples(st.just(echo), st.lists(arguments | values, max_size=3), keywords, types)
shadows = st.tuples(st.just(shadow), st.lists(arguments | values, max_size=3), keywords, types)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A graph in words, so that it can be built, and shown, more than once."""

    codegen: str
    placeholders: list[str]
    defaults: list[Any]
    arguments: list[str]
    calls: list[Any]
    kinds: list[Any]

    def build(self) -> GraphModule:
        graph, missing = Graph(), len(self.placeholders) - len(self.defaults)
        nodes = [
            graph.placeholder(
                name, type_expr=kind, **({"default_value": self.defaults[i - missing]} if i >= missing else {})
            )
            for i, (name, kind) in enumerate(zip(self.placeholders, self.kinds, strict=False))
        ]
        results = list(nodes)
        for target, args, kwargs, kind in self.calls:
            method = graph.call_method if isinstance(target, str) else graph.call_function
            results.append(method(target, self._fill(tuple(args), nodes), self._fill(kwargs, nodes), type_expr=kind))
        graph.output((*results, torch.device("musa", 0)))
        if self.codegen == "boxed":
            graph.set_codegen(_BoxedCodeGen())
        elif self.codegen == "pytree":
            info = _PyTreeInfo(self.arguments, tree_flatten(tuple(range(len(nodes))))[1], None)
            graph.set_codegen(_PyTreeCodeGen(info))
        return GraphModule({}, graph)

    def _fill(self, value: Any, nodes: list[Any]) -> Any:
        if isinstance(value, Input):
            return nodes[value.number % len(nodes)]
        if isinstance(value, (list, tuple)):
            return type(value)(self._fill(v, nodes) for v in value)
        if isinstance(value, dict):
            return {k: self._fill(v, nodes) for k, v in value.items()}
        return value

    def check(self, edits: Edits) -> None:
        """Raises AssertionError, or whatever the generated code raises, unless all is right."""
        gm = self.build()
        edits.active = False
        stock = gm.graph.python_code("self")
        edits.active = True
        assert_rewritten(stock.src, gm.code)
        assert gm._lineno_map == stock._lineno_map
        count = len(self.placeholders)
        given = count - len(self.defaults) if self.codegen == "plain" else count
        assert_runs_as_interpreted(gm, *(f"argument {n}" for n in range(given)), boxed=self.codegen == "boxed")


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    codegen = draw(st.sampled_from(["plain", "pytree", "boxed"]))
    placeholders = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    count = len(placeholders)
    return Drawn(
        codegen=codegen,
        placeholders=placeholders,
        # torch prints defaults into the unpacking of a pytree, which is no syntax
        defaults=[] if codegen == "pytree" else draw(st.lists(leaves, max_size=count)),
        arguments=draw(st.lists(names, min_size=count, max_size=count, unique=True)),
        # torch gives a global no other name where an argument of a pytree has it, as it does for a placeholder
        calls=draw(st.lists(methods | echoes | (echoes if codegen == "pytree" else shadows), max_size=4)),
        kinds=draw(st.lists(types, min_size=count, max_size=count)),
    )


@given(drawn=graphs())
def test_generated_code_gives_what_the_interpreter_gives(active: Edits, drawn: Drawn) -> None:
    drawn.check(active)


def _whole_source(src: str, _globals: Any, _custom: str) -> Rewritten:
    """One substitution over all of the source, strings, comments and other devices included."""
    one = lambda m: f"torch.device('{m[1]}')" if m[2] is None else f"torch.device('{m[1]}:{m[2]}')"  # noqa: E731
    return Rewritten(WHOLE_SOURCE.sub(one, src), "torch")


def _blind_to_strings(src: str, _globals: Any, custom: str) -> Rewritten:
    """Custom devices only and no colon, and still in strings, and under a name that may be taken."""
    one = lambda m: f"torch.device('{custom}')" if m[1] is None else f"torch.device('{custom}', {m[1]})"  # noqa: E731
    return Rewritten(re.sub(rf"(?<![\w.])device\(type='{custom}'(?:, index=(\d+))?\)", one, src), "torch")


def _nothing(_src: str, _globals: Any, _custom: str) -> None:
    return None


@pytest.mark.parametrize("broken", [_whole_source, _blind_to_strings, _nothing])
def test_the_property_can_fail(active: Edits, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpatch.codegen.rewrite", broken)

    def fails(drawn: Drawn) -> bool:
        try:
            drawn.check(active)
        except Exception:
            return True
        return False

    try:
        find(graphs(), fails, settings=settings(derandomize=True, database=None))
    except NoSuchExample:
        pytest.fail("the property holds for a rewrite that is wrong")
