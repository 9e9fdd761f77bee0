"""Promotion: each kind of optimized forward gets the decision it deserves, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import operators_zoo as zoo
import pytest
import torch

from fxpatch.native import Decisions, Tolerance, assert_native_absent, find_operators, native, promote


@pytest.fixture(autouse=True)
def no_compiled_code() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["musa", "cpu"])
def decide(request: pytest.FixtureRequest, musa: str) -> Callable[..., Any]:
    """`decide(Good, Wrong)`: promotes a model of these, on the simulated device with graphs, on the CPU without."""
    device = request.param
    capture = zoo.SimulatedCapture(musa) if device == musa else None

    def promoted(*classes: type[zoo.Good], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Decisions]:
        torch.manual_seed(1)
        model = zoo.Model(*classes).to(device, dtype).eval()
        x = torch.randn(4, 16).to(device, dtype)
        x_before, before, drawn = x.clone(), zoo.frozen(model), torch.get_rng_state()
        decisions = promote(model, (x,), {}, device, capture=capture, **options)
        assert torch.equal(x, x_before)
        assert torch.equal(torch.get_rng_state(), drawn)
        if not any(issubclass(kind, zoo.Lazy | zoo.Remembering) for kind in classes):
            assert zoo.same(before, zoo.frozen(model))
        assert capture is None or capture.open == 0
        return model, decisions

    promoted.device = device  # type: ignore[attr-defined]
    promoted.capture = capture  # type: ignore[attr-defined]
    return promoted


def test_a_good_forward_is_promoted(decide: Any) -> None:
    _, decisions = decide(zoo.Good)
    row = decisions["layers.0"]
    assert (row.chosen, row.kind) == ("optimized", "Good"), row
    assert row.optimized == f"forward_{decide.device}"
    assert row.error is not None
    assert row.error.absolute < 1e-4
    assert row.speed is not None
    assert row.speed > 1
    if decide.capture:
        assert row.measured == "replay"
        assert row.reason == "passed: traced, replayed, equal to native"
        assert decide.capture.made == 3  # compared once, timed against native
    else:
        assert row.measured == "call"
        assert row.reason == "passed: traced, equal to native; not captured: this device captures no graphs"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (zoo.Wrong, "differs from native: the result: 64 of 64 elements off, by up to"),
        (zoo.Untraceable, "Dynamo does not trace it: Unsupported: "),
        (zoo.Raising, "raises NotImplementedError: no kernel for this shape"),
        (zoo.Overwriting, "differs from native: argument x after the call: 64 of 64 elements off"),
        (zoo.OverwritingQuietly, "differs from native: argument x after the call: 64 of 64 elements off"),
        (zoo.Delegating, "calls forward_native itself"),
        (zoo.FallingBackWhileTracing, "calls forward_native itself"),
        (zoo.LazyAndWrong, "differs from native: the result: 64 of 64 elements off"),
        (zoo.Remembering, "differs from native"),
        (zoo.CachedOtherwise, "differs from native: its "),
        (zoo.Counting, "differs from native: result 1: 5, native 4"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_bad_forward_is_refused_alone(decide: Any, kind: type[zoo.Good], reason: str) -> None:
    model, decisions = decide(zoo.Good, kind, zoo.Good)
    assert [row.chosen for row in decisions] == ["optimized", "native", "optimized"], str(decisions)
    assert reason in decisions["layers.1"].reason
    assert not hasattr(model.layers[1], "fused")
    assert not hasattr(model.layers[1], "first")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ten_percent_show_in_every_dtype(decide: Any, dtype: torch.dtype) -> None:
    _, decisions = decide(zoo.Good, zoo.Wrong, dtype=dtype)
    assert [row.chosen for row in decisions] == ["optimized", "native"], str(decisions)


def test_what_waits_for_the_host_is_not_captured(decide: Any) -> None:
    if decide.capture is None:
        pytest.skip("nothing waits for the host where there are no graphs: the CPU")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        _, decisions = decide(zoo.Waiting)
    row = decisions["layers.0"]
    assert row.chosen == "native"
    assert row.reason.startswith("cannot be captured: CaptureError: MUSA error: operation not permitted")
    torch.ones(3, device=decide.device).add_(1).sum().item()  # the device goes on


def test_slower_is_promoted_only_when_asked(decide: Any) -> None:
    _, decisions = decide(zoo.Slower)
    row = decisions["layers.0"]
    assert row.chosen == "native"
    assert row.reason.startswith("slower than native: 0.")
    assert row.reason.endswith("promoted from 0.95x on")
    _, decisions = decide(zoo.Slower, slower=True)
    assert decisions["layers.0"].chosen == "optimized"
    assert decisions["layers.0"].reason.endswith("slower than native, promoted as asked")


def test_what_a_promoted_forward_made_lazily_stays(decide: Any) -> None:
    model, decisions = decide(zoo.Lazy)
    assert decisions.promoted == ("layers.0",)
    assert isinstance(model.layers[0].fused, torch.nn.RMSNorm)
    graphs: list[torch.fx.GraphModule] = []
    with torch.no_grad(), decisions.apply():
        torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(
            torch.ones(4, 16, device=decide.device)
        )
    assert assert_native_absent(graphs[0], decisions) > 0


def test_an_overwritten_argument_is_allowed_where_nobody_reads_it(decide: Any) -> None:
    _, decisions = decide(zoo.Good, zoo.Overwriting, zoo.OverwritingQuietly, overwrites=True)
    assert len(decisions.promoted) == 3, str(decisions)


@pytest.mark.parametrize("kind", [zoo.Overwriting, zoo.OverwritingQuietly])
def test_an_overwritten_argument_that_is_read_is_found(decide: Any, kind: type[zoo.Good]) -> None:
    class Residual(zoo.Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 0.25
            return self.layers[0](y) + y

    model = Residual(kind).to(decide.device)
    x = torch.randn(4, 16).to(decide.device)
    decisions = promote(model, (x,), {}, decide.device, capture=decide.capture, overwrites=True)
    assert decisions["layers.0"].reason == "overwrites x, which is read afterwards"

    class Bare(zoo.Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)  # the caller's own tensor

    model = Bare(kind).to(decide.device)
    decisions = promote(model, (x,), {}, decide.device, capture=decide.capture, overwrites=True)
    assert decisions["layers.0"].reason == "overwrites x, which is read afterwards"


def test_effects_on_buffers_are_compared_and_undone(decide: Any) -> None:
    model, decisions = decide(zoo.Cached)
    assert decisions.promoted == ("layers.0",)
    assert model.layers[0].steps.item() == 0
    assert model.calls.item() == 0


def test_like_instances_are_traced_once_and_compared_each(decide: Any) -> None:
    if decide.capture is None:
        pytest.skip("counts captures, and the CPU has none")
    decide(zoo.Good, zoo.Good, zoo.Good, zoo.Good)
    assert decide.capture.made == 3


def test_a_wrong_instance_among_equal_ones_is_refused(musa: str) -> None:
    class Faulty(zoo.Good):
        """Right only for the weights that its kernel was tested with."""

        def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (16,), torch.linspace(0.5, 1.5, 16), 1e-6)

    model = zoo.Model(Faulty, Faulty)
    torch.nn.init.ones_(model.layers[1].weight)
    decisions = promote(model, (torch.randn(4, 16),), {}, "cpu", capture=None)
    assert [row.chosen for row in decisions] == ["optimized", "native"], str(decisions)


def test_a_result_in_the_memory_of_an_argument_is_refused(decide: Any) -> None:
    class Passing(zoo.Good):
        """The same numbers, but what is written into the result later is written into the argument."""

        def forward_native(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

    _, decisions = decide(Passing)
    expected = "differs from native: result 0 lies in the memory of x, native's in that of no argument"
    assert decisions["layers.0"].reason == expected


def test_a_graph_that_keeps_the_values_it_was_captured_with_is_refused(musa: str) -> None:
    first: list[torch.Tensor] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        """Right wherever it runs; while capturing it launches nothing that reads its argument."""
        if torch.musa.is_current_stream_capturing():
            return first[0].clone()
        first.append(x * 2)
        return first[-1].clone()

    library = torch.library.Library("stale", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", kernel, "PrivateUse1")
    torch.library.register_fake("stale::double", torch.empty_like, lib=library)

    class Stale(zoo.Good):
        def forward_native(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.stale.double.default(x)

    capture = zoo.SimulatedCapture(musa)
    x = torch.randn(4, 16).to(musa)
    decisions = promote(zoo.Model(Stale).to(musa), (x,), {}, musa, capture=capture, slower=True)
    assert decisions["layers.0"].reason.startswith("a replayed graph of it differs from native: the result: ")
    assert capture.open == 0
    library._destroy()


def test_other_sizes_are_compared_and_traced_as_dynamic() -> None:
    class Sized(zoo.Good):
        """Right for four rows, and for no others."""

        def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward_musa(x) if x.shape[0] == 4 else x

    class Specialised(zoo.Good):
        """A graph for each number of rows."""

        def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward_musa(x) * {4: 1.0, 8: 1.0}[int(x.shape[0])]

    model = zoo.Model(zoo.Good, Sized, Specialised)
    small, large = torch.randn(4, 16), torch.randn(8, 16)
    decisions = promote(model, (small,), {}, "cpu", capture=None)
    assert [row.chosen for row in decisions] == ["optimized", "optimized", "optimized"], str(decisions)
    decisions = promote(model, (small,), {}, "cpu", capture=None, more_examples=[((large,), {})])
    assert [row.chosen for row in decisions] == ["optimized", "native", "native"], str(decisions)
    assert "differs from native: the result: 128 of 128 elements off" in decisions["layers.1"].reason
    assert "Dynamo does not trace it" in decisions["layers.2"].reason


def test_tolerance_is_the_callers(musa: str) -> None:
    class Rounding(zoo.Good):
        """Quantises to int8; the kernel rounds otherwise."""

        def forward_native(self, x: torch.Tensor) -> torch.Tensor:
            return self.quantise(x, 0.0)

        def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
            return self.quantise(x, 0.2)

        def quantise(self, x: torch.Tensor, more: float) -> torch.Tensor:
            return (x * 50 + more).round().clamp(-127, 127).to(torch.int8)

    model, x = zoo.Model(Rounding), torch.randn(4, 16)
    decisions = promote(model, (x,), {}, "cpu", capture=None, slower=True)
    assert "integers differ, by up to 1" in decisions["layers.0"].reason
    loose = {torch.int8: Tolerance(0, 1, 0)}
    decisions = promote(model, (x,), {}, "cpu", capture=None, slower=True, tolerance=loose)
    assert decisions.promoted == ("layers.0",)


def test_what_was_never_called_stays_native() -> None:
    model = zoo.Model(zoo.Good)
    model.spare = zoo.Good(16)
    decisions = promote(model, (torch.randn(4, 16),), {}, "cpu", capture=None)
    assert decisions["spare"].reason == "never called with the example inputs: nothing to try it on"
    assert decisions.promoted == ("layers.0",)


def test_an_operator_that_is_split_off_is_not_captured(musa: str) -> None:
    capture = zoo.SimulatedCapture(musa)
    model = zoo.Model(zoo.Good).to(musa)
    x = torch.randn(4, 16).to(musa)
    decisions = promote(model, (x,), {}, musa, capture=capture, splitting=lambda node: "rms_norm" in str(node.target))
    assert decisions.promoted == ("layers.0",)
    assert decisions["layers.0"].reason.endswith("not captured: rms_norm stays outside graphs")
    assert capture.made == 0


@pytest.mark.parametrize("where", ["native", "capture"])
def test_an_interrupt_leaves_everything_as_it_was(musa: str, where: str) -> None:
    class Interrupted(zoo.Good):
        def forward_native(self, x: torch.Tensor) -> torch.Tensor:
            self.calls_seen = getattr(self, "calls_seen", 0) + 1
            if where == "native" and self.calls_seen == 2:
                raise KeyboardInterrupt
            return super().forward_native(x)

    def capture(call: Any) -> Any:
        call()
        raise KeyboardInterrupt

    model = zoo.Model(zoo.Good, Interrupted).to(musa)
    x = torch.randn(4, 16).to(musa)
    for layer in model.layers:
        layer.calls_seen = 0
    before = zoo.frozen(model)
    with pytest.raises(KeyboardInterrupt):
        promote(model, (x,), {}, musa, capture=capture)
    after = zoo.frozen(model)
    assert zoo.same(before, after)


def test_a_model_that_fails_natively_fails_as_itself() -> None:
    class Broken(zoo.Good):
        def forward_native(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("the model's own mistake")

    model = zoo.Model(zoo.Good, Broken)
    before = zoo.frozen(model)
    with pytest.raises(ZeroDivisionError, match="the model's own mistake"):
        promote(model, (torch.randn(4, 16),), {}, "cpu", capture=None)
    assert zoo.same(before, zoo.frozen(model))


def test_a_switched_off_dynamo_promotes_nothing_by_mistake() -> None:
    model = zoo.Model(zoo.Good, zoo.Untraceable)
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(disable=True):
        decisions = promote(model, (torch.randn(4, 16),), {}, "cpu", capture=None)
    assert decisions.promoted == ("layers.0",)


def test_the_promoted_model_computes_what_the_native_one_does(decide: Any) -> None:
    model, decisions = decide(zoo.Good, zoo.Wrong, zoo.Cached, zoo.Raising)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)).to(decide.device)
    operators = find_operators(model, decide.device)
    with torch.no_grad():
        with native(operators):
            expected = model(x)
        for layer in model.layers:
            if isinstance(layer, zoo.Cached):
                layer.steps.zero_()
        with decisions.apply():
            torch.testing.assert_close(model(x), expected)


def test_a_raw_pointer_kernel_is_refused_and_the_process_lives(fresh: Callable[..., str]) -> None:
    out = fresh(
        """
        import ctypes, sys, torch
        sys.path.insert(0, "native")
        import operators_zoo as zoo
        from fxpatch.native import promote
        libc = ctypes.CDLL(None)
        libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

        class Pointers(zoo.Good):
            def forward_native(self, x):
                return x.clone()
            def forward_cpu(self, x):
                y = torch.empty_like(x)
                libc.memcpy(y.data_ptr(), x.data_ptr(), x.numel() * 4)
                return y

        lib = torch.library.Library("pointers", "DEF")
        lib.define("copy(Tensor x) -> Tensor")
        def copy(x):
            y = torch.empty_like(x)
            libc.memcpy(y.data_ptr(), x.data_ptr(), x.numel() * 4)
            return y
        lib.impl("copy", copy, "CompositeExplicitAutograd")

        class Registered(Pointers):
            def forward_cpu(self, x):
                return torch.ops.pointers.copy.default(x)

        lib.define("opaque(Tensor x) -> Tensor")
        lib.impl("opaque", copy, "CPU")
        torch.library.register_fake("pointers::opaque", torch.empty_like)

        class Opaque(Pointers):
            def forward_cpu(self, x):
                return torch.ops.pointers.opaque.default(x)

        model = zoo.Model(Pointers, Registered, Opaque)
        for row in promote(model, (torch.randn(4, 16),), {}, "cpu", capture=None, slower=True):
            print(row.kind, row.chosen, row.error.absolute, row.reason)
        """
    )
    rows = out.splitlines()
    assert rows[0].startswith("Pointers native 0.0 Dynamo does not trace it: Unsupported: "), out
    assert rows[1].startswith("Registered native 0.0 Dynamo does not trace it: "), out
    assert rows[2].startswith("Opaque optimized 0.0 passed"), out
