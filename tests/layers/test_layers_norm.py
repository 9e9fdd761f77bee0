"""RMS norms against transformers' own, and the vendors' kernels against both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from vendor_kernels import declared

import fxpatch
from fxpatch.errors import LayerError
from fxpatch.layers.norm import RMSNorm
from fxpatch.layers.platform_op import look_again

FUSED = "aten::_fused_rmsnorm_forward"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # one rounding where the model has two
ORDERS: dict[str, tuple[type, dict[str, bool]]] = {
    "llama": (LlamaRMSNorm, {"cast_first": True}),
    "gemma": (Gemma2RMSNorm, {"one_plus": True}),
}


@pytest.fixture(autouse=True)
def _look_again() -> Iterator[None]:
    look_again()
    yield
    look_again()


@pytest.fixture
def fused(musa: str) -> Iterator[Counter[str]]:
    """torch_musa's RMS norm on the simulated device; its calls are counted."""
    with declared(FUSED) as calls:
        yield calls


def like(theirs: type, options: dict[str, bool], size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, RMSNorm]:
    """Theirs with random weights, and ours with the same."""
    reference = theirs(size, eps=1e-5).to(dtype)
    with torch.no_grad():
        reference.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(seed)))
    ours = RMSNorm(size, 1e-5, dtype=dtype, **options)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@settings(max_examples=30)
@given(
    order=st.sampled_from(sorted(ORDERS)),
    shape=st.lists(st.integers(0, 4), max_size=3),
    size=st.integers(1, 9),
    weight=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_native_is_transformers_bit_for_bit(
    order: str, shape: list[int], size: int, weight: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    """Also where weight and input have different dtypes, and the result has another."""
    theirs, ours = like(*ORDERS[order], size, weight, seed)
    x = torch.randn(*shape, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = theirs(x)
    assert ours(x).dtype == expected.dtype
    assert torch.equal(ours(x), expected)


def test_the_orders_of_rounding_differ() -> None:
    x = torch.randn(64, 32).bfloat16()
    weight = torch.randn(32).bfloat16()
    results = []
    for options in ({}, {"cast_first": True}):
        op = RMSNorm(32, dtype=torch.bfloat16, **options)
        op.load_state_dict({"weight": weight})
        results.append(op(x))
    assert not torch.equal(*results)
    exact = F.rms_norm(x.double(), [32], weight.double(), 1e-6)
    once, twice = ((y.double() - exact).abs().max() for y in results)
    assert once < twice


def test_without_a_weight() -> None:
    x = torch.randn(3, 8)
    op = RMSNorm(8, elementwise_affine=False)
    torch.testing.assert_close(op(x), F.rms_norm(x, [8], None, 1e-6))
    assert not list(op.parameters())


@pytest.mark.parametrize("order", [*ORDERS, "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_residual(order: str, dtype: torch.dtype) -> None:
    """The sum is rounded, then normalised: a model that adds and then normalises."""
    _, op = like(*ORDERS.get(order, (LlamaRMSNorm, {})), 8, dtype)
    x, residual = torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype)
    before = x.clone(), residual.clone()
    y, total = op(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, op(x + residual))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def permuted(*shape: int) -> torch.Tensor:
    """Rows in memory column by column."""
    return torch.randn(*shape).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("on", ["cpu", "musa", "musa, fused"])
def test_outputs_are_contiguous(residual: bool, on: str, musa: str, request: pytest.FixtureRequest) -> None:
    if on == "musa, fused":
        request.getfixturevalue("fused")
    device = on.partition(",")[0]
    x = permuted(3, 5, 8).to(device)
    assert not x.is_contiguous()
    outputs = RMSNorm(8).to(device).requires_grad_(False)(x, *[permuted(3, 5, 8).to(device)] * residual)
    outputs = outputs if residual else (outputs,)
    assert all(y.is_contiguous() for y in outputs)
    assert not torch.ops.aten.is_contiguous(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", [*ORDERS, "plain"])
def test_on_musa(fused: Counter[str], musa: str, dtype: torch.dtype, residual: bool, order: str) -> None:
    _, op = like(*ORDERS.get(order, (LlamaRMSNorm, {})), 16, dtype)
    x, other = torch.randn(6, 16).to(dtype), torch.randn(6, 16).to(dtype)
    arguments = (x, other) if residual else (x,)
    with torch.no_grad():
        expected = op(*arguments)
        seen = op.to(musa)(*(each.to(musa) for each in arguments))
        choice = op.choice(*(each.to(musa) for each in arguments))
    for a, b in zip(*((each if residual else (each,)) for each in (seen, expected)), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if order == "gemma" and dtype != torch.float32:
        assert not fused, "1 + weight in half precision is not Gemma"
        assert choice.reason == f"1 + weight is added in float32, and its kernel takes a weight of {dtype}"
    else:
        assert fused == {FUSED: 1}
        assert choice.kernel == FUSED


def test_the_newer_operator_of_musa(musa: str) -> None:
    calls = []

    def kernel(x: torch.Tensor, shape: list[int], weight: Any, eps: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(shape)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, x.new_empty(x.shape[:-1])

    op = RMSNorm(8).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = op(x)
    op.to(musa)
    assert op.choice(x.to(musa)).reason == (
        f"{FUSED} is not registered; aten::_fused_rms_norm has no kernel for musa"
    ), "torch's own composite of it is no kernel of the device's"
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm", kernel, "PrivateUse1")
        look_again()
        torch.testing.assert_close(op(x.to(musa)).cpu(), expected)
    assert calls == [[8]]


@pytest.mark.parametrize(
    ("weight", "x", "options", "reason"),
    [
        (torch.float32, torch.bfloat16, {"cast_first": True}, "the dtype of torch.float32 times torch.bfloat16"),
        (torch.float32, torch.bfloat16, {}, "its kernel takes no weight of torch.float32 with torch.bfloat16"),
        (torch.float64, torch.float64, {}, "its kernel does not take torch.float64"),
    ],
)
def test_what_the_kernel_does_not_take(
    fused: Counter[str], musa: str, weight: torch.dtype, x: torch.dtype, options: dict[str, bool], reason: str
) -> None:
    op = RMSNorm(8, dtype=weight, **options).requires_grad_(False)
    value = torch.randn(2, 8).to(x)
    expected = op(value)
    op.to(musa)
    assert reason in op.choice(value.to(musa)).reason
    assert torch.equal(op(value.to(musa)).cpu(), expected)
    assert not fused


def test_a_weight_that_learns_keeps_its_gradient(fused: Counter[str], musa: str) -> None:
    op, reference = RMSNorm(8).to(musa), RMSNorm(8)
    x = torch.randn(3, 8)
    assert op.choice(x.to(musa)).reason.startswith(f"{FUSED} has no gradient")
    op(x.to(musa)).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(op.weight.grad.cpu(), reference.weight.grad)
    assert not fused


@pytest.mark.parametrize("residual", [False, True])
def test_compiled_without_a_graph_break(fused: Counter[str], musa: str, residual: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    op = RMSNorm(8).requires_grad_(False)
    inputs = [(torch.randn(rows, 8), torch.randn(rows, 8))[: 1 + residual] for rows in (2, 3, 5)]
    expected = [op(*each) for each in inputs]
    op.to(musa)
    with fxpatch.install(musa), torch.no_grad():
        compiled = torch.compile(op, backend=backend, fullgraph=True, dynamic=True)
        seen = [compiled(*(t.to(musa) for t in each)) for each in inputs]
    for a, b in zip(seen, expected, strict=True):
        for left, right in zip(a if residual else (a,), b if residual else (b,), strict=True):
            torch.testing.assert_close(left.cpu(), right)
    assert fused == {FUSED: 3}
    assert len(graphs) == 1


BAD = {
    "size": lambda: RMSNorm(0),
    "eps": lambda: RMSNorm(4, -1e-6),
    "both orders": lambda: RMSNorm(4, cast_first=True, one_plus=True),
    "one plus nothing": lambda: RMSNorm(4, one_plus=True, elementwise_affine=False),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_make_no_sense(name: str) -> None:
    with pytest.raises(LayerError, match="There is no such RMSNorm") as error:
        BAD[name]()
    assert "Llama is cast_first=True, Gemma one_plus=True" in str(error.value)


@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_inputs_that_do_not_fit(device: str, fused: Counter[str]) -> None:
    op = RMSNorm(4).to(device).requires_grad_(False)
    for x in (torch.randn(2, 5), torch.randn(()), torch.ones(2, 4, dtype=torch.int64)):
        with pytest.raises(LayerError, match="RMSNorm does not fit its input") as error:
            op(x.to(device))
        assert str(error.value).splitlines()[1] == f"  seen: {x.dtype} of shape {list(x.shape)}"
        assert "a last dimension of 4" in str(error.value)
    x = torch.randn(2, 4, device=device)
    for residual in (x[:1], x.half()):
        with pytest.raises(LayerError, match="RMSNorm does not fit its residual") as error:
            op(x, residual)
        assert "like the input: torch.float32 of shape [2, 4]" in str(error.value)
    assert not fused


def test_on_npu(fresh: Callable[..., str]) -> None:
    """Another device needs another process: the three kernels, and what the residual one is not for."""
    out = fresh("""
        import torch, fxpatch
        from fake_kernels.declare import declare
        from fake_kernels.library import find
        from fxpatch.layers.norm import RMSNorm
        fxpatch.simulate("npu")
        records = [find(f"npu::npu_{name}") for name in ("rms_norm", "add_rms_norm", "gemma_rms_norm")]
        calls = []
        def counted(record):
            return lambda *a, **k: calls.append(record.op) or record.reference(*a, **k)
        declare([r.schema for r in records], {r.op: counted(r) for r in records})
        torch.manual_seed(0)
        def same(a, b, tolerance):
            for left, right in zip(a, b) if isinstance(a, tuple) else [(a, b)]:
                assert left.is_contiguous()
                torch.testing.assert_close(left.cpu(), right, rtol=tolerance, atol=tolerance)
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
            for options in ({}, {"cast_first": True}, {"one_plus": True}):
                op = RMSNorm(16, dtype=dtype, **options).requires_grad_(False)
                op.weight.copy_(torch.randn(16))
                x = torch.randn(3, 5, 16).to(dtype).transpose(0, 1)
                for inputs in ((x,), (x, torch.randn_like(x))):
                    expected = op(*inputs)
                    moved = [t.to("npu") for t in inputs]
                    seen = op.to("npu")(*moved)
                    op.to("cpu")
                    same(seen, expected, tolerance)
        print([name.partition("npu_")[2] for name in calls])
        mixed = RMSNorm(16).requires_grad_(False)
        x = torch.randn(2, 16).bfloat16()
        expected = mixed(x)
        mixed.to("npu")
        same(mixed(x.to("npu")), expected, 3e-2)
        print(mixed.choice(x.to("npu")).kernel, "|", mixed.choice(x.to("npu"), x.to("npu")).reason)
        print(RMSNorm(16, elementwise_affine=False).choice(x.to("npu")).reason)
        with fxpatch.install("npu"), torch.no_grad():
            op = RMSNorm(16, dtype=torch.bfloat16).to("npu")
            compiled = torch.compile(op, backend="eager", fullgraph=True)
            same(compiled(x.to("npu"), x.to("npu")), op.cpu()(x, x), 3e-2)
        print(calls[-1])
    """)
    assert out.splitlines() == [
        str(["rms_norm", "add_rms_norm", "rms_norm", "add_rms_norm", "gemma_rms_norm", "gemma_rms_norm"] * 2),
        "npu::npu_rms_norm | its kernel takes no weight of torch.float32 with torch.bfloat16",
        "its kernel needs a weight",
        "npu::npu_add_rms_norm",
    ]


def test_state_dict_is_transformers() -> None:
    assert list(RMSNorm(4).state_dict()) == list(LlamaRMSNorm(4).state_dict())
    assert isinstance(RMSNorm(4), nn.Module)
    assert torch.equal(RMSNorm(4, one_plus=True).weight, torch.zeros(4)), "as Gemma's starts"


def test_a_tangent_is_not_lost() -> None:
    """In forward mode the vendor's kernel is left out, with gradients off and parameters frozen too."""
    norm, x = RMSNorm(8).requires_grad_(False), torch.randn(3, 8)
    expected = torch.func.jvp(norm, (x,), (torch.ones_like(x),))[1]
    found = torch.func.jvp(norm.to("musa"), (x.to("musa"),), (torch.ones_like(x).to("musa"),))[1]
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found.cpu(), expected)
