"""What a process can show only once: names of PrivateUse1, shims that stay, artifacts read where fxpatch is absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

APPLY = """
import io, pickle, sys, torch
from torch.fx import Graph, GraphModule
from fxpatch.codegen import PATCH, probe_codegen
from fxpatch.patching import Edits

def module(*names, devices):
    graph = Graph()
    nodes = [graph.placeholder(name) for name in names]
    graph.output((*nodes, *devices, "device(type='npu', index=0)"))
    return GraphModule({}, graph)

edits = Edits()
"""

WRITE = (
    APPLY
    + """
torch.utils.rename_privateuse1_backend("npu")
PATCH.apply("npu", False, edits)
devices = torch.device("npu", 0), torch.device("npu"), torch.device("cuda", 1)
for number, names in enumerate([("x", "y"), ("torch", "device"), ("torch", "_fxpatch_torch")]):
    gm = module(*names, devices=devices)
    with open(f"{folder}/{number}.pickle", "wb") as file:
        pickle.dump(gm, file)
    with torch.package.PackageExporter(f"{folder}/{number}.package") as exporter:
        exporter.save_pickle("model", "model.pickle", gm)
assert not any(name.startswith("torch._dynamo") for name in sys.modules)
"""
)

READ = """
import pickle, sys, torch
sys.modules["fxpatch"] = None  # an import of it fails
torch.utils.rename_privateuse1_backend("npu")
expected = 1, 2, torch.device("npu", 0), torch.device("npu"), torch.device("cuda", 1), "device(type='npu', index=0)"
for number in range(3):
    with open(f"{folder}/{number}.pickle", "rb") as file:
        data = file.read()
    assert b"fxpatch.codegen" not in data
    importer = torch.package.PackageImporter(f"{folder}/{number}.package")
    if number == 1:  # torch generates the code anew, and falls over the placeholder called `device` by itself
        try:
            pickle.loads(data)(1, 2)
        except TypeError as error:
            assert "object is not callable" in str(error)
        else:
            raise AssertionError
        continue
    for gm in (pickle.loads(data), importer.load_pickle("model", "model.pickle")):
        assert gm(1, 2) == expected, gm(1, 2)
"""


def test_artifacts_need_no_fxpatch_to_be_read(fresh: Callable[..., str], tmp_path: Path) -> None:
    fresh(f"folder = {str(tmp_path)!r}\n{WRITE}")
    fresh(f"folder = {str(tmp_path)!r}\n{READ}")


def test_before_the_rename(fresh: Callable[..., str]) -> None:
    fresh(
        APPLY
        + """
PATCH.apply("privateuseone", False, edits)
device = torch.device("privateuseone", 0)
gm = module("x", devices=[device, torch.device("cpu")])
assert "torch.device('privateuseone', 0), device(type='cpu')" in gm.code
assert gm(1)[1] == device
torch.utils.rename_privateuse1_backend("npu")
gm.recompile()
assert "torch.device('npu', 0), device(type='cpu')" in gm.code
assert gm(1)[1] == device
"""
    )


def test_a_shim_in_place_from_the_start(fresh: Callable[..., str]) -> None:
    fresh(
        """
import torch
from fxpatch.simulator.shim import load_shim
REAL = torch._C.device
torch.utils.rename_privateuse1_backend("npu")
load_shim("npu", "local")
"""
        + APPLY
        + """
import copy
exact = REAL("npu", 0), REAL("cuda", 1), REAL("cpu")

stock = module("x", devices=exact[:1])
try:
    stock(1)
except NameError as error:
    assert "device" in str(error)
else:
    raise AssertionError("torch needs no patch here")

assert probe_codegen() is False
PATCH.apply("npu", False, edits)
assert probe_codegen() is False
custom = module("x", devices=exact[:1])
every = module("device", "torch", devices=exact)
for gm, devices in ((custom, exact[:1]), (every, exact)):
    for each in (gm, copy.deepcopy(gm)):
        assert each(*"ab"[: len(each.graph.find_nodes(op="placeholder"))])[-len(devices) - 1 : -1] == devices
assert pickle.loads(pickle.dumps(custom))(1)[1] == exact[0]

# the names in a pickle's import block are torch's own, also where the alias stands in for torch
for gm in (custom, every):
    _, (_, imports) = gm.__reduce__()
    assert {line.split()[1].split(".")[0] for line in imports.splitlines() if " import " in line or
            line.startswith("import ")} <= {"torch", "math"}, imports
"""
    )
