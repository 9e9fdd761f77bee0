"""Finding operators, and running one forward or the other: every instance comes back exactly as it was."""

from __future__ import annotations

import threading
from typing import Any

import operators_zoo as zoo
import pytest
import torch
from torch import nn

from fxpatch.errors import FxPatchWarning
from fxpatch.native import find_operators, native
from fxpatch.native.forwards import running


class Named(nn.Module):
    """Says which of its forwards ran."""

    def forward(self) -> str:
        return "as it was"

    def forward_native(self) -> str:
        return "native"

    def forward_musa(self) -> str:
        return "optimized"


@pytest.fixture
def model() -> nn.Module:
    made = nn.Module()
    made.first, made.second = Named(), Named()
    made.inner = nn.Sequential(Named(), nn.Linear(1, 1))
    made.again = made.first
    return made


def test_every_distinct_instance_is_found_by_its_qualified_name(model: nn.Module) -> None:
    found = find_operators(model, "musa")
    assert [(op.name, op.aliases) for op in found] == [("first", ("again",)), ("second", ()), ("inner.0", ())]
    assert [op.name for op in find_operators(model, "musa:1")] == ["first", "second", "inner.0"]
    assert find_operators(model, "npu") == []
    assert [op.name for op in find_operators(Named(), torch.device("cpu"))] == []


def test_the_model_itself_may_be_one() -> None:
    assert [op.name for op in find_operators(Named(), "musa")] == ["(model)"]


def test_an_out_of_tree_forward_is_the_devices(musa: str) -> None:
    class OutOfTree(nn.Module):
        def forward_native(self) -> None: ...
        def forward_oot(self) -> None: ...

    assert [op.optimized_name for op in find_operators(OutOfTree(), musa)] == ["forward_oot"]
    assert find_operators(OutOfTree(), "cuda") == []


def test_a_compiled_wrapper_is_no_operator_of_its_own() -> None:
    outer = nn.Module()
    outer.act = torch.compile(Named())
    assert [op.name for op in find_operators(outer, "musa")] == ["act._orig_mod"]


def test_native_is_for_the_length_of_the_context(model: nn.Module) -> None:
    before = zoo.frozen(model)
    with native(find_operators(model, "musa")):
        assert [model.first(), model.again(), model.second(), model.inner[0]()] == ["native"] * 4
        assert Named()() == "as it was"  # no class is edited
    assert zoo.same(before, zoo.frozen(model))
    assert model.first() == "as it was"


def test_an_instance_attribute_comes_back_itself(model: nn.Module) -> None:
    mine = lambda: "mine"  # noqa: E731
    model.first.forward = mine
    keys = list(model.first.__dict__)
    with pytest.raises(ZeroDivisionError), native(find_operators(model, "musa")):
        raise ZeroDivisionError
    assert model.first.__dict__["forward"] is mine
    assert list(model.first.__dict__) == keys


def test_contexts_nest_and_the_same_operator_may_come_twice(model: nn.Module) -> None:
    ops = find_operators(model, "musa")
    before = zoo.frozen(model)
    with native([*ops, *ops]):
        with running((op, "optimized") for op in ops):
            with native(ops[:1]):
                assert (model.first(), model.second()) == ("native", "optimized")
            assert model.first() == "optimized"
        assert model.first() == "native"
    assert zoo.same(before, zoo.frozen(model))


def test_contexts_that_close_out_of_order_restore_all_the_same(model: nn.Module) -> None:
    ops = find_operators(model, "musa")
    before = zoo.frozen(model)
    a, b = native(ops), running((op, "optimized") for op in ops)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert model.first() == "optimized"
    b.__exit__(None, None, None)
    assert zoo.same(before, zoo.frozen(model))


def test_an_operator_that_cannot_be_set_undoes_the_others(model: nn.Module) -> None:
    ops = find_operators(model, "musa")
    before = zoo.frozen(model)

    def chosen() -> Any:
        yield ops[0], "native"
        raise LookupError

    with pytest.raises(LookupError), running(chosen()):
        pass
    assert zoo.same(before, zoo.frozen(model))


def test_what_somebody_else_has_set_stays(model: nn.Module) -> None:
    theirs = lambda: "theirs"  # noqa: E731
    with pytest.warns(FxPatchWarning, match="forward of a Named was changed by somebody else meanwhile"):
        with native(find_operators(model, "musa")):
            model.first.forward = theirs
    assert model.first() == "theirs"
    del model.first.forward
    assert model.first() == "as it was"


def test_many_threads_leave_the_model_as_it_was(model: nn.Module) -> None:
    ops = find_operators(model, "musa")
    before, wrong = zoo.frozen(model), []

    def work(kind: str) -> None:
        for _ in range(200):
            with running((op, kind) for op in ops):
                if model.first() == "as it was":
                    wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("native", "optimized") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert zoo.same(before, zoo.frozen(model))
