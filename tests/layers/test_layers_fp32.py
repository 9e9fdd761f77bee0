"""FP32LayerNorm: converted parameters are kept, and never one moment too long. Its reference is diffusers' own class,
which keeps nothing; what is kept is seen from what reaches `layer_norm`."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm as Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxpatch
from fxpatch.layers import norm as norm_module
from fxpatch.layers.fp32_parameters import forget_fp32_parameters
from fxpatch.layers.norm import FP32LayerNorm

SIZE = 8


def make(dtype: torch.dtype = torch.bfloat16, **options: Any) -> FP32LayerNorm:
    layer = FP32LayerNorm(SIZE, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(SIZE))
    return layer


def expected(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """What diffusers computes with the parameters as they are now."""
    reference = Reference(layer.normalized_shape, layer.eps, layer.elementwise_affine, layer.bias is not None)
    reference.weight, reference.bias = layer.weight, layer.bias
    with torch.no_grad():
        return reference(x)


class Seen:
    """The weights that reached `layer_norm`: the tensors themselves, so that no address comes twice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: list[Any] = []
        self.biases: list[Any] = []

        class Functional:
            def layer_norm(_, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> torch.Tensor:
                self.weights.append(weight)
                self.biases.append(bias)
                return F.layer_norm(x, shape, weight, bias, eps)

        monkeypatch.setattr(norm_module, "F", Functional())

    def kept(self) -> bool:
        """Whether the last two calls had the same converted tensors."""
        return self.weights[-1] is self.weights[-2] and self.biases[-1] is self.biases[-2]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, SIZE).bfloat16()


@pytest.fixture(autouse=True)
def _same_numbers_and_no_graphs() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=20)
@given(dtype=st.sampled_from(DTYPES), inputs=st.sampled_from(DTYPES), affine=st.booleans(), bias=st.booleans())
def test_it_is_diffusers(dtype: torch.dtype, inputs: torch.dtype, affine: bool, bias: bool) -> None:
    layer = make(dtype, elementwise_affine=affine, bias=bias)
    x = torch.randn(2, 3, SIZE).to(inputs)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            for _ in range(2):
                assert torch.equal(layer(x), expected(layer, x))
    assert layer(x).dtype == inputs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_same_object_in_the_second_call(mode: Any, seen: Seen, x: torch.Tensor) -> None:
    layer = make()
    with mode():
        for _ in range(3):
            assert torch.equal(layer(x), expected(layer, x))
            seen.weights, seen.biases = seen.weights[-2:], seen.biases[-2:]
    assert seen.kept()
    assert seen.weights[-1].dtype == torch.float32
    assert not seen.weights[-1].requires_grad


def test_float32_parameters_are_used_as_they_are(seen: Seen) -> None:
    layer = make(torch.float32)
    with torch.no_grad():
        layer(torch.randn(2, SIZE))
    assert seen.weights == [layer.weight]
    assert seen.weights[0] is layer.weight
    assert len(layer.fp32_parameters) == 0


def in_place(layer: FP32LayerNorm) -> None:
    layer.weight.add_(1)


def in_place_of_a_view(layer: FP32LayerNorm) -> None:
    layer.weight[2:3].zero_()


def in_place_of_detached(layer: FP32LayerNorm) -> None:
    layer.weight.detach().mul_(3)


def reassigned(layer: FP32LayerNorm) -> None:
    layer.weight = nn.Parameter(torch.randn(SIZE).bfloat16())


def reassigned_over_the_same_memory(layer: FP32LayerNorm) -> None:
    """Same address, dtype and count of writes; it is not the same parameter, and it was written in between."""
    layer.weight = nn.Parameter(torch.randn(SIZE).bfloat16())
    layer(torch.randn(1, SIZE).bfloat16())
    memory = layer.weight.data
    layer.weight = None
    memory.add_(1)
    layer.weight = nn.Parameter(memory.data)


def data_replaced(layer: FP32LayerNorm) -> None:
    layer.weight.data = torch.randn(SIZE).bfloat16()


def data_replaced_twice(layer: FP32LayerNorm) -> None:
    """The second memory may be where the first was: the count of writes stays what it was."""
    address = layer.weight.data_ptr()
    for _ in range(100):
        layer.weight.data = torch.randn(SIZE).bfloat16()
        if layer.weight.data_ptr() == address:
            return


def data_with_other_strides(layer: FP32LayerNorm) -> None:
    memory = torch.randn(2 * SIZE).bfloat16()
    layer.weight.data = memory[:SIZE]
    layer(torch.randn(1, SIZE).bfloat16())
    layer.weight.data = memory[::2]


def dtype_changed(layer: FP32LayerNorm) -> None:
    layer.half()
    layer.weight.mul_(1.5)


def dtype_changed_through_data(layer: FP32LayerNorm) -> None:
    layer.weight.data = layer.weight.data.half() * 2


def state_loaded(layer: FP32LayerNorm) -> None:
    layer.load_state_dict({"weight": torch.randn(SIZE).bfloat16(), "bias": torch.randn(SIZE).bfloat16()})


def state_assigned(layer: FP32LayerNorm) -> None:
    layer.load_state_dict({"weight": torch.randn(SIZE).half(), "bias": torch.randn(SIZE).half()}, assign=True)


def emptied_and_filled(layer: FP32LayerNorm) -> None:
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(SIZE))


def swapped(layer: FP32LayerNorm) -> None:
    layer._apply(lambda t: t)  # as every Module.to; it lets go of what is kept
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(SIZE).bfloat16()))


def resized(layer: FP32LayerNorm) -> None:
    storage = layer.weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    layer.weight.copy_(torch.randn(SIZE))


def bias_removed(layer: FP32LayerNorm) -> None:
    layer.bias = None


CHANGES = [
    in_place, in_place_of_a_view, in_place_of_detached, reassigned, reassigned_over_the_same_memory, data_replaced,
    data_replaced_twice, data_with_other_strides, dtype_changed, dtype_changed_through_data, state_loaded,
    state_assigned, emptied_and_filled, swapped, resized, bias_removed,
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_a_parameter_is_seen(change: Callable[[FP32LayerNorm], None], mode: Any, x: torch.Tensor) -> None:
    layer = make()
    with mode():
        before = layer(x)
        change(layer)
        after = layer(x)
        assert torch.equal(after, expected(layer, x))
        if change is not dtype_changed:
            assert not torch.equal(after, before), "the change shows, so the comparison means something"


@settings(max_examples=40)
@given(changes=st.lists(st.sampled_from([None, *(c for c in CHANGES if c is not bias_removed)]), max_size=6))
def test_any_history(changes: list[Callable[[FP32LayerNorm], None] | None]) -> None:
    layer, x = make(), torch.randn(2, SIZE).bfloat16()
    for change in changes:
        with torch.no_grad():
            if change is not None:
                change(layer)
            assert torch.equal(layer(x), expected(layer, x))
        assert set(layer.state_dict()) == {"weight", "bias"}


def test_inference_mode_counts_writes_to_ordinary_parameters(seen: Seen, x: torch.Tensor) -> None:
    layer = make()
    with torch.inference_mode():
        layer(x)
        layer(x)
        assert seen.kept()
        layer.weight.mul_(2)
        assert torch.equal(layer(x), expected(layer, x))


def test_an_inference_parameter_has_no_count_so_nothing_is_kept(seen: Seen, x: torch.Tensor) -> None:
    with torch.inference_mode():
        layer = make()
        with pytest.raises(RuntimeError, match="do not track version counter"):
            layer.weight._version  # noqa: B018
        for _ in range(3):
            layer.weight.add_(1)
            assert torch.equal(layer(x), expected(layer, x))
        assert len(layer.fp32_parameters) == 0
        assert seen.weights[-1] is not seen.weights[-3]
    with torch.no_grad():
        assert torch.equal(layer(x), expected(layer, x))


def test_what_inference_mode_kept_serves_no_grad_and_leaves_autograd_alone(x: torch.Tensor) -> None:
    layer = make()
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected(layer, x))
    inputs = x.clone().requires_grad_()
    layer(inputs).float().sum().backward()
    assert layer.weight.grad is not None


def test_with_grad_nothing_is_kept_and_gradients_are_diffusers(x: torch.Tensor) -> None:
    layer = make()
    reference = Reference(SIZE).bfloat16()
    reference.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer(x)  # something is there that must not be used
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, inputs in ((layer, a), (reference, b)):
        module(inputs).float().square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(layer.weight.grad, reference.weight.grad)
    assert torch.equal(layer.bias.grad, reference.bias.grad)
    fresh = make()
    fresh(x)
    assert len(fresh.fp32_parameters) == 0


def test_forward_mode_gradients(x: torch.Tensor) -> None:
    """They exist under no_grad, too; a detached conversion would drop them."""
    layer = make()
    with torch.no_grad(), forward_ad.dual_level():
        layer(x)
        tangent = torch.randn(SIZE).bfloat16()
        dual = forward_ad.make_dual(layer.weight.detach(), tangent)
        y = torch.func.functional_call(layer, {"weight": dual}, (x,))
        got = forward_ad.unpack_dual(y).tangent
    normal = F.layer_norm(x.float(), (SIZE,))
    torch.testing.assert_close(got, (normal * tangent.float()).bfloat16())


def test_transforms_of_torch_func(x: torch.Tensor) -> None:
    layer = make()
    weights = torch.randn(4, SIZE).bfloat16()
    call = torch.func.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)))
    with torch.no_grad():
        stacked = call(weights)
        for weight, got in zip(weights, stacked, strict=True):
            assert torch.equal(got, torch.func.functional_call(layer, {"weight": weight}, (x,)))
        assert torch.equal(layer(x), expected(layer, x))


def test_in_no_state_dict_and_in_no_copy(x: torch.Tensor) -> None:
    layer = make()
    with torch.no_grad():
        layer(x)
    assert len(layer.fp32_parameters) == 2
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not list(layer.buffers())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    empty = make()
    assert abs(len(pickle.dumps(layer)) - len(pickle.dumps(empty))) < 64, "no converted parameter is pickled"
    for other in (*copies, copy.copy(layer)):
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))
            other.weight.add_(1)
            assert torch.equal(other(x), expected(other, x))
            assert torch.equal(layer(x), expected(layer, x))
    assert all(
        len(other.fp32_parameters) == 2 and other.fp32_parameters is not layer.fp32_parameters for other in copies
    )


def test_a_dead_parameter_is_not_kept_alive(x: torch.Tensor) -> None:
    import weakref

    layer = make()
    with torch.no_grad():
        layer(x)
    parameter, storage = weakref.ref(layer.weight), weakref.ref(layer.weight.untyped_storage())
    layer.weight = nn.Parameter(torch.ones(SIZE).bfloat16())
    gc.collect()
    assert parameter() is None
    assert storage() is None


def test_the_future_way_of_moving_modules(x: torch.Tensor) -> None:
    """`swap_tensors` refuses a parameter to which there are weak references; `to` lets go of them."""
    layer = make()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            layer(x)
            layer.half()
            assert torch.equal(layer(x), expected(layer, x))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_writes_through_data_are_not_counted_and_forget_is_for_them(x: torch.Tensor) -> None:
    """The limit, as it is: the day torch counts such writes, this fails and the docstring can be shortened."""
    layer = make()
    model = nn.Sequential(layer, nn.Linear(SIZE, SIZE))
    with torch.no_grad():
        stale = layer(x)
        counted = layer.weight._version
        layer.weight.data.add_(1)
        assert layer.weight._version == counted
        assert torch.equal(layer(x), stale)
        layer.forget()
        assert torch.equal(layer(x), expected(layer, x))
        layer.weight.data.add_(1)
        assert forget_fp32_parameters(model) == 1
        assert forget_fp32_parameters(model) == 0
        assert torch.equal(layer(x), expected(layer, x))


@pytest.mark.parametrize("between", ["a call with grad", "train", "eval"])
def test_training_between_two_evaluations_is_seen(between: str, x: torch.Tensor) -> None:
    """FSDP2 gathers the updated weights under the same counter of writes."""
    layer = make()
    with torch.no_grad():
        layer(x)
    if between == "a call with grad":
        layer(x)
    else:
        getattr(layer, between)()
    with torch.no_grad():
        with torch.autograd._unsafe_preserve_version_counter(layer.weight):
            layer.weight.add_(1)
        assert torch.equal(layer(x), expected(layer, x))


def test_compiled_without_break_guard_or_constant(x: torch.Tensor) -> None:
    graphs: list[torch.fx.GraphModule] = []
    guards: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        guards.extend(str(guard) for guard in torch._guards.TracingContext.get().guards_context.dynamo_guards)
        return gm.forward

    layer = make()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        layer(x)
        assert torch.equal(compiled(x), expected(layer, x))
        for change in (in_place, data_replaced, reassigned, state_loaded):
            change(layer)
            assert torch.equal(compiled(x), expected(layer, x)), change.__name__
            layer(x)
            assert torch.equal(compiled(x), expected(layer, x)), change.__name__
        layer.weight.data.add_(1)
        assert torch.equal(compiled(x), expected(layer, x)), "compiled, even that is seen"
    assert len(graphs) == 1
    assert not [name for name, _ in graphs[0].named_buffers()], "no tensor was baked in"
    assert not [guard for guard in guards if "data_ptr" in guard.lower() or "converted" in guard or "_entry" in guard]


def test_traced_and_faked(x: torch.Tensor) -> None:
    """Neither a proxy nor a fake tensor is kept, and no kept tensor becomes a constant of somebody's graph."""
    layer = make()
    with torch.no_grad():
        layer(x)
        graph = make_fx(lambda weight, x: torch.func.functional_call(layer, {"weight": weight}, (x,)))(layer.weight, x)
        direct = make_fx(layer)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(layer, (x,))
        layer.weight.add_(1)
        for function in (lambda x: graph(layer.weight, x), direct, traced):
            assert torch.equal(function(x), expected(layer, x))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(mode.from_tensor(x))
        assert torch.equal(layer(x), expected(layer, x))
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(x), expected(layer, x))


def test_many_threads(x: torch.Tensor) -> None:
    """One writes, the others read: what they see is a weight that was there, and afterwards the last one."""
    layer = make()
    weights = [torch.full((SIZE,), float(n)).bfloat16() for n in range(8)]
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(weights[0])
    wrong: list[object] = []
    done = threading.Event()
    normal = F.layer_norm(x.float(), (SIZE,))
    allowed = [(normal * n).bfloat16() for n in range(8)]

    def read() -> None:
        with torch.no_grad():
            while not done.is_set():
                y = layer(x)
                if not any(torch.allclose(y, each, rtol=2e-2, atol=2e-2) for each in allowed):
                    wrong.append(y)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for turn in range(300):
            layer.weight = nn.Parameter(weights[turn % 8].clone())
            mine = layer(x)
            if not torch.equal(mine, expected(layer, x)):
                wrong.append(mine)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.no_grad():
        assert torch.equal(layer(x), expected(layer, x))


def test_device_changes(musa: str, x: torch.Tensor, seen: Seen) -> None:
    layer = make()
    with torch.no_grad():
        y = layer(x)
        layer.to(musa)
        for _ in range(2):
            assert torch.equal(layer(x.to(musa)).cpu(), y)
        assert seen.kept()
        assert seen.weights[-1].device.type == musa
        layer.to("cpu")
        assert torch.equal(layer(x), y)
        layer.weight.add_(1)
        assert torch.equal(layer(x.to(musa)).cpu(), expected(layer, x)), "parameters follow the input"
        assert torch.equal(layer(x), expected(layer, x))


def test_another_stream_has_not_waited(musa: str, x: torch.Tensor, seen: Seen) -> None:
    layer, there = make().to(musa), x.to(musa)
    with torch.no_grad():
        layer(there)
        with torch.musa.stream(torch.musa.Stream()):
            layer(there)
            assert not seen.kept()
            layer(there)
            assert seen.kept()


def test_nothing_is_kept_from_or_used_in_a_capture(musa: str, x: torch.Tensor) -> None:
    """A replay computes with the parameter as it is then; a kept conversion would have been baked in, and one made in
    the capture has no value before the first replay."""
    layer, there = make().to(musa), x.to(musa)
    with torch.no_grad():
        layer(there)
        held = layer.fp32_parameters._entry
        graph = torch.musa.MUSAGraph()
        with torch.musa.graph(graph):
            y = layer(there)
        assert layer.fp32_parameters._entry is held is not None
        layer.weight.add_(1)
        graph.replay()
        assert torch.equal(y, layer(there))
        assert torch.equal(y.cpu(), expected(copy.deepcopy(layer).cpu(), x))


@pytest.mark.parametrize("compiler", ["eager", None])
def test_through_the_runner(musa: str, compiler: str | None) -> None:
    model = nn.Sequential(make(torch.float32), nn.Linear(SIZE, SIZE), make(torch.float32)).bfloat16().to(musa)
    with torch.no_grad():
        model(torch.randn(2, SIZE).bfloat16().to(musa))
        runner = fxpatch.PiecewiseRunner(model, dynamic={"input": 0}, sizes=[2, 4], compiler=compiler, on_error="raise")
        runner.prepare(torch.randn(4, SIZE).bfloat16().to(musa))
        for turn in range(3):
            x = torch.randn(2 + turn, SIZE).bfloat16().to(musa)
            assert torch.equal(runner(x).cpu(), model(x).cpu())
            model[0].weight.add_(1)


class Seed(Reference):
    """Seed 001's cache: keyed on address, counter of writes, devices and dtype; `detach`, and no other question."""

    def _cached(self, attr: str, param: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        if param is None:
            return None
        if torch.is_grad_enabled():
            return param.float().to(device=device)
        key = (param.data_ptr(), param._version, param.device, device, param.dtype)
        cache = self.__dict__.get(attr)
        if cache is not None and cache[0] == key:
            return cache[1]
        converted = param.detach().to(device=device, dtype=torch.float32)
        self.__dict__[attr] = (key, converted)
        return converted

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self._cached("_weight_fp32_cache", self.weight, inputs.device)
        bias = self._cached("_bias_fp32_cache", self.bias, inputs.device)
        return F.layer_norm(inputs.float(), self.normalized_shape, weight, bias, self.eps).to(inputs.dtype)


def seed() -> Seed:
    layer = Seed(SIZE).bfloat16()
    layer.load_state_dict(make().state_dict())
    return layer


def test_these_tests_find_the_holes_of_the_seeds_key(x: torch.Tensor, musa: str) -> None:
    """So they can fail; and the docstring's list is what happens, not what might."""
    wrong = []
    for change in CHANGES:
        layer = seed()
        with torch.no_grad():
            layer(x)
            change(layer)
            if not torch.equal(layer(x), expected(layer, x)):
                wrong.append(change.__name__)
    assert {"reassigned_over_the_same_memory", "data_with_other_strides"} <= set(wrong)
    assert not {"in_place", "reassigned", "state_loaded"} & set(wrong), "what its own tests looked at"
    with torch.inference_mode(), pytest.raises(RuntimeError, match="do not track version counter"):
        Seed(SIZE).bfloat16()(x)
    layer = seed()
    with torch.no_grad():
        layer(x)
        assert "_weight_fp32_cache" in copy.deepcopy(layer).__dict__, "it is copied, and pickled"
        assert len(pickle.dumps(layer)) > len(pickle.dumps(seed())) + 64
        layer, there = seed().to(musa), x.to(musa)
        first = captured(layer, there)
        layer.weight.add_(1)
        assert torch.equal(first(), layer(there)), "captured in a first call the conversion is a node, and right"
        second = captured(layer, there)
        layer.weight.add_(1)
        assert not torch.equal(second(), layer(there)), "captured in a later one it is a constant"


def captured(layer: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    graph = torch.musa.MUSAGraph()
    with torch.musa.graph(graph):
        y = layer(x)

    def replay() -> torch.Tensor:
        graph.replay()
        return y.clone()

    return replay
