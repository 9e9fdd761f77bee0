"""fxpatch together with the real torchada, on a simulated `torch.musa` (see `musa_stand_in.py`).

What torchada does to `torch.device`, in every order of imports, is in tests/repair/test_device_class.py. Here: whether
the rest of torchada and the rest of fxpatch get along.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(  # not imported here: it would patch this process
        importlib.util.find_spec("torchada") is None,
        reason="torchada, the vendor's package from PyPI, is not installed",
    ),
]

HEAD = """
import json, sys; sys.path[:0] = ["vendor", "install"]
import torch, fxpatch
from musa_stand_in import load_torchada
from zygote import snapshot
REAL = torch._C.device
fxpatch.simulate("musa")

def literal(device):
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), device))
    return torch.fx.GraphModule({}, graph)

def play(steps):
    '''Runs steps in order; the last installation.'''
    for step in steps.split():
        if step == "torchada":
            load_torchada()
        elif step == "compilers":
            import torch._inductor.compile_fx
        else:
            installed = fxpatch.install()
    return installed
"""


@pytest.fixture
def musa_process(fresh: Callable[..., str]) -> Callable[[str], Any]:
    """`musa_process(code)`: runs Python source after `HEAD`; returns `result`, which the source sets to JSON."""

    def run(code: str) -> Any:
        out = fresh(f"{HEAD}\n{code}\nprint('RESULT', json.dumps(result))")
        return json.loads(out.split("RESULT ", 1)[1].splitlines()[0])

    return run


def test_torchada_alone_runs_a_graph_on_another_device_than_it_says(musa_process: Callable[[str], Any]) -> None:
    """What the tests below are for; and the stand-in does make torchada change torch."""
    literals = """
load_torchada()
devices = REAL("cuda", 1), REAL("musa", 0), REAL("cpu")
alone = [str(literal(device)(0)[1]) for device in devices]
with fxpatch.install():
    repaired = [str(literal(device)(0)[1]) for device in devices]
result = [alone, repaired, [str(literal(device)(0)[1]) for device in devices]]
"""
    alone, repaired, afterwards = musa_process(literals)
    assert alone == ["musa:1", "musa:0", "cpu"]
    assert repaired == ["cuda:1", "musa:0", "cpu"]
    assert afterwards == alone


@pytest.mark.parametrize("steps", ["torchada install", "install torchada"])
def test_what_torchada_maps_stays_mapped(musa_process: Callable[[str], Any], steps: str) -> None:
    """Code written for CUDA still runs on the device: only literals in graphs are taken at their word."""
    code = f"""
play({steps!r})
named = torch.device("cuda", 0), torch.device("cuda"), torch.zeros(2, device="cuda").device, torch.ones(2).cuda().device
result = [d.type for d in named], isinstance(torch.ones(1).device, torch.device), isinstance("cpu", torch.device)
"""
    assert musa_process(code) == [["musa"] * 4, True, False]


def test_the_report_is_true(musa_process: Callable[[str], Any]) -> None:
    """What torchada has repaired is left to it, and both are named."""
    code = """
from importlib.metadata import version
play("torchada compilers install")
report = fxpatch.status()
result = {row.name: [row.state, row.reason] for row in report.rows}, str(report), version("torchada")
"""
    rows, text, version = musa_process(code)
    assert rows["fx-device-builtin"] == [
        "applied",
        "torch.device is replaced by torchada._patch.DeviceFactoryWrapper",
    ]
    for name in ("infer-schema-types", "dynamo-constant-types", "isinstance-in-compiled-code", "flex-attention-device"):
        assert rows[name][0] == "not needed", rows[name]
    assert {name for name, (state, _) in rows.items() if state == "refused"} == set()
    assert f" torchada {version}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", ["torchada install", "install torchada", "compilers install torchada", "compilers torchada install"]
)
def test_a_model_compiles_and_agrees_with_the_cpu(musa_process: Callable[[str], Any], steps: str) -> None:
    code = f"""
play({steps!r})
import torch._dynamo
torch.manual_seed(0)
class Model(torch.nn.Sequential):
    def forward(self, x):
        y = super().forward(x) + torch.ones(4, device=x.device)
        return y.to(torch.device("cpu")), isinstance(x.device, torch.device)
model = Model(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
x = torch.randn(3, 8)
expected, _ = model(x)
model, x = model.cuda(), x.cuda()
assert x.device == REAL("musa", 0), x.device
result = []
for backend in ("eager", "aot_eager", "inductor"):
    torch._dynamo.reset()
    out, is_device = torch.compile(model, backend=backend, fullgraph=True)(x)
    result.append([torch.allclose(out, expected, atol=1e-5), is_device])
"""
    assert musa_process(code) == [[True, True]] * 3


@pytest.mark.parametrize("compilers", ["", "compilers"])
def test_uninstall_leaves_torchadas_torch_as_found(musa_process: Callable[[str], Any], compilers: str) -> None:
    code = f"""
play("torchada {compilers} install").uninstall()  # what is imported at the first use is imported now
before = snapshot()
installed = play("install")
fxpatch.status()
installed.uninstall()
after = snapshot()
result = [list(installed.left), [place for place in before if before[place] != after.get(place)]]
"""
    assert musa_process(code) == [[], []]


def test_what_torchada_has_wrapped_since_is_left_and_named(musa_process: Callable[[str], Any]) -> None:
    """torchada wraps the check of FlexAttention over ours; ours, left underneath, no longer does anything."""
    code = """
play("compilers install")
from torch.nn.attention import flex_attention
installed = play("install torchada")
installed.uninstall()
class OnXla:
    device, requires_grad = REAL("xla"), False
try:
    flex_attention._validate_device(OnXla, OnXla, OnXla)
    refused = "nothing"
except ValueError as error:
    refused = str(error)
result = [list(installed.left), refused]
"""
    left, refused = musa_process(code)
    assert left == [
        "torch.nn.attention.flex_attention._validate_device was changed by somebody else since: left as it is"
    ]
    assert "Found input tensors on xla device" in refused
