"""Edits are taken back exactly, last first, and never over somebody else's change."""

from __future__ import annotations

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxpatch.patching import Edits

NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(st.tuples(st.sampled_from(["attr", "item", "add"]), NAMES, st.integers(0, 5)), max_size=12)


@given(st.dictionaries(NAMES, st.integers(0, 5)), STEPS)
def test_any_sequence_of_edits_is_taken_back_exactly(start: dict[str, int], steps: list[tuple[str, str, int]]) -> None:
    """Values, absence of keys, and the order of old keys are as before."""
    owner = types.SimpleNamespace(**start)
    mapping, members = dict(start), set(start.values())
    before = (dict(vars(owner)), list(mapping.items()), set(members))
    edits = Edits()
    for kind, name, value in steps:
        if kind == "attr":
            edits.set_attr(owner, name, value)
        elif kind == "item":
            edits.set_item(mapping, name, value, "mapping")
        else:
            edits.add(members, value)
    assert edits.undo() == []
    assert (dict(vars(owner)), list(mapping.items()), set(members)) == before
    assert not edits.active


def test_an_inherited_attribute_is_deleted_again_not_copied_down() -> None:
    class Base:
        def method(self) -> str:
            return "base"

    class Derived(Base):
        pass

    edits = Edits()
    edits.set_attr(Derived, "method", lambda self: "patched")
    assert Derived().method() == "patched"
    edits.undo()
    assert "method" not in vars(Derived)


def test_a_method_set_on_an_instance_is_taken_off_it_again() -> None:
    class Handler:
        def run(self) -> str:
            return "own"

    handler = Handler()
    edits = Edits()
    edits.set_attr(handler, "run", lambda: "patched")
    assert handler.run() == "patched"
    assert edits.undo() == []
    assert vars(handler) == {}


@pytest.mark.parametrize("name", ["__module__", "__name__", "__qualname__"])
def test_the_names_of_a_class_come_back(name: str) -> None:
    """They live in slots of the type, not in its dictionary, and `__module__` in both."""

    class Meta(type):
        pass

    class Named(metaclass=Meta):
        pass

    before = (Named.__module__, Named.__name__, Named.__qualname__)
    edits = Edits()
    edits.set_attr(Named, name, "other")
    assert getattr(Named, name) == "other"
    assert edits.undo() == []
    assert (Named.__module__, Named.__name__, Named.__qualname__) == before


def test_what_somebody_else_put_there_since_is_left_and_reported() -> None:
    owner = types.SimpleNamespace(x=1)
    mapping = {"k": 1}
    edits = Edits()
    edits.set_attr(owner, "x", 2)
    edits.set_item(mapping, "k", object(), "mapping")
    owner.x, mapping["k"] = 3, 4
    assert edits.undo() == [
        "mapping['k'] was changed by somebody else since: left as it is",
        "SimpleNamespace.x was changed by somebody else since: left as it is",
    ]
    assert (owner.x, mapping) == (3, {"k": 4})


def test_one_failing_undo_does_not_keep_the_others() -> None:
    owner = types.SimpleNamespace(x=1)
    edits = Edits()
    edits.set_attr(owner, "x", 2)

    def fail() -> None:
        raise RuntimeError("cannot")

    edits.on_undo(fail)
    with pytest.raises(RuntimeError, match="cannot"):
        edits.undo()
    assert owner.x == 1
    assert edits.undo() == []
