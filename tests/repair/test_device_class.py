"""A replaced `torch.device` is repaired wherever torch remembers the class, whichever came first, and exactly.

Each case is a process of its own: the order of imports is the point. `shim` is what vendors do (see
`fxpatch/simulator/shim.py`); `torchada` is the real package from PyPI, told that it runs on MUSA.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

PROBES = """
import io, json, pickle, sys, warnings
import torch
import types
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
module = types.ModuleType("torch.musa")
for name, value in dict(is_available=True, device_count=1, current_device=0, is_initialized=True).items():
    setattr(module, name, lambda value=value: value)
_setup_privateuseone_for_python_backend("musa", backend_module=module)
from fxpatch.patching import Ledger
from fxpatch.repair import PATCHES

def shim():
    if "{form}" == "torchada":
        import os
        os.environ["TORCHADA_PLATFORM"] = "musa"
        import torchada
    else:
        from fxpatch.simulator.shim import load_shim
        load_shim("musa", "{form}")

for step in "{order}".split():
    {{"shim": shim, "dynamo": lambda: __import__("torch._dynamo"), "settle": lambda: None}}[step]() if step != "settle" \\
        else globals().__setitem__("ledger", Ledger(PATCHES, "musa")) or ledger.settle()

REAL = torch._C.device

def compiled(f, *args):
    import torch._dynamo
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)(*args)

def literal(d):
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), d))
    return torch.fx.GraphModule({{}}, graph)

def repickled(gm):
    return pickle.loads(pickle.dumps(gm))

def dev_param(x: torch.Tensor, dev: torch.device) -> torch.Tensor:
    return x.clone()

def weights_only():
    buffer = io.BytesIO()
    torch.save({{"d": REAL("cpu")}}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["d"]

x = torch.ones(2)
checks = {{
    "fx literal is exact": lambda: literal(REAL("cuda", 1))(x)[1] == REAL("cuda", 1),
    "fx literal of the device": lambda: literal(REAL("musa", 0))(x)[1] == REAL("musa", 0),
    "fx pickle is exact": lambda: repickled(literal(REAL("cuda", 1)))(x)[1] == REAL("cuda", 1),
    "x.device in a graph": lambda: bool((compiled(lambda x: x + torch.ones(2, device=x.device), x) == 2).all()),
    "torch.device() in a graph": lambda: bool((compiled(lambda x: x.to(torch.device("cpu")) + 1, x) == 2).all()),
    "the real class in a graph": lambda: bool((compiled(lambda x: x.to(REAL("cpu")) + 1, x) == 2).all()),
    "isinstance in a graph as in eager":
        lambda: compiled(lambda x: (x + 1, isinstance(x.device, torch.device)), x)[1] is isinstance(x.device, torch.device),
    "schema of a custom op": lambda: torch.library.infer_schema(dev_param, mutates_args=()) == "(Tensor x, Device dev) -> Tensor",
    "pickle is torch's own": lambda: b"torch" in pickle.dumps(REAL("cpu")) and b"Wrapper" not in pickle.dumps(REAL("cpu")),
    "weights_only": lambda: weights_only() == REAL("cpu"),
}}
results = {{}}
for name, check in checks.items():
    try:
        results[name] = bool(check())
    except Exception as error:
        results[name] = f"{{type(error).__name__}}: {{str(error).splitlines()[0][:100]}}"
print("RESULT", json.dumps(results))
"""

ORDERS = ["shim dynamo settle", "shim settle dynamo", "dynamo shim settle", "settle shim dynamo", "settle dynamo shim"]


def run(fresh: Callable[..., str], form: str, order: str) -> dict[str, object]:
    out = fresh(PROBES.format(form=form, order=order))
    found: dict[str, object] = json.loads(out.split("RESULT ", 1)[1].splitlines()[0])
    return found


@pytest.mark.parametrize("order", ["shim dynamo", "dynamo shim"])
def test_without_repair_it_is_broken(fresh: Callable[..., str], order: str) -> None:
    """The checks below can fail."""
    failed = {name for name, result in run(fresh, "factory", order).items() if result is not True}
    assert failed >= {
        "fx literal is exact",
        "fx pickle is exact",
        "x.device in a graph",
        "isinstance in a graph as in eager",
        "schema of a custom op",
        "pickle is torch's own",
    }


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["factory", "local", "equal", "torchada"])
def test_repaired_in_every_order(fresh: Callable[..., str], form: str, order: str) -> None:
    if form == "torchada":
        pytest.importorskip("torchada", reason="torchada, the vendor's package from PyPI, is not installed")
    results = run(fresh, form, order)
    late = {"schema of a custom op", "pickle is torch's own", "weights_only"}
    checked = {name: result for name, result in results.items() if name not in late or "settle shim" not in order}
    assert {name: result for name, result in checked.items() if result is not True} == {}
