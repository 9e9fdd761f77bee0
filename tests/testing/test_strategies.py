"""The strategies: what they draw is valid, comes in every form that is promised, is reproducible, and shrinks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, find, given, settings
from hypothesis import strategies as st
from torch.fx import Interpreter

from fxpatch.installer import install
from fxpatch.testing import strategies
from fxpatch.testing.compiled import Compiled, assert_same
from fxpatch.testing.fx_graphs import FxGraph
from fxpatch.testing.fx_steps import KINDS
from fxpatch.testing.layout import Layout, elements_of, layout_of, relocated
from fxpatch.testing.strategies import Drawn, fx_graphs, layouts, shapes, tensors

few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def seen(strategy: st.SearchStrategy[Any], is_one: Callable[[Any], bool]) -> Any:
    """The smallest example for which it is so; raises NoSuchExample where none is found. Always the same search: with
    a random one, rare forms are not found once in some hundred runs."""
    return find(strategy, is_one, settings=settings(database=None, max_examples=5000, deadline=None), random=Random(0))


@given(st.data())
def test_layouts_are_what_views_make(data: st.DataObject) -> None:
    """No two elements share memory unless a dimension is expanded, and all lie within the storage."""
    shape = data.draw(shapes(max_side=4))
    layout = data.draw(layouts(shape))
    numbers = torch.arange(layout.extent)
    tensor = layout.over(numbers)
    assert layout_of(tensor) == layout
    expanded = [side for side, step in zip(layout.shape, layout.strides, strict=True) if step == 0]
    assert tensor.unique().numel() * torch.Size(expanded).numel() == tensor.numel()
    assert tensor.numel() == 0 or int(tensor.max()) == layout.extent - 1


@pytest.mark.parametrize("form", ["transposed", "strided", "expanded", "offset", "empty", "scalar"])
def test_every_form_of_layout_is_drawn(form: str) -> None:
    is_one: dict[str, Callable[[torch.Tensor], bool]] = {
        "transposed": lambda x: x.dim() == 2 and 1 < x.stride(0) < x.stride(1) and x.numel() > 4,
        "strided": lambda x: x.dim() == 1 and x.stride(0) == 2 and x.numel() > 1,
        "expanded": lambda x: 0 in x.stride() and x.numel() > 1,
        "offset": lambda x: x.storage_offset() > 0 and x.numel() > 0,
        "empty": lambda x: x.numel() == 0,
        "scalar": lambda x: x.dim() == 0,
    }
    assert is_one[form](seen(tensors(), is_one[form]))


def test_tensors_shrink_to_something_plain() -> None:
    x = seen(tensors(), lambda x: x.numel() > 2)
    assert x.shape == (3,)
    assert (x.dtype, x.is_contiguous(), x.storage_offset()) == (torch.float32, True, 0)


@given(tensors(dense=True), tensors(writable=True), tensors(requires_grad=True))
def test_what_is_asked_of_tensors_holds(dense: torch.Tensor, writable: torch.Tensor, gradient: torch.Tensor) -> None:
    assert dense.is_contiguous()
    writable.zero_()
    assert not writable.any()
    assert gradient.requires_grad == gradient.is_floating_point()
    assert gradient.is_leaf


@few
@given(data=st.data())
def test_a_tensor_is_the_same_on_every_device(musa: str, data: st.DataObject) -> None:
    """From the same words: values, layout, and what lies around it in its storage."""
    shape = data.draw(shapes(max_dims=3))
    dtype = data.draw(strategies.dtypes(integral=True, boolean=True, complex=True))
    drawn = Drawn(data.draw(layouts(shape)), dtype, data.draw(st.integers(0, 9)), False)
    here, again, there = drawn.build(), drawn.build(), drawn.build(musa)
    assert there.device.type == musa
    assert layout_of(here) == layout_of(again) == layout_of(there) == drawn.layout
    assert torch.equal(elements_of(here), elements_of(again))
    assert torch.equal(elements_of(there).cpu(), elements_of(here))


def test_what_is_relocated_shares_memory_as_before(musa: str) -> None:
    base = torch.arange(6.0)
    there = relocated({"base": base, "view": base.view(2, 3).t()[1:]}, musa)
    there["base"].mul_(10)
    assert there["view"].tolist() == [[10, 40], [20, 50]]
    assert there["view"].stride() == (1, 3)
    assert base.tolist() == [0, 1, 2, 3, 4, 5]
    conjugate = torch.tensor([1 + 2j]).conj()
    assert relocated(conjugate, musa).cpu().tolist() == [1 - 2j]


def test_a_layout_too_large_for_its_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="wants a storage of 7 elements, not 6"):
        Layout((4,), (2,)).over(torch.zeros(6))


@few
@given(drawn=fx_graphs("cpu"))
def test_every_graph_is_valid_and_exact(drawn: FxGraph) -> None:
    """Whatever steps are left out of it; and all its values are integers within bounds."""
    for steps in (drawn.steps, drawn.steps[1:], drawn.steps[::2]):
        part = FxGraph("cpu", drawn.placeholders, steps, drawn.results, drawn.returns, drawn.seed)
        gm = part.build()
        gm.graph.lint()
        for value in torch.utils._pytree.tree_leaves(Interpreter(gm).run(*part.inputs())):
            assert torch.equal(value, value.round())
            assert value.numel() == 0 or float(value.abs().max()) <= 64
            assert value.numel() <= 512


def test_every_kind_of_step_is_drawn() -> None:
    """Among a few hundred graphs; and in one graph what functionalization gets wrong, if it does."""
    drawn: list[FxGraph] = []

    @settings(max_examples=300, database=None, derandomize=True)
    @given(graph=fx_graphs("cpu"))
    def collect(graph: FxGraph) -> None:
        drawn.append(graph)

    collect()
    kinds = [{step.kind for step in graph.steps} for graph in drawn]
    assert set().union(*kinds) == set(KINDS)
    together = {"in-place", "view", "several"}
    patient = settings(max_examples=20_000, database=None)
    find(fx_graphs("cpu"), lambda graph: together <= {step.kind for step in graph.steps}, settings=patient)
    assert {graph.returns for graph in drawn} == {"one", "tuple", "dict"}


@pytest.mark.slow
def test_a_graph_shrinks_to_the_step_that_matters() -> None:
    graph = seen(fx_graphs("cpu"), lambda g: any(step.kind == "in-place" for step in g.steps))
    assert [step.kind for step in graph.steps] == ["in-place"]
    assert [placeholder.shape for placeholder in graph.placeholders] == [()]


@few
@given(drawn=fx_graphs("musa"))
def test_a_graph_gives_on_the_device_what_it_gives_on_the_cpu(musa: str, drawn: FxGraph) -> None:
    with install(musa):
        assert_same("result", drawn.build()(*drawn.inputs()), drawn.build("cpu")(*drawn.inputs("cpu")), musa)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=fx_graphs("musa", max_steps=4))
@pytest.mark.parametrize("compiled_backend", ["aot_eager"], indirect=True)
def test_compiled_graphs_give_what_they_give_eagerly(
    compiled: Callable[..., Compiled], musa: str, drawn: FxGraph
) -> None:
    """Results and what is written to the inputs, after functionalization."""
    torch.compiler.reset()
    gm, cpu = drawn.build(), drawn.build("cpu")
    assume(len(gm.graph.nodes) > len(drawn.placeholders) + 1)
    inputs, wanted = drawn.inputs(), drawn.inputs("cpu")
    assert_same("result", compiled(gm)(*inputs), cpu(*wanted), musa)
    assert_same("input, after the call,", inputs, wanted, musa)
