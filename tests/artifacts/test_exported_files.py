"""ExportedPrograms in files: without a pickle, on the same device, on the CPU, un-pinned."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import assert_same

import fxpatch
from fxpatch.artifacts import exported, files, loading
from fxpatch.errors import ArtifactError, MissingHereError, TargetMovedError
from fxpatch.patching.record import Target


class Exported(torch.nn.Module):
    """Parameters, buffers that are mutated, a constant, a dynamic size, a condition, autocast, devices."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)
        self.tied = torch.nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.register_buffer("seen", torch.zeros(1))
        self.to(device).requires_grad_(False)
        self.constant = torch.full((4,), 2.0, device=device)

    def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen.add_(1)
        y = self.tied(self.linear(x)) + self.constant + more["a"]
        y = torch.cond(y.sum() > 0, lambda t: t + 1, lambda t: t - 1, (y,))
        z = torch.arange(x.shape[0], device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            y = y.to(torch.float64).to("cpu").to(x.device)
        return {"y": y, "z": z + self.seen.to(torch.int64)}


def program_of(device: str) -> tuple[Any, torch.export.ExportedProgram]:
    model = Exported(device)
    more = {"more": {"a": torch.ones(4, device=device)}}
    rows = torch.export.Dim("rows", min=2, max=8)
    shapes = {"x": {0: rows}, "more": {"a": None}}
    return model, torch.export.export(model, (torch.randn(3, 4, device=device),), more, dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, torch.Tensor, dict[str, torch.Tensor]]:
    """The file of a program on the simulated device, an input, and what eager made of it before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPATCH_KEY_FILE", str(tmp_path_factory.mktemp("k") / "key"))
        _, program = program_of("musa")
        content = files.dumps(program)
    x = torch.randn(5, 4)
    return content, x, Exported("musa")(x.to("musa"), more={"a": torch.ones(4, device="musa")})


@pytest.fixture(autouse=True)
def signed(monkeypatch: pytest.MonkeyPatch, saved: Any) -> None:
    monkeypatch.setattr(files.Opened, "is_signed_by", lambda self, key: True)
    monkeypatch.setattr(files, "key", lambda **_: bytes(32))
    monkeypatch.setattr(loading, "key", lambda: bytes(32))


@pytest.mark.parametrize(
    ("options", "device"),
    [({}, "musa"), ({"device": "cpu"}, "cpu"), ({"unpin": True}, "musa"), ({"device": "musa:0"}, "musa")],
)
def test_results_are_those_of_eager_before_saving(saved: Any, options: dict[str, Any], device: str) -> None:
    content, x, wanted = saved
    program = files.loads(content, **options)
    assert {each.device.type for each in program.state_dict.values()} == {device}
    args, kwargs = program.example_inputs
    assert (args[0].device.type, args[0].shape, list(kwargs["more"])) == (device, torch.Size([3, 4]), ["a"])
    assert [str(each) for each in program.range_constraints.values()] == ["VR[2, 8]"]
    found = program.module()(x.to(device), more={"a": torch.ones(4, device=device)})
    assert_same(found, wanted, to=device)
    assert program.state_dict["linear.weight"] is program.state_dict["tied.weight"]
    parts = [each for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    nodes = [node for part in parts for node in part.graph.nodes]
    named = {str(node.kwargs["device"]) for node in nodes if node.kwargs.get("device") is not None}
    assert named - {"cpu"} == ({"musa"} if "unpin" in options else {f"{device}:0"} if device != "cpu" else set())
    assert len(parts) >= 3
    values = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {str(each.device) for each in values} - {"cpu"} == ({"musa:0"} if device == "musa" else set())
    with pytest.raises((AssertionError, RuntimeError), match=r"8|rows|guard"):
        program.module()(torch.ones(20, 4, device=device), more={"a": torch.ones(4, device=device)})


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies its own trees
def test_what_was_loaded_can_be_used_like_what_was_saved(saved: Any) -> None:
    content, x, wanted = saved
    program = files.loads(content, device="cpu").run_decompositions()
    assert_same(program.module()(x, more={"a": torch.ones(4)}), wanted, to="cpu")
    once_more = files.loads(files.dumps(files.loads(content, device="cpu")))
    assert_same(once_more.module()(x, more={"a": torch.ones(4)}), wanted, to="cpu")


def test_nothing_is_pickled(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export.save and load do; what fxpatch takes of them does not."""
    _, program = program_of("cpu")
    for owner, name in ((pickle, "loads"), (pickle, "dumps"), (torch, "load"), (torch, "save"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("it was pickled"))
    files.loads(files.dumps(program))
    files.loads(saved[0])


def test_an_operator_that_is_not_here(tmp_path: Path) -> None:
    library = torch.library.Library("artifact_tests_export", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

    class Calls(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.artifact_tests_export.twice(x)

    fxpatch.save(torch.export.export(Calls(), (torch.ones(1),)), tmp_path / "p.fx")
    assert fxpatch.load(tmp_path / "p.fx").module()(torch.ones(1)).item() == 2
    library._destroy()
    with pytest.raises(MissingHereError, match=r"artifact_tests_export.twice.default(?s:.*)artifact_tests_export::"):
        fxpatch.load(tmp_path / "p.fx")


def test_guards_that_name_a_device_are_not_moved() -> None:
    program = {"guards_code": ["L['x'].device.type == 'musa'"]}
    exported._check_guards(program, loading.Devices(["musa:0"], "musa:0"))
    with pytest.raises(ArtifactError, match="guards name a device"):
        exported._check_guards(program, loading.Devices(["musa:0"], "cpu"))


def test_a_torch_that_has_moved_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "_SERIALIZE", Target("torch._export.serde.serialize", "serialise", "program"))
    with pytest.raises(TargetMovedError, match="no attribute 'serialise'"):
        files.dumps(program_of("cpu")[1])
