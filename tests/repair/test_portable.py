"""What is pickled under a vendor's shim, with fxpatch installed, loads where neither the shim nor fxpatch is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

WRITE = """
import pickle, torch, fxpatch
from fxpatch.simulator.shim import load_shim
fxpatch.simulate("musa")
shim = load_shim("musa", "local")
REAL = torch._C.device

def module(*literals):
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), *literals))
    return torch.fx.GraphModule({{}}, graph)

if {installed}:
    fxpatch.install()
torch.save({{"weights": torch.arange(3.0), "device": REAL("cpu")}}, {path!r} + ".pt")
with open({path!r}, "wb") as file:
    pickle.dump([REAL("cuda", 1), REAL("cpu"), module(REAL("cuda", 1), REAL("cpu"))], file)
"""

READ = """
import sys
sys.modules["fxpatch"] = sys.modules["wrapt"] = None
import pickle, torch
saved = torch.load({path!r} + ".pt", weights_only=True)
assert saved["weights"].tolist() == [0, 1, 2] and saved["device"] == torch.device("cpu")
with open({path!r}, "rb") as file:
    *devices, module = pickle.load(file)
assert devices == [torch.device("cuda", 1), torch.device("cpu")], devices
assert module(0) == (0, torch.device("cuda", 1), torch.device("cpu"))
print("loaded")
"""


def test_pickles_and_checkpoints_load_without_the_vendor(fresh: Callable[..., str], tmp_path: Path) -> None:
    path = str(tmp_path / "artifact")
    fresh(WRITE.format(path=path, installed=True))
    assert fresh(READ.format(path=path), TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "loaded\n"


def test_without_fxpatch_they_cannot_even_be_written(fresh: Callable[..., str], tmp_path: Path) -> None:
    code = "try:\n" + "".join(f"    {line}\n" for line in WRITE.splitlines()) + "except Exception as e: print(e)\n"
    out = fresh(code.format(path=str(tmp_path / "artifact"), installed=False))
    assert "Can't pickle local object 'install_shim.<locals>.DeviceFactoryWrapper'" in out
