"""Equal layers are traced once, and layers that only look equal are not: the runner computes what the model computes,
whichever way layers of one class differ; and nothing of the marks is left."""

from __future__ import annotations

import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piecewise_models import WIDTH, assert_same, runner_of
from torch import nn
from torch._dynamo.variables import invoke_subgraph

from fxpatch.errors import TraceError
from fxpatch.piecewise import prepare, regions
from fxpatch.piecewise import trace as trace_module
from fxpatch.piecewise.build import key_of
from fxpatch.piecewise.rules import rules_of
from fxpatch.piecewise.runner import PiecewiseRunner
from fxpatch.piecewise.same_as_eager import as_eager
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.split import split
from fxpatch.piecewise.trace import Traced, trace

pytestmark = pytest.mark.skipif(not regions._reuses(), reason="this torch traces every layer")
cut = torch.ops.piecewise_tests.functional


class Layer(nn.Module):
    """One of a stack."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.linear, self.number, self.scale = nn.Linear(WIDTH, WIDTH), number, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cut(self.linear(x)).tanh() * self.scale


class Stack(nn.Module):
    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(run: Callable[..., Any] | None = None, kind: type[Layer] = Layer, depth: int = 4) -> Any:
    """A stack of a class of its own, whose `forward` is `run`."""
    of = type("Model", (Stack,), {} if run is None else {"forward": run})
    return of([kind(number) for number in range(depth)])


def layer(compute: Callable[..., Any], kind: type[nn.Module] = Layer) -> Any:
    """A class of layers whose `forward` is `compute`."""
    return type("Another", (kind,), {"forward": compute})


class Box:
    """A plain object."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that something was taken over."""
    found: list[str] = []
    original = invoke_subgraph.stamp_out_subgraph

    def counted(*args: Any) -> Any:
        found.append(args[-1].body_name)
        return original(*args)

    monkeypatch.setattr(invoke_subgraph, "stamp_out_subgraph", counted)
    return found


def assert_right(make: Callable[[], Any], n: int = 5, compiler: str = "eager", ns: Any = range(1, 10)) -> None:
    """The runner's results are the model's, in its arguments and buffers as well."""
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    twin = make()
    runner = runner_of(model, compiler=compiler)
    runner.prepare(torch.randn(n, WIDTH))
    assert "not prepared" not in runner.state, runner.state
    for size in ns:
        x = torch.randn(size, WIDTH)
        y = x.clone()
        with torch.no_grad():
            expected = twin(y)
        assert_same(runner(x), expected)
        assert_same(x, y)
        assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


def traced(model: Any, n: int = 5) -> Traced:
    return trace(model, (torch.randn(n, WIDTH),), {}, {"x": 0}, 8)


# -- layers that look alike --------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], Any]] = {}


def model_of(make: Callable[[], Any]) -> Callable[[], Any]:
    MODELS[make.__name__] = make
    return make


def each(**values: list[Any]) -> Any:
    """Four layers, whose attributes have these values."""

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = cut(self.linear(x)).tanh()
        for name in values:
            value = getattr(self, name)
            if isinstance(value, str):
                y = getattr(torch, value)(y)
            elif isinstance(value, torch.dtype):
                y = y.to(value).float()
            elif callable(value):
                y = value(y)
            else:
                y = y * (value["k"] if isinstance(value, dict) else value[-1] if isinstance(value, tuple) else value)
        return y

    model = stack(kind=layer(compute))
    for name, given_ in values.items():
        for module, value in zip(model.layers, given_, strict=True):
            setattr(module, name, value)
    return model


def _scaled(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * by


for name, values in {
    "floats": [1.0, 1.0, 2.0, 1.0],
    "ints_and_floats": [1, 1.0, True, 1],
    "names": ["relu", "relu", "sin", "relu"],
    "dtypes": [torch.float32, torch.float32, torch.bfloat16, torch.float32],
    "tuples": [(1, 2), (1, 2), (1, 2, 3), (1, 2)],
    "dicts": [{"k": 1.0}, {"k": 1.0}, {"k": 2.0}, {"k": 1.0}],
    "functions": [torch.relu, torch.sin, torch.relu, nn.ReLU()],
    "closures": [_scaled(1.0), _scaled(1.0), _scaled(2.0), _scaled(1.0)],
    "partials": [functools.partial(torch.mul, other=other) for other in (1.0, 1.0, 2.0, 1.0)],
    "tensors": [torch.tensor(by) for by in (1.0, 2.0, 3.0, 4.0)],
    "modules": [nn.ReLU(), nn.ReLU(), nn.Sequential(nn.Tanh(), nn.ReLU()), nn.ReLU()],
}.items():
    MODELS[name] = functools.partial(each, value=values)


@model_of
def negative_zero() -> Any:
    def compute(self: Any, x: torch.Tensor) -> Any:
        return cut(self.linear(x)), torch.copysign(torch.ones(WIDTH), torch.full((WIDTH,), self.zero))

    def run(self: Any, x: torch.Tensor) -> Any:
        signs = []
        for each_ in self.layers:
            x, sign = each_(x)
            signs.append(sign)
        return x, signs

    model = stack(run, layer(compute))
    for module, zero in zip(model.layers, (0.0, -0.0, 0.0, -0.0), strict=True):
        module.zero = zero
    return model


@model_of
def one_tensor_as_two_arguments_at_first() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        h = x
        for each_ in self.layers:
            h = each_(h, x)
        return h

    return stack(run, layer(lambda self, x, other: cut(self.linear(x)) + other * 2))


@model_of
def one_tensor_as_two_arguments_later() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        h = self.layers[0](x, x + 1)
        for each_ in self.layers[1:]:
            h = each_(h, h)
        return h

    return stack(run, layer(lambda self, x, other: cut(self.linear(x)) + other * 2))


@model_of
def named_arguments_in_another_order() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        first, second, third, fourth = self.layers
        x = first(x, x + 1, x + 2)
        x = second(x, b=x + 1, a=x + 2)
        x = third(x, a=x + 1, b=x + 2)
        return fourth(x, b=x + 1, a=x + 2)

    return stack(run, layer(lambda self, x, a, b: cut(self.linear(x)).tanh() * a + b))


@model_of
def constants_passed() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for value, each_ in zip((True, 1, 1.0, True), self.layers, strict=True):
            x = each_(x, value)
        return x

    return stack(run, layer(lambda self, x, v: cut(self.linear(x)) * (2 if v is True else 3 if type(v) is int else 5)))


@model_of
def parameters_passed() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for number, each_ in enumerate(self.layers):
            x = each_(x, self.others[number], self.others[0])
        return x

    model = stack(run, layer(lambda self, x, a, b: cut(self.linear(x)) * a + b))
    model.others = nn.ParameterList(torch.randn(WIDTH) for _ in range(4))
    return model


@model_of
def modules_passed() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for number, each_ in enumerate(self.layers):
            x = each_(x, self.layers[max(number - 1, 0)])
        return x

    return stack(run, layer(lambda self, x, other: cut(self.linear(x)) + other.linear(x)))


def tied(tie: Callable[[Any], None]) -> Callable[[], Any]:
    class Two(Layer):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.other = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cut(self.linear(x)) + self.other(x)

    def run(self: Any, x: torch.Tensor) -> Any:
        return Stack.forward(self, self.first(x) if hasattr(self, "first") else x)

    def make() -> Any:
        model = stack(run, Two)
        tie(model)
        return model

    return make


def _tie(*pairs: tuple[str, str]) -> Callable[[], Any]:
    def tie(model: Any) -> None:
        for one, other in pairs:
            path, _, attribute = one.rpartition(".")
            owner = model.get_submodule(path)
            leaf, _, of = other.rpartition(".")
            setattr(owner, attribute, getattr(model.get_submodule(leaf), of))

    return tied(tie)


MODELS["tied_within_the_first"] = _tie(("layers.0.other.weight", "layers.0.linear.weight"))
MODELS["a_module_twice_within_the_first"] = _tie(("layers.0.other", "layers.0.linear"))
MODELS["tied_within_the_third"] = _tie(("layers.2.other.weight", "layers.2.linear.weight"))
MODELS["tied_to_what_runs_before"] = _tie(("first", "layers.0.linear"))
MODELS["tied_across"] = _tie(("layers.2.linear.weight", "layers.0.linear.weight"), ("layers.3.other", "layers.1.other"))
MODELS["tied_everywhere"] = _tie(*((f"layers.{n}.linear", "layers.0.linear") for n in (1, 2, 3)))


def shared(read_before: bool, set_between: bool) -> Callable[[], Any]:
    """A plain object that all layers but one have in common."""

    def run(self: Any, x: torch.Tensor) -> Any:
        if read_before:
            x = x * self.box.v
        for number, each_ in enumerate(self.layers):
            if set_between:
                self.box.v = number + 1.0
            x = each_(x)
        if set_between:
            self.box.v = 2.0
        return x

    def make() -> Any:
        model = stack(run, layer(lambda self, x: cut(self.linear(x)) * self.box.v))
        model.box = Box(v=2.0)
        for module in model.layers:
            module.box = model.box
        model.layers[2].box = Box(v=3.0)
        return model

    return make


for before in (False, True):
    for between in (False, True):
        MODELS[f"an_object_shared{'_read' * before}{'_set' * between}"] = shared(before, between)


@model_of
def a_list_that_grows() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        seen: list[int] = []
        self.box.seen = seen
        for each_ in self.layers:
            x = each_(x)
            seen.append(1)
        self.box.seen = None
        return x

    model = stack(run, layer(lambda self, x: cut(self.linear(x)) * (1 + len(self.box.seen))))
    model.box = Box(seen=None)
    for module in model.layers:
        module.box = model.box
    return model


CHANGING = 1.0


@model_of
def a_global_set_between() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        global CHANGING
        for number, each_ in enumerate(self.layers):
            CHANGING = number + 1.0
            x = each_(x)
        CHANGING = 1.0
        return x

    return stack(run, layer(lambda self, x: cut(self.linear(x)) * CHANGING))


@model_of
def an_attribute_of_the_layer_set_before() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for number, each_ in enumerate(self.layers):
            each_.scale = number + 1.0
            x = each_(x)
            each_.scale = 1.0
        return x

    return stack(run)


@model_of
def read_before_the_first_call() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        return Stack.forward(self, x * self.layers[0].scale * self.layers[0].opts["k"])

    model = stack(run, layer(lambda self, x: cut(self.linear(x)) * self.scale * self.opts["k"]))
    for number, module in enumerate(model.layers):
        module.scale, module.opts = 1.0 + (number == 2), {"k": 1.0 + (number == 3)}
    return model


@model_of
def a_way_around_the_layer() -> Any:
    model = stack(kind=layer(lambda self, x: cut(self.linear(x)) + self.parent[0].layers[0].linear(x)))
    for module in model.layers:
        module.parent = [model]
    return model


@model_of
def weights_in_a_list() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        return Stack.forward(self, x + self.layers[0].linear.weight.sum() + self.weights[0].sum())

    model = stack(run, layer(lambda self, x: cut(self.linear(x)) + self.weights[0].sum()))
    model.weights = [module.linear.weight for module in model.layers]
    for module in model.layers:
        module.weights = model.weights
    return model


@model_of
def identity() -> Any:
    one, other = object(), object()
    model = stack(kind=layer(lambda self, x: cut(self.linear(x)) * (3 if self.which is one else 1)))
    for number, module in enumerate(model.layers):
        module.which = other if number == 2 else one
    return model


@model_of
def identity_of_two() -> Any:
    model = stack(kind=layer(lambda self, x: cut(self.linear(x)) * (3 if self.a is self.b else 1)))
    for number, module in enumerate(model.layers):
        module.a = Box()
        module.b = Box() if number != 1 else module.a
    return model


@model_of
def hooks() -> Any:
    model = stack(depth=6)
    model.layers[1].register_forward_hook(lambda module, args, out: out * 2)
    model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.layers[4].linear.register_forward_hook(lambda module, args, out: out * 3)
    return model


@model_of
def parametrized() -> Any:
    model = stack()
    torch.nn.utils.parametrizations.weight_norm(model.layers[2].linear)
    return model


@model_of
def forms() -> Any:
    model = stack(kind=layer(lambda self, x: cut(self.linear(x)) * (2 if self.training else 3)), depth=6).eval()
    model.layers[1].linear = nn.Linear(WIDTH, WIDTH, bias=False)
    model.layers[2].train()
    model.layers[3].linear.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
    model.layers[4].linear.weight.requires_grad_(False)
    return model


@model_of
def growing() -> Any:
    class Wider(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH + number, WIDTH + number + 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    return Stack([Wider(number) for number in range(4)])


@model_of
def transposing() -> Any:
    return stack(kind=layer(lambda self, x: (x.t() + self.number * x.shape[0]).contiguous()))


class Written(Layer):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(16, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        self.kept[: x.shape[0]] = x
        y = cut(self.linear(x))
        out = torch.empty_like(y)
        torch.ops.piecewise_tests.out(y, x, out)
        x.add_(1.0)
        return out.tanh() * self.seen + x


MODELS["written"] = functools.partial(stack, kind=Written)


@model_of
def buffers_in_one_memory() -> Any:
    model = stack(kind=Written)
    memory = torch.ones(4)
    for number, module in enumerate(model.layers):
        module.seen = memory[0 if number == 2 else number]
    return model


@model_of
def classes_of_one_code() -> Any:
    def of(by: float) -> Any:
        return layer(lambda self, x, more=by: cut(self.linear(x)).tanh() * by + more)

    one, other = of(2.0), of(3.0)
    return Stack([one(), other(), one(), other(), one(), other()])


@model_of
def subclasses() -> Any:
    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        return Layer.forward(self, x) * 2

    sub = layer(compute)
    model = Stack([kind(n) for n, kind in enumerate([Layer, sub] * 4)])
    model.layers[5].scale = 3.0
    return model


@model_of
def forward_of_one_instance() -> Any:
    model = stack(depth=5)
    model.layers[2].forward = types.MethodType(lambda self, x: Layer.forward(self, x) * 2, model.layers[2])
    return model


@model_of
def called_in_another_order() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for number in (2, 0, 0, 3, 1, 2, 2):
            x = self.layers[number](x)
        return x

    return stack(run)


@model_of
def nested() -> Any:
    class Outer(Layer):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.inner = nn.ModuleList(Layer(each_) for each_ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for inner in self.inner:
                x = inner(x) + self.linear(x)
            return x

    model = stack(kind=Outer)
    model.layers[2].inner[1].scale = 2.0
    model.layers.append(Layer())
    return model


@model_of
def grad_and_autocast() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for number, each_ in enumerate(self.layers):
            if number % 2:
                with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
                    x = each_(x)
            else:
                x = each_(x.float())
        return x.float().detach()

    return stack(run, layer(lambda self, x: self.linear(x) * (2 if torch.is_grad_enabled() else 3)))


@model_of
def own_regions() -> Any:
    return stack(kind=layer(torch.compiler.nested_compile_region(lambda self, x: cut(self.linear(x)))))


def _inferred(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return self.linear(x)


RETURNS: dict[str, Callable[..., Any]] = {
    "a_view": lambda self, x: (cut(self.linear(x)), x[:, :2])[0],
    "itself": lambda self, x: x if self.number == 2 else cut(self.linear(x)),
    "what_it_writes": lambda self, x: x.add_(self.linear(x)),
    "views_of_one": lambda self, x: torch.cat([*cut(self.linear(x)).split(2, 1)], 1),
    "by_size": lambda self, x: cut(self.linear(x)).tanh() * x.shape[0] + torch.arange(x.shape[0])[:, None],
    "by_value": lambda self, x: cut(self.linear(x)).tanh() * x.sum().item(),
    "by_count": lambda self, x: cut(self.linear(x)).tanh() * x.nonzero().shape[0],
    "constants": lambda self, x: cut(self.linear(x)).tanh() + torch.tensor([1.0, 2.0, 3.0, self.number]),
    "inference": lambda self, x: cut(_inferred(self, x).clone()),
    "vmap": lambda self, x: cut(torch.vmap(self.linear)(x)),
    "checkpoint": lambda self, x: cut(torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)),
}
for name, compute in RETURNS.items():
    MODELS[f"returns_{name}"] = functools.partial(
        lambda of: stack(lambda self, x: Stack.forward(self, x * 1), of), layer(compute)
    )


@model_of
def returns_two_that_are_one() -> Any:
    def compute(self: Any, x: torch.Tensor) -> Any:
        y = cut(self.linear(x))
        return y, y, x[:, :2]

    def run(self: Any, x: torch.Tensor) -> Any:
        views = []
        for each_ in self.layers:
            one, other, view = each_(x)
            x = one + other
            views.append(view)
        return x, views

    return stack(run, layer(compute))


@model_of
def returns_a_dict() -> Any:
    def run(self: Any, x: torch.Tensor) -> Any:
        for each_ in self.layers:
            given_ = each_(x, {"n": 2, "x": x})
            x = given_["y"].tanh() * given_["n"] + given_["number"]
        return x

    def compute(self: Any, x: torch.Tensor, state: dict[str, Any]) -> Any:
        return {"y": cut(self.linear(x)) + state["x"], "n": x.shape[0] + state["n"], "number": self.number, "no": None}

    return stack(run, layer(compute))


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_look_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`alike` alone tells them apart, without the comparison with eager behind it."""
    monkeypatch.setattr(prepare, "as_eager", lambda *args: True)
    assert_right(MODELS[name], ns=(1, 4, 5, 9) if name != "transposing" else (4,))


@pytest.mark.parametrize("name", MODELS)
def test_eager_tells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison alone, with what Dynamo itself thinks to be alike."""
    monkeypatch.setattr(trace_module, "strict", nullcontext)
    assert_right(MODELS[name], ns=(1, 4, 9) if name != "transposing" else (4,))


@pytest.mark.parametrize("name", ["written", "tied_across", "subclasses", "by_size"])
def test_with_a_compiler_that_traces_anew(name: str) -> None:
    assert_right(MODELS.get(name) or MODELS[f"returns_{name}"], compiler="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["written", "buffers_in_one_memory", "nested"])
def test_with_inductor(name: str) -> None:
    assert_right(MODELS[name], compiler="inductor")


DIFFERENCES: list[Callable[[Any, Any], Any]] = [
    lambda model, module: None,
    lambda model, module: setattr(module, "scale", 2.0),
    lambda model, module: setattr(module, "number", 17),
    lambda model, module: setattr(module, "linear", nn.Linear(WIDTH, WIDTH, bias=False)),
    lambda model, module: setattr(module, "linear", model.layers[0].linear),
    lambda model, module: setattr(module.linear, "weight", model.layers[-1].linear.weight),
    lambda model, module: module.register_forward_hook(lambda module, args, out: out + 1),
    lambda model, module: module.linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    lambda model, module: setattr(module, "forward", types.MethodType(lambda self, x: self.linear(x) - x, module)),
    lambda model, module: module.linear.double().float(),
    lambda model, module: module.train(),
    lambda model, module: setattr(module, "linear", nn.Sequential(module.linear, nn.ReLU())),
]


@given(picks=st.lists(st.integers(0, len(DIFFERENCES) - 1), min_size=3, max_size=7), order=st.randoms())
@settings(max_examples=min(10, settings.default.max_examples), deadline=None)
def test_random_stacks(picks: list[int], order: Any) -> None:
    calls = [*range(len(picks)), *range(len(picks))]
    order.shuffle(calls)

    def run(self: Any, x: torch.Tensor) -> Any:
        for number in calls[: len(picks)]:
            x = self.layers[number](x)
        return x

    def make() -> Any:
        model = stack(run, Written if picks[0] % 2 else Layer, depth=len(picks)).eval()
        for pick, module in zip(picks, model.layers, strict=True):
            DIFFERENCES[pick](model, module)
        return model

    assert_right(make, ns=(1, 3))


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep", "written", "shared", "sizes"])
def test_the_graph_is_that_of_tracing_every_layer(name: str, reused: list[str], monkeypatch: Any) -> None:
    make = {
        "deep": lambda: stack(depth=16),
        "written": MODELS["written"],
        "shared": MODELS["tied_across"],
        "sizes": MODELS["returns_by_size"],
    }[name]
    torch.manual_seed(0)
    model = make()
    found = traced(model)
    assert reused
    done = len(reused)
    monkeypatch.setattr(trace_module, "classes_of", lambda function: {})
    assert spelled(found, model) == spelled(traced(model), model)
    assert len(reused) == done


def spelled(made: Traced, model: Any) -> tuple[list[Any], list[Any]]:
    """A graph's inputs, in any order, and its operations."""
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    numbers: dict[Any, str] = {}
    operations = []
    for node, fed in zip(made.gm.graph.find_nodes(op="placeholder"), made.feed, strict=True):
        numbers[node] = names.get(id(fed), type(fed).__name__)
    for number, node in enumerate(made.gm.graph.nodes):
        if node.op != "placeholder":
            numbers[node] = f"%{number}"
            arguments = torch.fx.map_arg((node.args, node.kwargs), lambda each_: numbers[each_])
            operations.append((str(node.target), str(arguments), str(form(node.meta.get("example_value")))))
    return sorted(numbers[node] for node in numbers if node.op == "placeholder"), operations


def form(known: Any) -> Any:
    if not isinstance(known, torch.Tensor):
        return known
    return known.dtype, known.shape, known.stride(), known.storage_offset()


def test_depth_does_not_matter() -> None:
    keys = []
    for depth in (4, 9):
        pieces = split(traced(stack(depth=depth)).gm, rules_of(["piecewise_tests::functional"])).pieces
        keys.append({key_of(piece.gm) for piece in pieces})
    assert keys[0] == keys[1]


def test_layers_are_taken_over(reused: list[str]) -> None:
    traced(stack(depth=12))
    assert len(reused) == 10, "one is traced with the caller's tensor, and one with what a layer gave"


# -- what is left ------------------------------------------------------------------------------------------------------


def marks(kind: type) -> list[str]:
    return [name for name in vars(kind.forward) if "region" in name]


def test_nothing_is_left() -> None:
    inherits = type("Inherits", (Layer,), {})
    before = Layer.__dict__["forward"]
    traced(Stack([Layer(), inherits(), Layer(), inherits(), inherits(), Layer()]))
    assert Layer.__dict__["forward"] is before
    assert "forward" not in vars(inherits)
    assert not marks(Layer)
    assert not regions._MARKING.locked()


def test_nothing_is_left_of_a_trace_that_fails() -> None:
    broken = layer(lambda self, x: (torch._dynamo.graph_break(), self.linear(x))[1])
    before = broken.forward
    with pytest.raises(TraceError):
        traced(stack(kind=broken))
    assert broken.forward is before
    assert not marks(broken)
    assert not regions._MARKING.locked()


def test_own_regions_stay_marked() -> None:
    own = layer(torch.compiler.nested_compile_region(lambda self, x: cut(self.linear(x))))
    before = dict(vars(own.forward))
    traced(stack(kind=own))
    assert vars(own.forward) == before


def test_other_threads_do_not_notice() -> None:
    model, x = stack(), torch.randn(3, WIDTH)
    with torch.no_grad(), regions.marked(regions.classes_of(model)):
        marked = Layer.forward
        found: list[Any] = []

        def elsewhere() -> None:
            with torch.no_grad():
                found.append(model(x))
            found.append(regions.classes_of(model))
            with regions.marked({Layer: 4}):
                found.append(Layer.forward)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert Layer.forward is marked
    with torch.no_grad():
        assert_same(found[0], model(x))
    assert found[1] == {}
    assert found[2] is marked


def test_the_model_can_go() -> None:
    model = stack(kind=Written)
    runner = runner_of(model)
    runner.prepare(torch.randn(5, WIDTH))
    gone = weakref.ref(model.layers[2].linear.weight)
    del model, runner
    gc.collect()
    assert gone() is None


# -- warm start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.layers[2], "scale", 2.0),
        lambda model: setattr(model.layers[2].box, "v", 2.0),
        lambda model: setattr(model.layers[2], "box", Box(v=3.0)),
        lambda model: setattr(model.layers[2].linear, "weight", model.layers[1].linear.weight),
    ],
)
@pytest.mark.filterwarnings("ignore::fxpatch.errors.FxPatchWarning")
def test_a_change_of_one_layer_is_seen(change: Any, is_shared: bool, tmp_path: Path, reused: list[str]) -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return Stack.forward(self, x * self.layers[0].box.v)

    kind = layer(lambda self, x: cut(self.linear(x)) * self.scale * self.box.v)

    def make() -> Any:
        torch.manual_seed(0)
        model = stack(run, kind)
        box = Box(v=1.0)
        for module in model.layers:
            module.box = box if is_shared else Box(v=1.0)
        return model

    def prepared(model: Any) -> str:
        runner = runner_of(model, cache=tmp_path / "cache", on_error="raise")
        runner.prepare(torch.randn(5, WIDTH))
        with torch.no_grad():
            x = torch.randn(3, WIDTH)
            assert_same(runner(x), model(x))
        return "\n".join(runner.report.notes)

    assert "saved to" in prepared(make())
    assert reused
    assert "not traced" in prepared(make())
    changed = make()
    change(changed)
    assert "not traced" not in prepared(changed)


class Static(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


def test_a_forward_that_is_no_plain_function_stays_what_it_is() -> None:
    model, before = nn.Sequential(*[Static() for _ in range(4)]), Static.__dict__["forward"]
    PiecewiseRunner(model, dynamic={"input": 0}, sizes=[4], compiler="eager").prepare(torch.randn(4, WIDTH))
    assert Static.__dict__["forward"] is before
    assert torch.equal(model(torch.ones(2, WIDTH)), torch.ones(2, WIDTH).tanh().tanh().tanh().tanh())


@pytest.mark.parametrize(
    "of", [lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), lambda x: torch.complex(x, x).conj()]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_results_without_plain_memory_can_be_compared(of: Any) -> None:
    layers = nn.Sequential(*[Layer() for _ in range(4)])
    runner = PiecewiseRunner(lambda x: of(layers(x)), dynamic={"x": 0}, sizes=[4], compiler="eager")
    runner.prepare(torch.randn(4, WIDTH))
    assert as_eager(lambda x: of(layers(x)), (torch.ones(2, WIDTH),), {}, [of(layers(torch.ones(2, WIDTH)))],
                    Snapshot([])) == (not of(torch.ones(1)).is_quantized)  # fmt: skip


def test_threads_that_prepare_at_once_leave_nothing_behind() -> None:
    before = invoke_subgraph.build_reuse_condition, invoke_subgraph.is_reusable, Layer.forward
    models = [nn.Sequential(*[Layer() for _ in range(6)]) for _ in range(3)]
    states: list[str] = []

    def prepare_one(model: nn.Module) -> None:
        runner = PiecewiseRunner(model, dynamic={"input": 0}, sizes=[4], compiler="eager", graphs="recorder")
        runner.prepare(torch.randn(4, WIDTH))
        states.append(runner.state)

    threads = [threading.Thread(target=prepare_one, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == ["prepared"] * 3
    assert (invoke_subgraph.build_reuse_condition, invoke_subgraph.is_reusable, Layer.forward) == before
