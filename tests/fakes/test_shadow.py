"""A shadowed operator runs as often as in eager and gives what it gives in eager, however it is called and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fake_kernels import AlreadyHad, FakeKernel, Registry, Shadowed, shadow
from fake_kernels.errors import (
    NoDerivativeError,
    RegisteredTwiceError,
    SchemaError,
    SignatureError,
    UnknownOperatorError,
)
from fxpatch import install


@dataclass
class Vendor:
    """A library whose schemas lie, as its kernels are called."""

    library: torch.library.Library
    calls: list[str] = field(default_factory=list)

    def define(self, schema: str, kernel: Callable[..., Any], key: str = "PrivateUse1") -> Any:
        name = schema.partition("(")[0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return kernel(*args, **kwargs)

        self.library.define(schema)
        self.library.impl(name, counted, key)
        return getattr(torch.ops.liar, name)


@pytest.fixture
def vendor(musa: str) -> Iterator[Vendor]:
    library = torch.library.Library("liar", "DEF")
    yield Vendor(library)
    library._destroy()
    torch._dynamo.reset()


def fill(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


def rotate(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.mul_(2), k.add_(1)


def cache(x: torch.Tensor, at: torch.Tensor, kept: torch.Tensor, *, scale: float = 2.0, mode: str = "a b") -> Any:
    kept.index_copy_(0, at, x * scale)
    return kept, x.sum(-1)


FILL = "fill(Tensor x, Tensor out) -> ()"
ROTATE = "rotate(Tensor q, Tensor k) -> (Tensor, Tensor)"
CACHE = 'cache(Tensor x, Tensor at, Tensor kept, *, float scale=2., str mode="a b") -> (Tensor, Tensor)'


def cache_fake(x: Any, at: Any, kept: Any, *, scale: float = 2.0, mode: str = "a b") -> Any:
    return kept, x.new_empty(x.shape[:-1])


def filled(x: torch.Tensor) -> Any:
    out = torch.zeros_like(x)
    torch.ops.liar.fill(x, out)
    torch.ops.liar.fill(out, x)
    return out + 0, x + out


def filled_by_an_overload(x: torch.Tensor) -> Any:
    out = torch.empty_like(x)
    torch.ops.liar.fill.default(x, out)
    return out.sum()


def rotated(x: torch.Tensor) -> Any:
    """Views of one tensor, written through, and returned."""
    both = torch.cat([x, x + 1])
    q, k = both.view(2, -1).unbind(0)
    a, b = torch.ops.liar.rotate(q, k)
    torch.ops.liar.rotate(q, k)
    return both + 1, a * b


def rotated_argument(x: torch.Tensor) -> Any:
    """A caller's tensor, whose change has to arrive there; the results are not used."""
    torch.ops.liar.rotate(x, x.clone())
    return None


def cached(x: torch.Tensor) -> Any:
    kept = torch.zeros(8, x.shape[-1], device=x.device)
    at = torch.arange(x.shape[0], device=x.device)
    same, sums = torch.ops.liar.cache(x, at, kept, scale=3.0)
    return kept * 2, same + 1, sums


PROGRAMS = [filled, filled_by_an_overload, rotated, rotated_argument, cached]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_it_runs_as_often_as_in_eager_with_the_same_results(
    vendor: Vendor, program: Callable[..., Any], backend: str
) -> None:
    vendor.define(FILL, fill)
    vendor.define(ROTATE, rotate)
    vendor.define(CACHE, cache)
    compiled = torch.compile(program, backend=backend, fullgraph=True)

    def run(function: Callable[..., Any]) -> tuple[list[torch.Tensor], list[str]]:
        vendor.calls.clear()
        x = torch.arange(8.0, device="musa").view(2, 4)
        results = function(x)
        return [t.cpu() for t in pytree.tree_leaves((results, x)) if t is not None], list(vendor.calls)

    expected, calls = run(program)
    assert calls
    with (
        install("musa"),
        shadow("liar::fill", mutates_args=["out"]),
        shadow("liar::rotate", mutates_args=["q", "k"], returns_args={0: "q", 1: "k"}),
        shadow("liar::cache", mutates_args=["kept"], returns_args={0: "kept"}, fake=cache_fake),
    ):
        for guard in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            torch._dynamo.reset()
            with guard():
                for function in (program, compiled):
                    results, seen = run(function)
                    assert seen == calls
                    for one, other in zip(results, expected, strict=True):
                        assert torch.equal(one, other)


def test_without_it_a_fake_kernel_makes_the_call_disappear(vendor: Vendor) -> None:
    """What the shadow is for: the same program, with the fake kernel that engines register."""
    vendor.define(FILL, fill)
    torch.library.register_fake("liar::fill", lambda x, out: None, lib=vendor.library)
    x = torch.ones(4, device="musa")
    with install("musa"):
        assert torch.compile(filled_by_an_overload, backend="aot_eager", fullgraph=True)(x).item() != 8
        assert vendor.calls == []
        torch._dynamo.reset()
        with shadow("liar::fill", mutates_args=["out"]):
            assert torch.compile(filled_by_an_overload, backend="aot_eager", fullgraph=True)(x).item() == 8
            assert vendor.calls == ["fill"]


def test_a_call_site_that_held_the_operator_before_is_routed_too(vendor: Vendor) -> None:
    held = vendor.define(FILL, fill).default
    with shadow("liar::fill", mutates_args=["out"]) as made:
        x, out = torch.ones(2, device="musa"), torch.zeros(2, device="musa")
        with torch.profiler.profile() as seen:
            held(x, out)
        assert made.op.name() in {event.key for event in seen.key_averages()}
        assert out.tolist() == [2, 2]


def test_the_version_of_what_is_written_counts_up(vendor: Vendor) -> None:
    """So autograd notices that a saved tensor has changed, which the vendor's own operator keeps from it."""
    held = vendor.define(FILL, fill)
    out = torch.zeros(2, device="musa")
    with shadow("liar::fill", mutates_args=["out"]):
        before = out._version
        held(torch.ones(2, device="musa"), out)
        assert out._version > before


def test_fx_does_not_eliminate_the_operator_itself(vendor: Vendor) -> None:
    held = vendor.define(FILL, fill).default

    def nodes_left() -> int:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.call_function(held, (x, x))
        graph.output(x)
        graph.eliminate_dead_code()
        return sum(node.op == "call_function" for node in graph.nodes)

    assert nodes_left() == 0
    with shadow("liar::fill", mutates_args=["out"]):
        assert nodes_left() == 1
    assert nodes_left() == 0


def test_removed_it_is_as_before(vendor: Vendor) -> None:
    held = vendor.define(FILL, fill)
    made = shadow("liar::fill", mutates_args=["out"])
    assert torch.ops.shadow.liar__fill_privateuse1.default is made.op
    made.remove()
    made.remove()
    held(torch.ones(2, device="musa"), torch.zeros(2, device="musa"))
    assert vendor.calls == ["fill"]
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("liar::fill", "AutogradPrivateUse1")
    assert not hasattr(torch.ops.shadow, "liar__fill_privateuse1")
    shadow("liar::fill", mutates_args=["out"]).remove()


def test_an_autograd_kernel_from_python_is_not_overridden(vendor: Vendor) -> None:
    vendor.define(FILL, fill)
    own = torch.library.Library("liar", "IMPL")
    own.impl("fill", lambda x, out: None, "AutogradPrivateUse1")
    with pytest.raises(
        RegisteredTwiceError, match="seen: a kernel for AutogradPrivateUse1 that was registered from Py"
    ):
        shadow("liar::fill", mutates_args=["out"])
    own._destroy()


def test_a_record_that_hides_something_is_shadowed_by_the_registry(vendor: Vendor) -> None:
    vendor.define(CACHE, cache)
    record = FakeKernel(
        f"liar::{CACHE}",
        cache_fake,
        reference=cache,
        source="a test",
        library="liar",
        arguments=lambda draw: ((), {}),
        writes=("kept",),
        returns_arguments={0: "kept"},
    )
    registry = Registry([record])
    outcome = registry.settle()["liar::cache"]
    assert outcome == Shadowed(
        "liar::cache",
        "it writes kept, returns kept as result 0, and its schema does not say so: "
        "calls go through shadow::liar__cache_privateuse1",
    )
    assert str(torch.ops.shadow.liar__cache_privateuse1.default._schema) == (
        "shadow::liar__cache_privateuse1(Tensor x, Tensor at, Tensor(s0!) kept, float scale=2., "
        'str mode_="a b") -> Tensor'
    )
    assert Registry([record]).settle()["liar::cache"] == AlreadyHad(
        "liar::cache", "calls go through shadow::liar__cache_privateuse1 already"
    )
    registry.undo()
    assert not hasattr(torch.ops.shadow, "liar__cache_privateuse1")


def test_on_the_cpu(vendor: Vendor) -> None:
    held = vendor.define(
        "list(Tensor[] xs, Tensor? y=None) -> ()", lambda xs, y=None: list(xs[0].add_(1))[:0] or None, "CPU"
    )

    def program(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        held([out, x])
        return out * 2

    with shadow("liar::list", mutates_args=["xs"], device="cpu") as made:
        assert "Tensor(s0!)[] xs, Tensor? y=None" in str(made.op._schema)
        assert torch.compile(program, backend="aot_eager", fullgraph=True)(torch.ones(2)).tolist() == [4, 4]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_an_argument_that_needs_a_gradient(vendor: Vendor) -> None:
    held = vendor.define(FILL, fill)
    x, out = torch.ones(2, device="musa", requires_grad=True), torch.zeros(2, device="musa")
    with shadow("liar::fill", mutates_args=["out"]):
        with pytest.raises(NoDerivativeError, match=r"to do: call it under torch\.no_grad\(\)"):
            held(x, out)
        with torch.no_grad():
            held(x, out)
    assert vendor.calls == ["fill"]


@pytest.mark.parametrize(
    ("operator", "options", "error", "match"),
    [
        ("liar::none", {"mutates_args": ["x"]}, UnknownOperatorError, "seen: no such operator is registered"),
        (
            "liar::fill",
            {"mutates_args": ["y"]},
            SignatureError,
            r"seen: 'y'\n  expected: tensor arguments and results of",
        ),
        ("liar::fill", {"mutates_args": []}, SignatureError, "seen: nothing that it writes or returns"),
        ("liar::fill", {"mutates_args": ["out"], "returns_args": {0: "out"}}, SignatureError, "seen: result 0"),
        (
            "liar::rotate",
            {"mutates_args": ["q"], "returns_args": {0: "q"}},
            SignatureError,
            "and 1 results that are no",
        ),
        ("liar::honest", {"mutates_args": ["x"]}, SchemaError, "declares what it writes"),
        (
            "liar::fill",
            {"mutates_args": ["out"], "device": "mps"},
            UnknownOperatorError,
            "expected: cpu, cuda, xpu, or",
        ),
        ("liar", {"mutates_args": ["out"]}, ValueError, "No operator can be called 'liar'"),
    ],
)
def test_what_cannot_be_shadowed(
    vendor: Vendor, operator: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    vendor.define(FILL, fill)
    vendor.define(ROTATE, rotate)
    vendor.define("honest(Tensor(a!) x) -> ()", lambda x: None)
    with pytest.raises(error, match=match):
        shadow(operator, **options)
    assert not [name for name in torch.ops.shadow.__dict__ if name.startswith("liar")]


def test_twice(vendor: Vendor) -> None:
    vendor.define(FILL, fill)
    with shadow("liar::fill", mutates_args=["out"]):
        with pytest.raises(RegisteredTwiceError, match=r"it has a shadow at AutogradPrivateUse1: shadow::liar__fill"):
            shadow("liar::fill", mutates_args=["out"])
        shadow("liar::fill", mutates_args=["out"], device="cpu").remove()
