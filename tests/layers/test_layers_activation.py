"""Gated activations: natively what plain torch computes, on a device the vendor's kernel, and a reason for either."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from vendor_kernels import declared

import fxpatch
from fake_kernels.declare import declare
from fake_kernels.library import find
from fxpatch.errors import FxPatchError, LayerError
from fxpatch.layers import platform_op
from fxpatch.layers.activation import GeluAndMul, SiluAndMul
from fxpatch.layers.platform_op import Choice, PlatformOp, look_again, musa_version
from fxpatch.native import find_operators

FUSED = "aten::_fused_swiglu_forward"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the kernel rounds once, native twice


@pytest.fixture(autouse=True)
def _look_again() -> Iterator[None]:
    look_again()
    yield
    look_again()


@pytest.fixture
def swiglu(musa: str) -> Iterator[Counter[str]]:
    """torch_musa's operator on the simulated device; its calls are counted."""
    with declared(FUSED) as calls:
        yield calls


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_native_is_plain_torch(shape: list[int], d: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(*shape, 2 * d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    torch.testing.assert_close(SiluAndMul()(x), silu_and_mul(x), rtol=0, atol=0)
    for mode in ("none", "tanh"):
        torch.testing.assert_close(GeluAndMul(mode)(x), F.gelu(x[..., :d], approximate=mode) * x[..., d:])
        other = GeluAndMul(mode, activate_left=False)(x)
        torch.testing.assert_close(other, x[..., :d] * F.gelu(x[..., d:], approximate=mode))


def test_the_modes_of_gelu_differ() -> None:
    x = torch.linspace(-4, 4, 64).reshape(2, 32)
    made = [GeluAndMul(mode, activate_left=left)(x) for mode in ("none", "tanh") for left in (True, False)]
    assert not any(torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_musa_the_vendors_kernel_runs(swiglu: Counter[str], musa: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 16).to(dtype)
    y = SiluAndMul()(x.to(musa))
    assert swiglu == {FUSED: 1}
    assert y.is_contiguous()
    torch.testing.assert_close(y.cpu(), silu_and_mul(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_why_is_said(swiglu: Counter[str], musa: str) -> None:
    op = SiluAndMul()
    x = torch.randn(2, 8, device=musa)
    assert op.choice(x) == Choice("musa", "forward_musa", FUSED, f"musa has {FUSED}")
    assert op.choice(x.cpu()) == Choice("cpu", "forward_native", "", "there is no kernel for cpu")
    assert op.choice(x.double()).reason == "its kernel does not take torch.float64"
    assert GeluAndMul().choice(x).reason == "there is no kernel for musa"
    assert str(op.choice(x)) == f"forward_musa on musa: musa has {FUSED}"


def test_without_the_kernel_it_is_native_and_the_reason_can_be_asked_for(musa: str) -> None:
    op, x = SiluAndMul(), torch.randn(2, 8)
    torch.testing.assert_close(op(x.to(musa)).cpu(), silu_and_mul(x))
    assert op.choice(x.to(musa)).reason == (
        f"{FUSED} is not registered; aten::swish_glu is not registered; there is no nn.SwishGLU"
    )
    with pytest.raises(LayerError) as error:
        op.forward_musa(x.to(musa))
    assert str(error.value).startswith("SiluAndMul.forward_musa has no kernel to run.\n  seen: aten::_fused_swiglu")
    assert "look_again()" in error.value.hint


def test_what_the_kernel_does_not_take_is_native(swiglu: Counter[str], musa: str) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(SiluAndMul()(x.to(musa)).cpu(), silu_and_mul(x))
    assert not swiglu


def test_no_gradient_is_lost(swiglu: Counter[str], musa: str) -> None:
    """The operator declared has no autograd formula: torch would compute the forward and leave the gradient out."""
    x = torch.randn(2, 8)
    mine, reference = x.to(musa).requires_grad_(), x.clone().requires_grad_()
    op = SiluAndMul()
    assert op.choice(mine).reason.startswith(f"{FUSED} has no gradient")
    op(mine).sum().backward()
    silu_and_mul(reference).sum().backward()
    torch.testing.assert_close(mine.grad.cpu(), reference.grad)
    assert not swiglu
    with torch.no_grad():
        op(mine)
    assert swiglu == {FUSED: 1}


def test_an_operator_with_a_gradient_is_used_for_training(musa: str) -> None:
    forward, backward = find(FUSED), find("aten::_fused_swiglu_backward")
    assert backward is not None
    calls: Counter[str] = Counter()

    def gradient(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        calls["backward"] += 1
        return backward.reference(grad, input)

    kernels = {forward.op: forward.reference, backward.op: gradient}
    with declare([forward.schema, backward.schema], kernels), torch.library._scoped_library("aten", "FRAGMENT") as lib:
        torch.library.register_autograd(
            FUSED,
            lambda ctx, grad: torch.ops.aten._fused_swiglu_backward(grad, *ctx.saved_tensors),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
            lib=lib,
        )
        look_again()
        x = torch.randn(2, 8)
        mine, reference = x.to(musa).requires_grad_(), x.clone().requires_grad_()
        assert SiluAndMul().choice(mine).forward == "forward_musa"
        SiluAndMul()(mine).sum().backward()
    silu_and_mul(reference).sum().backward()
    torch.testing.assert_close(mine.grad.cpu(), reference.grad)
    assert calls == {"backward": 1}


def test_the_vendors_module_where_only_it_is_there(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class SwishGLU(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x.device.type)
            return silu_and_mul(x)

    before = SiluAndMul()
    monkeypatch.setattr(nn, "SwishGLU", SwishGLU, raising=False)
    op, x = SiluAndMul(), torch.randn(2, 8)
    torch.testing.assert_close(op(x.to(musa)).cpu(), silu_and_mul(x))
    assert calls == ["musa"]
    assert [name for name, _ in op.named_modules()] == [""]
    torch.testing.assert_close(before(x.to(musa)).cpu(), silu_and_mul(x))
    assert before.choice(x.to(musa)).reason == "it was made before nn.SwishGLU was there"
    assert calls == ["musa"]


def test_it_is_chosen_once_per_device(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = platform_op._missing
    monkeypatch.setattr(platform_op, "_missing", lambda *a: asked.append(a[1]) or original(*a))
    ops = [SiluAndMul() for _ in range(3)]
    for _ in range(4):
        for op in ops:
            op(torch.randn(2, 4, device=musa))
            op(torch.randn(2, 4))
    assert asked == ["musa"] * 3, "the three kernels that there could be, once, and none on a device without"


def test_a_kernel_that_came_later_is_found_when_asked_to_look(musa: str) -> None:
    op, x = SiluAndMul(), torch.randn(2, 4, device=musa)
    assert op.choice(x).forward == "forward_native"
    record = find(FUSED)
    with declare([record.schema], {FUSED: record.reference}):
        assert op.choice(x).forward == "forward_native"
        look_again()
        assert op.choice(x).forward == "forward_musa"


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_without_a_graph_break(musa: str, fused: bool, swiglu: Counter[str]) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    op = SiluAndMul() if fused else GeluAndMul("tanh")
    compiled = torch.compile(op, backend=backend, fullgraph=True, dynamic=True)
    with fxpatch.install(musa), torch.no_grad():
        for rows in (2, 3, 5):
            x = torch.randn(rows, 8)
            expected = silu_and_mul(x) if fused else F.gelu(x[..., :4], approximate="tanh") * x[..., 4:]
            torch.testing.assert_close(compiled(x.to(musa)).cpu(), expected)
    assert len(graphs) == 1
    assert (FUSED.partition("::")[2] in graphs[0].code) == fused
    assert swiglu[FUSED] == (3 if fused else 0)


OPERATORS = [(SiluAndMul, "SiluAndMul"), (GeluAndMul, "GeluAndMul")]


@pytest.mark.parametrize(("make", "name"), OPERATORS)
@pytest.mark.parametrize("shape", [(3, 5), (1,), ()])
def test_an_odd_last_dimension(make: Any, name: str, shape: tuple[int, ...], swiglu: Counter[str], musa: str) -> None:
    for device in ("cpu", musa):
        with pytest.raises(LayerError) as error:
            make()(torch.randn(shape, device=device))
        assert str(error.value) == (
            f"{name} needs two halves of the last dimension.\n  seen: shape {list(shape)}\n"
            "  expected: an even last dimension: what is activated, then what it is multiplied with\n"
            "  to do: concatenate gate and up along the last dimension before the call"
        )
    assert not swiglu, "the reference would refuse it, too; a vendor's kernel may not"


@pytest.mark.parametrize("mode", ["sigmoid", "", "TANH", None])
def test_another_approximation(mode: Any) -> None:
    with pytest.raises(ValueError, match="GeluAndMul does not know this approximation") as error:
        GeluAndMul(mode)
    assert isinstance(error.value, FxPatchError)
    assert "'none' or 'tanh'" in str(error.value)


def test_promotion_finds_it_where_there_is_a_forward() -> None:
    model = nn.Sequential(SiluAndMul(), GeluAndMul())
    assert [op.name for op in find_operators(model, "musa")] == ["0"]
    assert [op.optimized_name for op in find_operators(model, "npu")] == ["forward_npu", "forward_npu"]
    assert find_operators(model, "cuda") == []


def test_a_device_without_a_forward_of_its_own_is_native() -> None:
    op, x = SiluAndMul(), torch.randn(2, 6)
    for device in ("cpu", "cuda", "xpu"):
        torch.testing.assert_close(getattr(op, f"forward_{device}")(x), silu_and_mul(x))
    with pytest.raises(AttributeError):
        op.forward_toaster  # noqa: B018


def test_copies_and_pickles() -> None:
    x = torch.randn(2, 6)
    for op in (SiluAndMul(), GeluAndMul("tanh", activate_left=False)):
        file = io.BytesIO()
        torch.save(op, file)
        file.seek(0)
        for other in (copy.deepcopy(op), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), op(x))
        assert op.state_dict() == {}


def test_a_subclass_that_says_nothing_is_native() -> None:
    class Doubled(PlatformOp):
        def forward_native(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x * 2

    assert Doubled()(torch.ones(1)).item() == 2
    with pytest.raises(NotImplementedError, match="PlatformOp has no forward_native"):
        PlatformOp()(torch.ones(1))


def test_the_musa_version_is_read_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    assert musa_version() is None
    monkeypatch.setattr(torch.version, "musa", "4.2", raising=False)
    assert musa_version() == "4.2"


def test_on_npu(fresh: Callable[..., str]) -> None:
    """Another device needs another process: npu_swiglu and npu_geglu in both modes and both ways round."""
    out = fresh("""
        import torch, fxpatch
        from torch.nn import functional as F
        from fake_kernels.declare import declare
        from fake_kernels.library import find
        from fxpatch.layers.activation import GeluAndMul, SiluAndMul
        fxpatch.simulate("npu")
        records = [find(f"npu::npu_{name}") for name in ("swiglu", "geglu")]
        calls = []
        def counted(record):
            return lambda *a, **k: calls.append(record.op) or record.reference(*a, **k)
        declare([r.schema for r in records], {r.op: counted(r) for r in records})
        x = torch.randn(3, 4, 16)
        a, b = x.chunk(2, -1)
        torch.testing.assert_close(SiluAndMul()(x.to("npu")).cpu(), F.silu(a) * b)
        for mode in ("none", "tanh"):
            for left in (True, False):
                expected = F.gelu(a, approximate=mode) * b if left else a * F.gelu(b, approximate=mode)
                op = GeluAndMul(mode, activate_left=left)
                y = op(x.to("npu"))
                assert type(y) is torch.Tensor and y.is_contiguous()
                torch.testing.assert_close(y.cpu(), expected, rtol=1e-6, atol=1e-6)
                assert op.choice(x.to("npu")).kernel == "npu::npu_geglu"
        print(len(calls), sorted(set(calls)))
        with fxpatch.install("npu"), torch.no_grad():
            compiled = torch.compile(GeluAndMul("tanh"), backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x.to("npu")).cpu(), F.gelu(a, approximate="tanh") * b)
        print(len(calls))
    """)
    assert out.splitlines() == ["5 ['npu::npu_geglu', 'npu::npu_swiglu']", "6"]
