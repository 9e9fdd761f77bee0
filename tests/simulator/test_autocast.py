"""Autocast: the lists are torch's, results have CUDA's dtypes and the values of the operators on inputs that were cast
by hand, the cache and gradients behave as C++ has them, and compiled code agrees with eager.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.autocast_test_lists import AutocastTestLists
from torch.utils import _pytree as pytree

from fxpatch.simulator import autocast_lists

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


def of_header(macro: str) -> set[str]:
    """The operators of one list in torch's own header, as `name.overload`."""
    lists = re.search(rf"#define {macro}\(_\)(.*?)\n\n", HEADER.read_text(), re.DOTALL)
    assert lists is not None
    entries = re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", lists[1])
    return {f"{name}.{overload}" if overload else name for name, overload in entries}


@pytest.mark.parametrize("policy", ["lower_precision_fp", "fp32", "fp32_set_opt_dtype", "promote"])
def test_the_lists_are_those_of_torchs_header(policy: str) -> None:
    names = autocast_lists.names(policy)
    assert len(names) == len(set(names))
    assert set(names) == of_header(f"AT_FORALL_{policy.upper()}")


def test_the_exchanged_overloads_are_those_of_torchs_header() -> None:
    exchanged = HEADER.read_text().split("#define AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE")[1].split("\n\n")[0]
    assert set(re.findall(r'"([\w.]+)"', exchanged)) == set(autocast_lists.FP32_APPEND_DTYPE)


# -- result by result --------------------------------------------------------------------------------------------------

LISTS = AutocastTestLists(
    torch.device("cpu")
)  # torch's own test cases, for CUDA; on the CPU so that collecting is cheap
LOWER, FULL = torch.bfloat16, torch.float32
CASES: dict[str, tuple[Any, str, Any, Any, torch.dtype, torch.dtype]] = {}


def _add(name: str, dtype: torch.dtype, module: Any, cast_to: torch.dtype | None) -> None:
    """`cast_to`: what the inputs of the equal computation are cast to by hand; None: nothing is."""
    for entry in getattr(LISTS, name):
        operator, args = entry[0], entry[1]
        if operator.startswith("cudnn_") or isinstance(args, str):  # CUDA's own; and a case that is malformed in torch
            continue
        expected = entry[2] if len(entry) > 2 and isinstance(entry[2], torch.dtype) else dtype
        options = entry[2] if len(entry) > 2 and isinstance(entry[2], dict) else {}
        CASES[f"{name}-{operator}-{len(CASES)}"] = (module, operator, args, options, expected, cast_to)


_add("torch_fp16", LOWER, torch, LOWER)
_add("nn_fp16", LOWER, torch._C._nn, LOWER)
_add("linalg_fp16", LOWER, torch._C._linalg, LOWER)
_add("methods_fp16", LOWER, torch.Tensor, LOWER)
_add("torch_fp32", FULL, torch, FULL)
_add("nn_fp32", FULL, torch._C._nn, FULL)
_add("methods_fp32", FULL, torch.Tensor, FULL)
_add("torch_need_autocast_promote", FULL, torch, FULL)
_add("torch_expect_builtin_promote", FULL, torch, None)


def converted(args: Any, device: str, of: torch.dtype, to: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, to if t.dtype is of else t.dtype), args)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:Using torch.cross without")
@pytest.mark.parametrize("case", CASES)
def test_dtypes_are_cudas_and_values_those_of_inputs_cast_by_hand(musa: str, case: str) -> None:
    module, operator, args, options, expected, cast_to = CASES[case]
    function = getattr(module, operator, None) or getattr(torch.Tensor, operator)
    args = converted(args, musa, torch.float16, LOWER)
    with torch.autocast(musa, dtype=LOWER):
        result = function(*args, **options)
    by_hand = args
    if cast_to is not None:
        for dtype in (LOWER, FULL):
            by_hand = converted(by_hand, musa, dtype, cast_to)
    reference = function(*by_hand, **options)
    for got, want in zip(pytree.tree_leaves(result), pytree.tree_leaves(reference), strict=True):
        if isinstance(got, torch.Tensor):
            assert got.dtype is expected
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        else:
            assert got == want


def test_half_precision_and_inputs_that_are_left_alone(musa: str) -> None:
    a, b = torch.randn(3, 3, device=musa), torch.randn(3, 3, device=musa)
    with torch.autocast(musa):  # float16, torch's default for such a device
        assert torch.get_autocast_dtype(musa) is torch.float16
        assert (a @ b).dtype is torch.float16
        assert (a.double() @ b.double()).dtype is torch.float64
        assert (torch.arange(4, device=musa).view(2, 2) @ torch.eye(2, dtype=torch.int64, device=musa)).sum() == 6
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32  # the CPU's autocast is another
        assert a.half().sum(dtype=torch.float16).dtype is torch.float16  # the caller's word counts
        assert a.half().norm(dim=0).dtype is torch.float32
        assert a.double().norm().dtype is torch.float64
    assert (a @ b).dtype is torch.float32


def test_what_cannot_be_computed_in_half_precision_is_banned(musa: str) -> None:
    p = torch.rand(3, device=musa)
    with torch.autocast(musa), pytest.raises(RuntimeError, match="are unsafe to autocast"):
        F.binary_cross_entropy(p, p)
    with torch.autocast(musa, enabled=False):
        F.binary_cross_entropy(p, p)


def test_function_modes_see_what_was_called_and_not_what_autocast_did(musa: str) -> None:
    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    x = torch.ones(2, 2, device=musa)
    with torch.autocast(musa), Watch():
        torch.mm(x, x)
    assert seen == ["mm"]


# -- the cache of weights: the CPU's is in C++, and is the model -------------------------------------------------------


def observed(device: str) -> list[Any]:
    """What a program can see of the cache."""
    seen: list[Any] = []
    layer, x = torch.nn.Linear(4, 4, device=device), torch.ones(2, 4, device=device)

    def region(**options: Any) -> torch.autocast:
        return torch.autocast(device, **{"dtype": torch.bfloat16, **options})

    with region():
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        seen.append(("a cast made without gradients has one", layer.weight.grad is not None))
    with region():
        with torch.inference_mode():
            layer(x)
        seen.append(("nor is it an inference tensor", layer(x).requires_grad))
    with region():
        first = layer(x)
        with torch.no_grad():
            layer.weight.fill_(0)
        seen.append(("cached", torch.equal(layer(x), first)))
        with region(dtype=torch.float16):
            try:
                seen.append(layer(x).dtype)
            except RuntimeError as error:
                seen.append(("by weight only", str(error)))
        with region(enabled=False):
            seen.append(("nothing is cast", layer(x).dtype))
        with region(cache_enabled=False):
            seen.append(("not asked", torch.equal(layer(x), first)))
        seen.append(("still there after inner regions", torch.equal(layer(x), first)))
    with region():
        seen.append(("forgotten after the outermost", torch.equal(layer(x), first)))
    weight = torch.nn.Parameter(torch.ones(4, 4, device=device))
    with region():
        y = x @ weight + x @ weight
    casts, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            casts |= {node} if "ToCopy" in node.name() else set()
            queue.extend(next_node for next_node, _ in node.next_functions)
    y.sum().backward()
    assert weight.grad is not None
    seen.append(("one cast for both uses", len(casts), weight.grad.dtype, weight.grad.sum().item()))
    return seen


def test_the_cache_is_as_in_cpp(musa: str) -> None:
    assert observed(musa) == observed("cpu")


def test_the_cache_keeps_no_weight_alive_beyond_the_region(musa: str) -> None:
    with torch.autocast(musa):
        weight = torch.nn.Parameter(torch.ones(4, 4, device=musa))
        torch.mm(weight, weight)
        alive = weakref.ref(weight)
        del weight
    assert alive() is None


# -- the rest of torch.amp ---------------------------------------------------------------------------------------------


def trained(device: str) -> tuple[list[float], list[torch.Tensor]]:
    """Scales of each step, and the parameters after: one step of five has an infinite loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(device)
    batches = torch.randn(5, 5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024, growth_interval=2)
    scales = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(batch.to(device)).abs().mean() * (float("inf") if step == 2 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, [p.detach().cpu() for p in model.parameters()]


def test_the_gradient_scaler_equals_the_cpus(musa: str) -> None:
    (scales, parameters), (cpu_scales, cpu_parameters) = trained(musa), trained("cpu")
    assert scales == cpu_scales == [1024, 2048, 1024, 1024, 2048]
    torch.testing.assert_close(parameters, cpu_parameters)


def test_custom_functions(musa: str) -> None:
    seen: list[Any] = []

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="musa", cast_inputs=torch.float32)
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            seen.append((a.dtype, torch.is_autocast_enabled("musa")))
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        @torch.amp.custom_bwd(device_type="musa")
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            a, b = ctx.saved_tensors
            seen.append((grad.dtype, torch.is_autocast_enabled("musa")))
            return grad @ b.t(), a.t() @ grad

    a = torch.randn(3, 3, device=musa, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast(musa, dtype=torch.bfloat16):
        Product.apply(a, a).sum().backward()
    assert seen == [(torch.float32, False), (torch.float32, False)]
    assert a.grad is not None
    assert a.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(musa: str, kind: Callable[..., torch.nn.Module]) -> None:
    layer, x = kind(4, 5, 2, batch_first=True, bidirectional=True).to(musa), torch.randn(2, 3, 4, device=musa)
    with torch.autocast(musa, dtype=torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.05, atol=0.05)


# -- compiled ----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A bit of each policy, a nested region that casts nothing, and weights used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
        self.conv = torch.nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("musa", dtype=torch.bfloat16):
            lower = self.linear(x)
            full = torch.softmax(lower, -1)
            conv = self.conv(self.norm(self.linear(lower)))
            with torch.autocast("musa", enabled=False):
                exact = self.linear(x)
            attended = F.scaled_dot_product_attention(conv, conv, conv)
            reduced = conv.sum() + lower.norm()
        return lower, full, conv, exact, attended, reduced


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_has_eagers_dtypes(musa: str, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = Block().to(musa), torch.randn(3, 2, 8, device=musa)

    def results(run: Callable[..., tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        outs = run(x)
        return [*outs, *torch.autograd.grad(sum(out.float().pow(2).sum() for out in outs), list(block.parameters()))]

    want, got = results(block), results(torch.compile(block, backend=backend, fullgraph=True))
    assert [t.dtype for t in want[:6]] == [LOWER, FULL, LOWER, FULL, LOWER, FULL]
    assert [t.dtype for t in got] == [t.dtype for t in want]
    # a weight is cast at each use, so its gradients are summed in float32; and Inductor keeps values in float32 too
    exact = {"rtol": 0, "atol": 0} if backend != "inductor" else {"rtol": 0.05, "atol": 0.05}
    for one, other in zip(got[:6], want[:6], strict=True):
        torch.testing.assert_close(one, other, **exact)
    for one, other in zip(got[6:], want[6:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.02 * other.abs().max().item())


def test_a_region_around_compiled_code_is_seen_each_time(musa: str) -> None:
    torch._dynamo.reset()
    layer = torch.compile(torch.nn.Linear(4, 4).to(musa), backend="aot_eager", fullgraph=True)
    x = torch.ones(2, 4, device=musa)
    dtypes = []
    for enabled in (True, False, True):
        with torch.autocast(musa, dtype=torch.bfloat16, enabled=enabled):
            dtypes.append(layer(x).dtype)
    assert dtypes == [LOWER, FULL, LOWER]


def test_exported_code_keeps_its_region(musa: str) -> None:
    torch._dynamo.reset()
    block, x = Block().to(musa), torch.randn(3, 2, 8, device=musa)
    exported = torch.export.export(block, (x,)).module()
    for one, other in zip(exported(x), block(x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
