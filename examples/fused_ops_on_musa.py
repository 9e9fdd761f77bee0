"""A gated MLP on fused vendor kernels, compiled whole: norm, per-token-group fp8 quantisation, swiglu.

    python examples/fused_ops_on_musa.py                 on a simulated `musa` accelerator: no hardware needed
    python examples/fused_ops_on_musa.py --device musa   on real hardware (imports torch_musa and sgl_kernel)

On the simulated device the operators of torch_musa and of sgl_kernel's MUSA build are declared from their schemas and
computed by the references of `fake_kernels.library`. The quantisation kernel writes into tensors that its schema does
not mark. Two things are shown, and the exit status is 1 if one of them does not hold:

1. without `fxpatch.install()` the model does not trace;
2. with it the model compiles with `fullgraph=True`, calls each kernel as often as eagerly, and equals the same
   computation in plain torch within `TOLERANCE`, and the one without quantisation within `QUANTISATION`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

import fxpatch
from fake_kernels.declare import declare
from fake_kernels.library import find, load
from fake_kernels.library.per_token_group_quant import per_token_group_quant

CONSOLE = Console()
HIDDEN, WIDTH, TOKENS, GROUP = 256, 512, 48, 128
TOLERANCE = 2e-2  # bfloat16 and another order of rounding: relative to the largest output
QUANTISATION = 8e-2  # e4m3 has 3 bits of mantissa: relative, in the Frobenius norm
QUANT = "sgl_kernel::sgl_per_token_group_quant_8bit_v2"
FP8_MAX = 448.0


class GatedMLP(torch.nn.Module):
    """`down(swiglu(gate_up(norm(x))))` of bfloat16 rows `[tokens, HIDDEN]`, quantised before each product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.gate_up = torch.nn.Parameter(torch.randn(2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.down = torch.nn.Parameter(torch.randn(HIDDEN, WIDTH) / WIDTH**0.5)
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = torch.ops.aten._fused_rmsnorm_forward(x, (HIDDEN,), 1e-6, self.norm)
        x = self.linear(x, self.gate_up)
        x = torch.ops.aten._fused_swiglu_forward(x)
        return self.linear(x, self.down)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, scales = per_token_group_quant(x, GROUP, column_major_scales=True)
        return F.linear((q.float() * scales.repeat_interleave(GROUP, -1)).to(x.dtype), weight)


class NativeMLP(GatedMLP):
    """The same in operators that torch itself has."""

    quantised = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(x.float(), (HIDDEN,), self.norm.float(), 1e-6).to(x.dtype)
        gate, up = self.linear(x, self.gate_up).float().chunk(2, -1)
        return self.linear((F.silu(gate) * up).to(x.dtype), self.down)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not self.quantised:
            return F.linear(x, weight)
        groups = x.float().unflatten(-1, (-1, GROUP))
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
        q = (groups / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return F.linear((q.float() * scales).flatten(-2).to(x.dtype), weight)


def declare_vendor(calls: Counter[str]) -> Any:
    """The operators of torch_musa and of sgl_kernel's MUSA build on the simulated device; `calls` counts theirs."""
    names = ("aten::_fused_rmsnorm_forward", "aten::_fused_swiglu_forward")
    records = [find(name) for name in names]
    records += [record for record in load(["quantisation"]) if record.op == QUANT and record.hidden]

    def counted(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[op] += 1
            return kernel(*args, **kwargs)

        return call

    return declare([r.schema for r in records], {r.op: counted(r.op, r.reference) for r in records})


def traced(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, dynamic=True)(x)  # type: ignore[no-any-return]


def said(ok: bool, what: str) -> bool:
    CONSOLE.print(f"[{'green' if ok else 'red'}]{'ok' if ok else 'NO'}[/] {what}", highlight=False)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="real hardware; without it, a simulated musa")
    device = parser.parse_args().device
    calls: Counter[str] = Counter()
    if device is None:
        device = "musa"
        fxpatch.simulate(device)
        declare_vendor(calls)
    else:
        for package in (f"torch_{device}", "sgl_kernel"):
            importlib.import_module(package)

    torch.manual_seed(0)
    model, native = GatedMLP().to(device), NativeMLP().to(device)
    native.load_state_dict(model.state_dict())
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        expected = native(x)
        native.quantised = False
        exact = native(x)
        calls.clear()
        eager = model(x)
    eagerly = dict(calls)

    results = []
    try:
        traced(model, x)
        results.append(said(False, "without install() it should not trace, and it did"))
    except Exception as error:
        results.append(said(True, f"without install() it does not trace: {str(error).splitlines()[0][:100]}"))

    with fxpatch.install(device):
        states = {row.operator: row.state for row in fxpatch.status().fakes}
        calls.clear()
        compiled = traced(model, x)
    far = ((compiled - expected).abs().max() / expected.abs().max()).item()
    quantisation = ((compiled.float() - exact.float()).norm() / exact.float().norm()).item()
    results.append(
        said(states[QUANT] == "shadowed", f"{QUANT} is {states[QUANT]}: it writes what its schema does not say")
    )
    results.append(
        said(torch.equal(compiled, eager), "compiled with fullgraph=True it equals itself in eager, bit for bit")
    )
    results.append(
        said(dict(calls) == eagerly, f"each kernel is called as often as in eager: {sum(eagerly.values())} times")
    )
    results.append(said(far <= TOLERANCE, f"it equals plain torch within {TOLERANCE:g}: {far:.2g}"))
    results.append(
        said(quantisation <= QUANTISATION, f"and unquantised torch within {QUANTISATION:g}: {quantisation:.2g}")
    )
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
