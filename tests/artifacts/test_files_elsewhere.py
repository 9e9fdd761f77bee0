"""What was saved for `musa` is loaded in other processes: where the backend is called `npu`, where it has no name, with
a vendor's shim and without. Results are compared with those of eager before saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import Plain, traced
from torch.fx.passes.shape_prop import ShapeProp

import fxpatch
from fxpatch.artifacts import files
from fxpatch.simulator.shim import replaced_torch_device

BEGIN = """
import json, os, sys, torch, fxpatch
from fxpatch.errors import MissingHereError
held = sys.argv[1] if len(sys.argv) > 1 else os.environ["HELD"]
told = json.load(open(os.path.join(held, "told.json")))

def check(device=None, name=None, **options):
    where = (device or "musa").split(":")[0]
    for kind in ("plain", "shim", "program"):
        found = fxpatch.load(os.path.join(held, kind), device=device, **options)
        call = found.module() if kind == "program" else found
        out = call(torch.tensor(told["x"]).to(where))
        assert out.device.type == where, out.device
        torch.testing.assert_close(out.cpu(), torch.tensor(told["y"]))
        module = found.graph_module if kind == "program" else found
        assert "musa" not in module.code or where == "musa", module.code
        values = [n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        assert {v.device.type for v in values} <= {where, "cpu"}, values
        print(kind, where, "ok")

def refuse(words, device=None):
    for kind in ("plain", "shim", "program"):
        try:
            fxpatch.load(os.path.join(held, kind), device=device)
        except MissingHereError as error:
            assert all(each in str(error) for each in words), str(error)
            print(kind, "refused")
        else:
            raise AssertionError(kind)
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph, a graph traced and saved under a shim, and a program; an input, and what eager made of it before."""
    path = tmp_path_factory.mktemp("held")
    model, x = Plain("musa"), torch.randn(3, 4)
    told = {"x": x.tolist(), "y": model(x.to("musa")).tolist()}
    (path / "told.json").write_text(json.dumps(told))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPATCH_KEY_FILE", str(path / "key"))
        gm = traced(model)
        ShapeProp(gm, torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)).propagate(x.to("musa"))
        fxpatch.save(gm, path / "plain")
        fxpatch.save(torch.export.export(model, (x.to("musa"),)), path / "program")
        with replaced_torch_device("musa"), fxpatch.install("musa"):
            gm = traced(Plain("musa"))
            gm.graph.nodes.__iter__().__next__().meta["where"] = torch.device("cuda:0")  # the shim makes it musa:0
            assert gm.graph.nodes.__iter__().__next__().meta["where"].type == "musa"
            fxpatch.save(gm, path / "shim")
    return path


@pytest.fixture
def elsewhere(fresh: Callable[..., str], held: Path) -> Callable[[str], list[str]]:
    def run(code: str) -> list[str]:
        env: dict[str, Any] = {"HELD": str(held), "FXPATCH_KEY_FILE": str(held / "key")}
        return fresh(BEGIN + code, **env).splitlines()

    return run


def test_where_the_backend_has_another_name(elsewhere: Callable[[str], list[str]]) -> None:
    out = elsewhere("""
fxpatch.simulate("npu")
refuse(["the file holds musa", "PrivateUse1 is called 'npu'", "torch_musa", "device='npu'", "device='cpu'"])
refuse([", which is to become npu:5; torch.npu.device_count() is 1", "device='npu:0'"], device="npu:5")
check("npu")
check("npu:0")
check("npu", unpin=True)
check("cpu")
""")
    assert out[6:] == [f"{kind} {where} ok" for where in ["npu"] * 3 + ["cpu"] for kind in ("plain", "shim", "program")]


def test_where_it_has_no_name(elsewhere: Callable[[str], list[str]]) -> None:
    out = elsewhere("""
refuse(["PrivateUse1 has no name", "device='cpu'"])
refuse(["no device type 'npu'"], device="npu")
check("cpu")
""")
    assert out[6:] == ["plain cpu ok", "shim cpu ok", "program cpu ok"]


def test_on_the_same_device_under_a_shim(elsewhere: Callable[[str], list[str]]) -> None:
    out = elsewhere("""
fxpatch.simulate("musa")
from fxpatch.simulator.shim import load_shim
load_shim("musa")
fxpatch.install("musa")
check()
check("cpu")
""")
    assert len(out) == 6


def test_files_do_not_depend_on_the_shim(held: Path) -> None:
    """Byte for byte: what is saved under a shim is what is saved without it."""
    plain = files.dumps(traced(Plain("musa")))
    with replaced_torch_device("musa"), fxpatch.install("musa"):
        gm = traced(Plain("musa"))
        assert files.dumps(gm) == plain
    assert b"DeviceFactoryWrapper" not in (held / "shim").read_bytes()
