"""Platform operators in the runner: traced natively, tried, promoted where they hold, and the native path is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fxpatch
from fake_kernels.declare import declare
from fake_kernels.library import find
from fxpatch.layers.activation import SiluAndMul
from fxpatch.layers.adoption import optimize
from fxpatch.layers.norm import RMSNorm
from fxpatch.layers.platform_op import look_again
from fxpatch.native import find_operators, native, promote

SWIGLU, RMSNORM = "aten::_fused_swiglu_forward", "aten::_fused_rmsnorm_forward"
TOLERANCE = 2e-4  # float32 logits of order 1; a padded product may add in another order


@pytest.fixture
def vendor(musa: str) -> Iterator[dict[str, Any]]:
    """torch_musa's two operators on the simulated device. `"calls"` counts them, `"wrong"` names one that is wrong."""
    state: dict[str, Any] = {"calls": Counter(), "wrong": None}

    def made(record: Any) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            state["calls"][record.op] += 1
            result = record.reference(*args)
            return result * 1.1 if state["wrong"] == record.op else result

        return kernel

    records = [find(SWIGLU), find(RMSNORM)]
    with declare([r.schema for r in records], {r.op: made(r) for r in records}):
        look_again()
        with fxpatch.install(musa):
            yield state
    look_again()
    torch._dynamo.reset()


class Block(nn.Module):
    """Norm with a residual, gate and up in one product, down: as engines have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = RMSNorm(16), SiluAndMul()
        self.gate_up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, total = self.norm(x, x * 0.5)
        return total + torch.softmax(self.down(self.act(self.gate_up(y))), -1)


def targets(runner: fxpatch.PiecewiseRunner) -> Counter[str]:
    assert runner._made.prepared is not None
    graph = runner._made.prepared.traced.gm.graph  # type: ignore[attr-defined]
    return Counter(str(getattr(node.target, "__name__", node.target)) for node in graph.nodes)


def named(counts: Counter[str], part: str) -> int:
    return sum(count for name, count in counts.items() if part in name)


def test_operators_are_found_and_run_natively_in_a_context(vendor: dict[str, Any], musa: str) -> None:
    model = nn.Sequential(Block(), Block()).to(musa).requires_grad_(False)
    found = find_operators(model, musa)
    assert [(op.name, op.optimized_name) for op in found] == [
        (f"{n}.{name}", "forward_musa") for n in (0, 1) for name in ("norm", "act")
    ]
    x = torch.randn(2, 16, device=musa)
    with native(found):
        model(x)
    assert not vendor["calls"]
    model(x)
    assert vendor["calls"] == {SWIGLU: 2, RMSNORM: 2}


def test_equal_instances_share_a_trial() -> None:
    model = nn.Sequential(*(SiluAndMul() for _ in range(3)), *(RMSNorm(8) for _ in range(3)))
    configurations = [op.configuration() for op in find_operators(model, "musa")]
    assert len(configurations) == 6
    assert len(set(configurations)) == 2


def test_a_promotion_decides_by_what_the_kernel_computes(vendor: dict[str, Any], musa: str) -> None:
    model = nn.Sequential(Block()).to(musa).requires_grad_(False)
    x = torch.randn(4, 16, device=musa)
    decided = promote(model, (x,), {}, musa, capture=None, slower=True)
    assert decided.promoted == ("0.norm", "0.act") or set(decided.promoted) == {"0.norm", "0.act"}
    vendor["wrong"] = SWIGLU
    decided = promote(model, (x,), {}, musa, capture=None, slower=True)
    assert set(decided.promoted) == {"0.norm"}
    assert decided["0.act"].reason.startswith("differs from native")


def test_a_missing_kernel_is_a_reason_in_the_table(musa: str) -> None:
    look_again()
    model = nn.Sequential(Block()).to(musa).requires_grad_(False)
    decided = promote(model, (torch.randn(4, 16, device=musa),), {}, musa, capture=None, slower=True)
    assert not decided.promoted
    assert decided["0.act"].reason.startswith(f"raises LayerError: {SWIGLU} is not registered")


def test_through_the_runner(vendor: dict[str, Any], musa: str) -> None:
    model = nn.Sequential(Block(), Block()).to(musa).eval().requires_grad_(False)
    runner = fxpatch.PiecewiseRunner(
        model, dynamic={"input": 0}, split=["softmax"], sizes=[2, 4], compiler="eager", native="any_speed",
        on_error="raise",
    )  # fmt: skip
    report = runner.prepare(torch.randn(4, 16, device=musa))
    assert {each.operator: each.chosen for each in report.operators} == {
        f"{n}.{name}": "optimized" for n in (0, 1) for name in ("norm", "act")
    }
    counts = targets(runner)
    assert named(counts, "_fused_swiglu_forward") == 2
    assert named(counts, "_fused_rmsnorm_forward") == 2
    assert named(counts, "silu") == 0
    assert named(counts, "rsqrt") == 0
    for n in (1, 2, 3, 4):
        x = torch.randn(n, 16, device=musa)
        torch.testing.assert_close(runner(x).cpu(), model(x).cpu())


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def test_an_optimized_llama_through_the_runner(vendor: dict[str, Any], musa: str) -> None:
    model = llama()
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = {n: model(input_ids=ids[:, :n], use_cache=False).logits for n in (1, 3, 4, 8)}
    with optimize(model, musa) as handle:
        model.to(musa)
        runner = fxpatch.PiecewiseRunner(
            model, dynamic={"input_ids": 1}, split=["scaled_dot_product_attention"], sizes=[4, 8], compiler="eager",
            native="any_speed", on_error="raise",
        )  # fmt: skip
        report = runner.prepare(input_ids=ids.to(musa), use_cache=False)
        chosen = {each.operator: each.chosen for each in report.operators}
        assert set(chosen) == {name for row in handle.report.replaced for name in row.names}
        assert set(chosen.values()) == {"optimized"}
        counts = targets(runner)
        assert named(counts, "_fused_swiglu_forward") == 2
        assert named(counts, "_fused_rmsnorm_forward") == 5
        assert named(counts, "rsqrt") == 0
        for n, logits in expected.items():
            seen = runner(input_ids=ids[:, :n].to(musa), use_cache=False).logits.cpu()
            torch.testing.assert_close(seen, logits, rtol=TOLERANCE, atol=TOLERANCE)
        assert [row.way for row in report.sizes] == ["captured", "captured"]
