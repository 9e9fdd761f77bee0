"""The patch record: which classes it reaches, what it keeps, what it leaves behind, and when it steps aside."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen, PythonCode, _BoxedCodeGen, _custom_builtins, _PyTreeCodeGen

from fxpatch.codegen import PATCH, probe_codegen
from fxpatch.patching import Applied, Edits, Ledger, Needed, NotNeeded, Patch, settle_all
from fxpatch.simulator.shim import replaced_torch_device
from fxpatch.testing.device_literals import assert_runs_as_interpreted

METHOD = "_gen_python_code"


def module(*names: str, device: str = "musa:0") -> GraphModule:
    graph = Graph()
    nodes = [graph.placeholder(name) for name in names]
    graph.output((*nodes, torch.device(device)))
    return GraphModule({}, graph)


def run_with(codegen: CodeGen) -> str:
    gm = module("x")
    gm.graph.set_codegen(codegen)
    gm.recompile()
    assert gm(1) == (1, torch.device("musa", 0))
    return gm.code


def wholesale(self: Any, nodes: Any, root_module: str, namespace: Any, **kwargs: Any) -> PythonCode:
    """A codegen that writes its source without asking torch's."""
    src = f"\ndef forward(self, x):\n    return x, {torch.device('musa', 0)!r}\n"
    return PythonCode(src, {"device": torch.device}, {1: 0})


class Mixin:
    _gen_python_code = wholesale


class Earlier(CodeGen):
    _gen_python_code = wholesale


class EarlierBelow(Earlier):
    def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
        code = super()._gen_python_code(*args, **kwargs)
        return dataclasses.replace(code, src=code.src + "    # device(type='musa')\n")


class Mixed(Mixin, CodeGen):
    pass


class Plain(CodeGen):
    pass


ALL = (CodeGen, _BoxedCodeGen, _PyTreeCodeGen, Earlier, EarlierBelow, Mixed, Plain)


@pytest.mark.parametrize("cls", [CodeGen, Earlier, EarlierBelow, Mixed, Plain])
def test_every_class_that_exists_is_covered(active: Edits, cls: type[CodeGen]) -> None:
    assert "torch.device('musa', 0)" in run_with(cls())
    assert inspect.signature(cls._gen_python_code).parameters.keys() >= {"self"}


def test_every_class_yet_to_come_is_covered(active: Edits) -> None:
    initialised = []

    class Chained:
        def __init_subclass__(cls, tag: str = "", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            initialised.append((cls.__name__, tag))

    class Later(CodeGen, Chained, tag="a"):
        _gen_python_code = wholesale

    class LaterBelow(Later, tag="b"):
        def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
            code = super()._gen_python_code(*args, **kwargs)
            assert "torch.device('musa', 0)" in code.src
            return dataclasses.replace(
                code, src=code.src.replace("x, torch.device('musa', 0)", "x, device(type='musa', index=0)")
            )

    class LaterMixed(Mixin, CodeGen):
        pass

    for cls in (Later, LaterBelow, LaterMixed):
        assert "torch.device('musa', 0)" in run_with(cls())
    assert initialised == [("Later", "a"), ("LaterBelow", "b")]
    active.undo()
    assert "torch.device" not in run_with(Later())

    class AfterUndo(CodeGen):
        _gen_python_code = wholesale

    assert vars(AfterUndo)[METHOD] is wholesale
    assert vars(LaterMixed).get(METHOD) is None


def test_undo_leaves_every_class_as_found(musa: str) -> None:
    before = {cls: dict(vars(cls)) for cls in ALL}
    builtins = dict(_custom_builtins)
    edits = Edits()
    PATCH.apply(musa, False, edits)
    assert vars(CodeGen)[METHOD] is not before[CodeGen][METHOD]
    assert [cls for cls in (_BoxedCodeGen, _PyTreeCodeGen, Plain) if METHOD in vars(cls)] == []
    gm = module("torch")
    assert "_fxpatch_torch" in _custom_builtins
    assert edits.undo() == []
    assert {cls: dict(vars(cls)) for cls in ALL} == before
    assert list(_custom_builtins.items()) == list(builtins.items())
    assert gm(1) == (1, torch.device("musa", 0))


def test_a_wrapper_that_others_hold_on_to_passes_through_after_undo(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = Edits()
    PATCH.apply(musa, False, edits)
    ours = CodeGen._gen_python_code

    def theirs(self: Any, *args: Any, **kwargs: Any) -> PythonCode:
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(CodeGen, METHOD, theirs)
    assert edits.undo() == ["CodeGen._gen_python_code was changed by somebody else since: left as it is"]
    assert "torch.device" not in module("x").code
    monkeypatch.undo()
    CodeGen._gen_python_code = ours.__wrapped__  # type: ignore[method-assign,attr-defined]


def test_a_second_application_over_the_first_changes_nothing(active: Edits) -> None:
    once = module("device", "torch").code
    second = Edits()
    PATCH.apply("musa", False, second)
    assert module("device", "torch").code == once
    second.undo()
    assert module("device", "torch").code == once


def test_all_that_is_not_source_is_kept(active: Edits) -> None:
    gm = module("x", "device")
    arguments = {
        "verbose": True,
        "include_stride": True,
        "include_device": True,
        "expanded_def": True,
        "record_func": True,
    }
    ours = gm.graph.python_code("self", **arguments)
    active.active = False
    stock = gm.graph.python_code("self", **arguments)
    assert ours._lineno_map == stock._lineno_map
    assert ours._prologue_start == stock._prologue_start
    assert ours.globals == stock.globals
    assert ours.src.count("\n") == stock.src.count("\n")
    assert ours.src != stock.src


def test_source_without_devices_is_returned_as_it_is(active: Edits) -> None:
    results = []

    class Recording(CodeGen):
        def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
            results.append(super()._gen_python_code(*args, **kwargs))
            return results[-1]

    graph = Graph()
    graph.output((graph.placeholder("x"), torch.device("cpu"), "device(type='musa')"))
    graph.set_codegen(Recording())
    assert graph.python_code("self") is results[0]


def test_a_result_that_is_a_named_tuple_is_replaced_as_one(active: Edits) -> None:
    class Code(NamedTuple):
        src: str
        globals: dict[str, Any]
        extra: str = "kept"

    shared: dict[str, Any] = {"device": torch.device}

    class Tuples(CodeGen):
        def _gen_python_code(self, *args: Any, **kwargs: Any) -> Any:
            return Code(wholesale(self, *args, **kwargs).src, shared)

    graph = Graph()
    graph.set_codegen(Tuples())
    code = graph.python_code("self")
    assert isinstance(code, Code)
    assert code.extra == "kept"
    assert "return x, torch.device('musa', 0)" in code.src
    assert code.globals == {"device": torch.device, "torch": torch}
    assert shared == {"device": torch.device}


def test_unknown_keyword_arguments_are_forwarded(active: Edits) -> None:
    class Newer(CodeGen):
        def _gen_python_code(self, *args: Any, from_a_later_torch: int, **kwargs: Any) -> Any:
            assert from_a_later_torch == 3
            return wholesale(self, *args, **kwargs)

    assert "torch.device" in Newer()._gen_python_code([], "self", None, from_a_later_torch=3).src


def test_the_alias_is_bound_and_avoids_globals_and_locals(active: Edits) -> None:
    class Globals(CodeGen):
        def additional_globals(self) -> list[tuple[str, Any]]:
            return [("_fxpatch_torch", "taken")]

    gm = module("torch", "_fxpatch_torch_1")
    gm.graph.set_codegen(Globals())
    code = gm.recompile()
    assert code.globals["_fxpatch_torch"] == "taken"
    assert code.globals["_fxpatch_torch_2"] is torch
    assert gm(1, 2) == (1, 2, torch.device("musa", 0))
    assert "_fxpatch_torch_2" not in module("x").recompile().globals


def test_copies_and_folders(active: Edits, tmp_path: Path) -> None:
    gm = module("torch", "device")
    assert copy.deepcopy(gm)(1, 2) == gm(1, 2) == (1, 2, torch.device("musa", 0))
    gm.to_folder(tmp_path, "Folder")
    scope: dict[str, Any] = {}
    exec((tmp_path / "module.py").read_text(), scope)
    assert scope["Folder"].forward(None, 1, 2) == gm(1, 2)


def test_a_shim_that_comes_after_install_is_settled_before_code_is_generated(musa: str) -> None:
    seen: list[object] = []

    def probe(_device: str) -> object:
        seen.append(torch.device)
        return torch.device

    other = Patch[object]("other", "", "", "", (), (), probe, lambda _: NotNeeded(""), lambda *_: "")
    ledger = Ledger([PATCH, other], musa)
    try:
        assert isinstance(ledger.settle()["codegen"], Applied)
        module("x").recompile()
        assert len(seen) == 1
        with replaced_torch_device("musa"):
            gm = GraphModule({}, module("x").graph)
            gm.recompile()
            assert seen[1:] == [torch.device]
            assert_runs_as_interpreted(gm, 1)
    finally:
        assert ledger.undo() == []
    gc.collect()
    settle_all("in a test")


def test_the_probe_speaks_of_torch_also_while_the_patch_is_active(musa: str) -> None:
    assert probe_codegen() is False
    edits = Edits()
    PATCH.apply(musa, False, edits)
    assert probe_codegen() is False
    edits.undo()
    assert PATCH.probe(musa) is False


def test_the_probe_is_satisfied_by_a_torch_that_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if FX bound its devices under names that the graph cannot take."""
    original = CodeGen._gen_python_code

    def mended(self: Any, *args: Any, **kwargs: Any) -> PythonCode:
        code = original(self, *args, **kwargs)
        src = code.src.replace("(device(type='cuda', index=1), ", "(_device_0, ")
        return dataclasses.replace(code, src=src, globals={**code.globals, "_device_0": torch.device("cuda", 1)})

    monkeypatch.setattr(CodeGen, METHOD, mended)
    assert probe_codegen() is True
    assert PATCH.decide(probe_codegen()) == NotNeeded("torch generates code that builds its devices by itself")


@pytest.mark.parametrize("text", ["torch.device('cuda:1')", "_device('cuda', 1)"])
def test_the_probe_is_not_satisfied_by_a_substitution_that_changes_data(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    original = CodeGen._gen_python_code

    def substituted(self: Any, *args: Any, **kwargs: Any) -> PythonCode:
        code = original(self, *args, **kwargs)
        src = code.src.replace("device(type='cuda', index=1)", text)
        return dataclasses.replace(code, src=src, globals={**code.globals, "_device": torch._C.device})

    monkeypatch.setattr(CodeGen, METHOD, substituted)
    assert probe_codegen() is False


def test_the_record() -> None:
    assert PATCH.name == "codegen"
    assert isinstance(PATCH.decide(False), Needed)
    assert isinstance(PATCH.decide(True), NotNeeded)
    for target in PATCH.targets:
        target.resolve()
