"""Every string and method by which a graph means a device is mapped; what is asked for is never passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxpatch.artifacts import files
from fxpatch.artifacts.container import Opened
from fxpatch.errors import ArtifactError, MissingHereError

X = torch.arange(4.0)
TO = torch.ops.aten.to


def calls(op: str, target: Any, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
    """A graph of one call of `x`."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node(op, target, (x, *args), kwargs))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    "make",
    [
        lambda: calls("call_function", TO.device, "musa", torch.float32),
        lambda: calls("call_function", TO.device, device="musa:0", dtype=torch.float32),
        lambda: calls("call_function", TO, "musa", torch.float32),
        lambda: calls("call_function", torch.ops.prims.device_put.default, "musa"),
        lambda: calls("call_method", "to", "musa", torch.float32),
        lambda: calls("call_method", "new_zeros", (4,), device="musa"),
        lambda: calls("call_method", "musa"),
        lambda: calls("call_method", "musa", 0, True),
        lambda: calls("call_method", "musa", "musa:0", non_blocking=True),
        lambda: calls("call_method", "musa", device=torch.device("musa", 0)),
    ],
)
def test_a_device_by_its_name(make: Callable[[], torch.fx.GraphModule]) -> None:
    made = make()
    content = files.dumps(made)
    assert made(X).device.type == "musa"
    assert [name.partition(":")[0] for name in Opened(content).manifest["devices"]] == ["musa"]
    assert files.loads(content)(X).device == made(X).device
    assert files.loads(content, device="cpu")(X).device.type == "cpu"


def test_a_device_that_the_graph_makes() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = [graph.call_function(torch.device, args) for args in (("musa",), ("musa", 0), ("cpu",))]
    graph.output([x, *made])
    content = files.dumps(torch.fx.GraphModule({}, graph))
    assert [str(each) for each in files.loads(content)(1)] == ["1", "musa", "musa:0", "cpu"]
    assert [str(each) for each in files.loads(content, device="cpu")(1)] == ["1", "cpu", "cpu", "cpu"]


def test_a_string_that_is_data_stays() -> None:
    graph = torch.fx.Graph()
    halved = graph.call_function(
        torch.ops.aten.div.Tensor_mode, (graph.placeholder("x"), 2), {"rounding_mode": "floor"}
    )
    graph.output((halved, "musa"))
    content = files.dumps(torch.fx.GraphModule({}, graph))
    assert Opened(content).manifest["devices"] == []
    found, text = files.loads(content)(X)
    assert (found.tolist(), text) == ([0, 0, 1, 1], "musa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it can be loaded")
def test_a_method_of_a_device_that_is_not_here() -> None:
    content = files.dumps(calls("call_method", "cuda"))
    with pytest.raises(MissingHereError, match="the file holds cuda"):
        files.loads(content)
    assert files.loads(content, device="cpu")(X).tolist() == X.tolist()
    assert files.loads(content, device="musa")(X).device.type == "musa"


def test_a_method_of_a_shim_needs_no_shim_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as shim:
        shim.setattr(torch.Tensor, "cuda", lambda self, index=None: self.to("musa"))
        contents = [files.dumps(calls("call_method", "cuda", *index)) for index in ((), (0,))]
        assert files.loads(contents[0])(X).device.type == "musa"
    for content in contents:
        assert files.loads(content)(X).device.type == "musa"
        assert files.loads(content, device="cpu")(X).device.type == "cpu"


def test_a_method_that_is_called_in_a_way_that_cannot_be_written() -> None:
    for args in (("nowhere",), (1.5,), (0, True, None)):
        with pytest.raises(ArtifactError, match=r"musa calls .musa\((?s:.*)only a device can be written"):
            files.dumps(calls("call_method", "musa", *args))


class OnDevice(torch.nn.Module):
    """A leaf that keeps its device as text."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.title = device, device

    def forward(self, x: torch.Tensor) -> Any:
        return x.to(self.device), self.title


def test_a_device_that_a_module_keeps() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_module("leaf", (graph.placeholder("x"),)))
    content = files.dumps(torch.fx.GraphModule(torch.nn.ModuleDict({"leaf": OnDevice("musa")}), graph))
    for device, name in ((None, "musa"), ("cpu", "cpu")):
        found, title = files.loads(content, device=device)(X)
        assert (found.device.type, title) == (name, "musa")


@pytest.mark.parametrize("asked", ["musa:0", {"musa": "musa:0"}])
def test_an_index_is_not_unpinned(asked: Any) -> None:
    content = files.dumps(calls("call_method", "to", "musa:0"))
    with pytest.raises(ArtifactError, match=r"unpin=True, and 'musa:0' in device=(?s:.*)pass device='musa'"):
        files.loads(content, device=asked, unpin=True)
    for fits in (None, "musa", {"musa": "cpu"}):
        files.loads(content, device=fits, unpin=True)


def test_a_mapping_that_names_nothing_of_the_file() -> None:
    content = files.dumps(calls("call_method", "to", "musa:0"))
    for wrong in ({"muse:0": "cpu"}, {"musa:1": "cpu", "npu": "cpu"}):
        with pytest.raises(ArtifactError, match=r"names no device of the file(?s:.*)one of musa:0 at least"):
            files.loads(content, device=wrong)
    assert files.loads(content, device={"musa:1": "cpu", "musa": "cpu"})(X).device.type == "cpu"
    assert files.loads(content, device={})(X).device.type == "musa"
