"""Run by CI against the built wheel, in an environment outside the checkout: the wheel, torch, and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import torch

import compile_configs
import fake_kernels
import fxpatch

for package in (fxpatch, compile_configs, fake_kernels):
    home = Path(str(package.__file__)).parent
    assert str(home).startswith(sys.prefix), f"{package.__name__} comes from {home}, not from the wheel"
    assert (home / "py.typed").exists(), package.__name__
assert set(compile_configs.builtin_names()) == {"cpu", "cuda", "musa", "npu", "xpu"}
assert [e.value for e in importlib.metadata.entry_points(group="torch.backends")] == ["fxpatch.autoload:autoload"]

fxpatch.simulate("musa")
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).to("musa")
x = torch.randn(4, 8, device="musa")
with fxpatch.install() as installation:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).cpu(), model(x).cpu())
    assert "applied" in str(fxpatch.status())
assert installation.left == ()
graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()))
os.environ["FXPATCH_KEY_FILE"] = str(Path.cwd() / "smoke.key")
fxpatch.save(graph, "smoke.fx")
torch.testing.assert_close(fxpatch.load("smoke.fx", device={"cpu": "musa"})(x).cpu(), graph.to("musa")(x).cpu())
fxpatch.verify(model, (x,), stages=("interpreter", "aot_eager")).raise_if_wrong()
print(f"the wheel works: fxpatch {importlib.metadata.version('fxpatch')} on torch {torch.__version__}")
