"""GraphModules in files: the same results as eager gave before saving, with everything a graph can hold."""

from __future__ import annotations

import io
import json
import operator
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import Model, Plain, assert_same, traced, with_literal
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import fxpatch
from fxpatch.artifacts import files, loading
from fxpatch.artifacts.container import Opened
from fxpatch.errors import ArtifactError, MissingHereError


def again(what: Any, **options: Any) -> Any:
    return files.loads(files.dumps(what), **options)


@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_results_are_those_of_eager_before_saving(device: str, tmp_path: Path) -> None:
    model = Model(device)
    x = torch.randn(3, 4, device=device)
    before = model(x)
    fxpatch.save(traced(model), tmp_path / "model.fx")
    loaded = fxpatch.load(tmp_path / "model.fx")
    assert_same(loaded(x), before)
    assert_same(torch.fx.Interpreter(loaded).run(x), before)
    assert loaded.code.split("):", 1)[0].endswith("def forward(self, x")  # annotations are not kept
    assert loaded.code.split("\n", 4)[-1] == traced(model).code.split("\n", 4)[-1]


def test_what_is_tied_stays_tied_and_trains() -> None:
    model = Model("musa")
    loaded = again(traced(model))
    assert loaded.first.weight is loaded.second.weight
    assert isinstance(loaded.first.weight, torch.nn.Parameter)
    assert set(loaded.state_dict()) == set(traced(model).state_dict())
    x = torch.randn(3, 4, device="musa")
    for each in (model, loaded):
        each(x)["y"].sum().backward()
    torch.testing.assert_close(loaded.first.weight.grad.cpu(), model.first.weight.grad.cpu())


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.uint16),
]


def _holding(**tensors: torch.Tensor) -> torch.fx.GraphModule:
    root, graph = torch.nn.Module(), torch.fx.Graph()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            root.register_parameter(name, tensor)
        else:
            root.register_buffer(name, tensor)
    graph.output(tuple(graph.get_attr(name) for name in tensors))
    return torch.fx.GraphModule(root, graph)


@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_dtypes_bit_for_bit(device: str) -> None:
    raw = torch.arange(96, dtype=torch.uint8)
    raw[:16] = raw[:16] % 2
    held = {f"t{number}": raw.clone().view(dtype).to(device) for number, dtype in enumerate(DTYPES)}
    held["t8"] = (raw % 2).view(torch.bool).to(device)
    held["nan"] = torch.tensor([float("nan"), -0.0, float("inf")], device=device)
    for found, wanted in zip(again(_holding(**held))(), held.values(), strict=True):
        assert found.dtype == wanted.dtype
        assert found.device == wanted.device
        assert bytes(found.cpu().view(torch.uint8).numpy()) == bytes(wanted.cpu().view(torch.uint8).numpy())


@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_views_share_memory_and_keep_their_strides(device: str) -> None:
    base = torch.arange(24.0).to(device)
    held = {
        "base": base,
        "part": base[3:9],
        "turned": base.view(4, 6).t(),
        "wide": base[:1].expand(5),
        "last": base[23:],
        "none": base[24:],
        "scalar": base[7],
        "empty": torch.empty(0, 3, device=device),
    }
    found = dict(zip(held, again(_holding(**held))(), strict=True))
    for name, wanted in held.items():
        assert (found[name].shape, found[name].stride(), found[name].storage_offset()) == (
            (wanted.shape, wanted.stride(), wanted.storage_offset())
        )
        torch.testing.assert_close(found[name].cpu(), wanted.cpu())
    found["base"].fill_(-1)
    assert found["part"].cpu().tolist() == [-1] * 6
    assert (found["turned"].cpu() == -1).all()


def test_other_kinds_of_tensors() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    conj, negative, kept = again(_holding(conj=z.conj(), negative=z.conj().imag, kept=frozen))()
    assert conj.is_conj()
    assert negative.is_neg()
    torch.testing.assert_close(conj, z.conj())
    torch.testing.assert_close(negative, z.conj().imag)
    assert isinstance(kept, torch.nn.Parameter)
    assert not kept.requires_grad


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, requires_grad=True) * 2, "a history"),
        (torch.empty(2, device="meta"), "meta device"),
    ],
)
def test_tensors_that_cannot_be_saved_are_refused(tensor: torch.Tensor, words: str) -> None:
    graph = torch.fx.Graph()
    graph.output(graph.get_attr("held"))
    root = torch.nn.Module()
    root.register_buffer("held", tensor)
    with pytest.raises(ArtifactError, match=words):
        files.dumps(torch.fx.GraphModule(root, graph))


def test_submodules_that_are_graphs_and_shared() -> None:
    model = Plain("musa")
    gm = traced(model)
    parts = iter(range(len(gm.graph.nodes)))
    split = split_module(gm, model, lambda _node: min(next(parts) // 3, 1))
    split.add_submodule("again", split.submod_0)
    loaded = again(split)
    assert isinstance(loaded.submod_0, torch.fx.GraphModule)
    assert loaded.again is loaded.submod_0
    x = torch.randn(2, 4, device="musa")
    torch.testing.assert_close(loaded(x).cpu(), model(x).cpu())


def test_metadata_is_kept_where_it_is_plain_and_named_where_it_is_not() -> None:
    model = Plain("musa")
    gm = traced(model)
    ShapeProp(gm).propagate(torch.randn(2, 4, device="musa"))
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    node = next(iter(gm.graph.nodes))
    node.meta["val"] = mode.from_tensor(torch.empty(2, 4, device="musa"))
    node.meta["custom"] = {"where": [torch.device("musa", 0)], "n": 3}
    node.meta["object"] = object()
    content = files.dumps(gm)
    assert "object" in Opened(content).manifest["left out"]
    for device, name in ((None, "musa"), ("cpu", "cpu")):
        found = next(iter(files.loads(content, device=device).graph.nodes)).meta
        assert found["tensor_meta"] == node.meta["tensor_meta"]
        assert isinstance(found["val"], torch._subclasses.FakeTensor)
        assert (found["val"].shape, found["val"].device.type) == (torch.Size([2, 4]), name)
        assert found["custom"] == {"where": [torch.device(name, 0) if name == "musa" else torch.device("cpu")], "n": 3}
        assert "object" not in found


def test_trees_in_and_out() -> None:
    def f(pair: Any, *, named: Any) -> Any:
        return {"sum": pair[0] + named["x"], "list": [pair[1]]}

    args = ((torch.ones(2, device="musa"), torch.zeros(2, device="musa")),)
    kwargs = {"named": {"x": torch.full((2,), 3.0, device="musa")}}
    gm = torch._dynamo.export(f)(*args, **kwargs).graph_module
    assert_same(again(gm)(*args, **kwargs), f(*args, **kwargs))


def test_operators_and_functions_of_every_kind() -> None:
    def f(x: torch.Tensor) -> Any:
        y = torch.ops.aten.add.Tensor(x, 1, alpha=2) + torch.ops.aten.mul(x, 2.5)
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y) @ torch.einsum("bij->bji", x)
        y = torch.select_scatter(y, torch.linalg.norm(x, dim=-1), -1, 0)
        y = torch.nn.functional.max_pool1d(y, 2) + operator.neg(x.shape[0])
        return torch.cat([y, y.to(torch.float32).contiguous(memory_format=torch.contiguous_format)], dim=-1)

    gm = torch.fx.symbolic_trace(f)
    x = torch.randn(2, 4, 4)
    content = files.dumps(gm)
    torch.testing.assert_close(files.loads(content)(x), f(x))
    for trusted in (True, False):  # all of it is in anybody's vocabulary
        opened = Opened(content)
        loaded = loading._read_graph(opened, trusted, None, False, None)
        torch.testing.assert_close(loaded(x), f(x))


def test_a_method_named_after_the_backend_becomes_one_that_is_always_there() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_method("musa", (x,)), graph.call_method("musa", (x, 0))))
    content = files.dumps(torch.fx.GraphModule({}, graph))
    x = torch.ones(2)
    assert [each.device.type for each in files.loads(content)(x)] == ["musa", "musa"]
    assert [each.device.type for each in files.loads(content, device="cpu")(x)] == ["cpu", "cpu"]


def test_nothing_is_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by pickle nor by torch, when it is saved or loaded; and no member looks like one."""
    for owner, name in ((pickle, "loads"), (pickle, "dumps"), (torch, "load"), (torch, "save"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("it was pickled"))
    content = files.dumps(traced(Model("musa")))
    files.loads(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                assert isinstance(json.loads(archive.read(name)), dict)
            else:
                assert name.startswith("storage/")


# -- devices -----------------------------------------------------------------------------------------------------------


def test_on_the_cpu() -> None:
    model = Model("musa")
    x = torch.randn(3, 4)
    before = model(x.to("musa"))
    loaded = again(traced(model), device="cpu")
    assert {each.device.type for each in loaded.state_dict().values()} == {"cpu"}
    assert_same(loaded(x), before, to="cpu")


def test_a_string_that_is_data_is_not_a_device() -> None:
    """`"musa:0"` in the model's results stays, `to("musa:0")` does not."""
    loaded = again(traced(Model("musa")), device="cpu")
    assert loaded(torch.randn(3, 4))["more"][1][-1] == "musa:0"
    assert "musa" not in loaded.code.replace("'musa:0'", "")


def test_from_an_index_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    content = files.dumps(with_literal(torch.device("musa", 1)))
    with pytest.raises(MissingHereError, match=r"holds musa:1; torch.musa.device_count\(\) is 1"):
        files.loads(content)
    loaded = files.loads(content, device="musa:0")
    out, told = loaded(torch.ones(3))
    assert out.cpu().tolist() == [2, 2, 2]
    assert told == {"where": [torch.device("musa", 0)]}
    monkeypatch.setattr(torch.musa, "device_count", lambda: 2)
    for given in ("musa:0", "musa"):
        here = torch.device(given)
        moved = again(with_literal(here), device="musa:1")
        assert moved.graph.find_nodes(op="call_method", target="to")[0].args[1] == torch.device("musa", 1)


def test_unpinned_literals_mean_the_current_device() -> None:
    loaded = again(with_literal(torch.device("musa", 1)), unpin=True)
    out, told = loaded(torch.ones(3))
    assert out.device == torch.device("musa", torch.musa.current_device())
    assert told == {"where": [torch.device("musa")]}
    assert "index" not in loaded.code


def test_a_comparison_of_devices_is_not_unpinned() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    here = graph.call_function(getattr, (x, "device"))
    graph.output(graph.call_function(operator.eq, (here, torch.device("musa", 0))))
    gm = torch.fx.GraphModule({}, graph)
    assert again(gm)(torch.ones(2, device="musa")) is True
    with pytest.raises(ArtifactError, match="cannot be un-pinned"):
        again(gm, unpin=True)


def test_two_devices_do_not_become_one_silently() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_method("to", (x, torch.device("musa", index))) for index in (0, 1)])
    content = files.dumps(torch.fx.GraphModule({}, graph))
    for options in ({"device": "cpu"}, {"device": "musa:0"}, {"unpin": True}):
        with pytest.raises(ArtifactError, match=r"(?s)Several devices would become one.*musa:0.*musa:1"):
            files.loads(content, **options)
    loaded = files.loads(content, device={"musa:1": "cpu"})
    assert [each.device.type for each in loaded(torch.ones(1))] == ["musa", "cpu"]
    loaded = files.loads(content, device={"musa": "cpu"})
    assert [each.device.type for each in loaded(torch.ones(1))] == ["cpu", "cpu"]


def test_a_file_without_an_accelerator_is_moved_by_a_mapping() -> None:
    content = files.dumps(traced(Plain("cpu")))
    with pytest.raises(ArtifactError, match=r"device=\{'cpu': 'musa'\}"):
        files.loads(content, device="musa")
    assert files.loads(content, device="cpu").shift.device.type == "cpu"
    loaded = files.loads(content, device={"cpu": "musa"})
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(x.to("musa")).cpu(), Plain("cpu")(x))


@pytest.mark.parametrize("device", ["musa 0", "musa:", "musa:x", "", ":1", 3])
def test_what_is_no_device(device: Any) -> None:
    with pytest.raises(ArtifactError, match="This is no device"):
        again(with_literal(torch.device("musa")), device=device)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_changes_results_and_has_no_form_is_refused() -> None:
    hooked = traced(Model("cpu"))
    hooked.get_submodule("rest.0").register_forward_hook(lambda *_: None)
    with pytest.raises(ArtifactError, match=r"rest.0 has hooks \(_forward_hooks\)"):
        files.dumps(hooked)

    def local(x: Any) -> Any:
        return x

    graph = torch.fx.Graph()
    graph.output(graph.call_function(local, (graph.placeholder("x"),)))
    with pytest.raises(ArtifactError, match="local is neither an operator nor a function"):
        files.dumps(torch.fx.GraphModule({}, graph))


@pytest.mark.parametrize("what", [None, torch.nn.Linear(2, 2), "model", b"", (b"", 1)])
def test_other_objects_are_no_artifacts(what: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no artifact of this"):
        fxpatch.save(what, tmp_path / "x.fx")
    assert list(tmp_path.glob("*.fx*")) == []


def test_an_operator_that_is_not_here() -> None:
    library = torch.library.Library("artifact_tests_gone", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.artifact_tests_gone.twice.default, (graph.placeholder("x"),)))
    content = files.dumps(torch.fx.GraphModule({}, graph))
    assert files.loads(content)(torch.ones(1)).item() == 2
    library._destroy()
    with pytest.raises(MissingHereError, match=r"artifact_tests_gone::twice(?s:.*)import the package that defines"):
        files.loads(content)
