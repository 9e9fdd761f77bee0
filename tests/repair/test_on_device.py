"""Each repair on the simulated device: fails today, works while installed, gives eager's answer, fails again."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fxpatch
from fxpatch.repair import autocast, cache_key, inductor, rng


@pytest.fixture(autouse=True)
def _fresh_dynamo(musa: str) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def state(name: str) -> str:
    return {row.name: row.state for row in fxpatch.status().rows}[name]


# -- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_runs_and_says_that_it_casts_nothing(fresh: Callable[..., str]) -> None:
    """On a device whose vendor registered none; in a process of its own, since this one's device has autocast."""
    fresh("""
        import torch, fxpatch
        fxpatch.simulate("musa", without=("autocast",))
        x, weight = torch.randn(3, 4, device="musa"), torch.randn(5, 4, device="musa")
        expected = torch.nn.functional.linear(x.cpu(), weight.cpu()).relu()

        def autocast_linear(x, weight):
            with torch.autocast("musa", dtype=torch.bfloat16):
                return torch.nn.functional.linear(x, weight).relu()

        def fails():
            try:
                autocast_linear(x, weight)
            except NotImplementedError as error:
                return "from the 'Autocastmusa' backend" in str(error)

        assert fails()
        with fxpatch.install("musa"):
            for backend in (None, "eager", "aot_eager"):
                torch._dynamo.reset()
                f = torch.compile(autocast_linear, backend=backend, fullgraph=True) if backend else autocast_linear
                result = f(x, weight)
                assert result.dtype == torch.float32
                torch.testing.assert_close(result.cpu(), expected)
            assert "cast nothing" in str(fxpatch.status())
        assert fails()
    """)


def test_a_device_with_autocast_keeps_it() -> None:
    x = torch.randn(3, 4, device="musa")
    with fxpatch.install("musa"), torch.autocast("musa", dtype=torch.bfloat16):
        assert state("autocast-fallthrough") == "not needed"
        assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("private", "module", "fallback", "needed"),
    [(True, True, False, True), (True, True, True, False), (True, False, False, False), (False, True, False, False)],
)
def test_autocast_is_left_to_the_vendor_where_it_may_register_its_own(
    private: bool, module: bool, fallback: bool, needed: bool
) -> None:
    """The dispatcher takes one fallback per key: ours would make the vendor's import fail."""
    decision = autocast._decide(autocast.Autocast(private, module, fallback))
    assert (type(decision).__name__ == "Needed") is needed


# -- random state in compiled checkpointing --------------------------------------------------------------------------


def dropout_block(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(torch.sigmoid(x), 0.5)


def checkpointed(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(dropout_block, x, use_reentrant=False, preserve_rng_state=True)


def test_checkpointed_dropout_recomputes_the_same_mask() -> None:
    """The gradient is zero exactly where the output is: the recomputed forward drew the same numbers."""
    compiled = torch.compile(checkpointed, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(64, device="musa", requires_grad=True)
    with pytest.raises(Exception, match="Backend not supported for musa"):
        compiled(x)
    torch._dynamo.reset()
    with fxpatch.install("musa"):
        torch.manual_seed(1)
        before = torch.musa.get_rng_state().clone()
        y = compiled(x)
        assert not torch.equal(before, torch.musa.get_rng_state()), "the forward advanced the generator"
        torch.rand(3, device="musa")
        after = torch.musa.get_rng_state()
        y.sum().backward()
        assert state("checkpoint-rng") == "applied"
    assert torch.equal(torch.musa.get_rng_state(), after), "the backward left it as it was"
    dropped = y.detach().cpu() == 0
    assert 0 < dropped.sum() < 64
    assert x.grad is not None
    assert torch.equal(x.grad.cpu() == 0, dropped)
    sigmoid = torch.sigmoid(x.detach().cpu())
    torch.testing.assert_close(y.detach().cpu()[~dropped], 2 * sigmoid[~dropped])
    torch.testing.assert_close(x.grad.cpu()[~dropped], (2 * sigmoid * (1 - sigmoid))[~dropped])


def test_other_devices_keep_their_own_random_state() -> None:
    """Checkpointed dropout on the CPU saves and restores the CPU's state, not the device's."""
    compiled = torch.compile(checkpointed, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(64, requires_grad=True)
    with fxpatch.install("musa"):
        of_device = torch.musa.get_rng_state().clone()
        y = compiled(x)
        torch.rand(3)
        after = torch.get_rng_state()
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(torch.musa.get_rng_state(), of_device)
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y.detach() == 0)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (rng.Rng(True, False, True, ()), "Needed"),
        (rng.Rng(True, True, True, ()), "NotNeeded"),
        (rng.Rng(True, True, False, ()), "Needed"),
        (rng.Rng(False, False, True, ()), "NotNeeded"),
        (rng.Rng(True, False, True, ("get_rng_state",)), "Refused"),
        (rng.Rng(True, False, None, ()), "Refused"),
    ],
)
def test_random_state_is_decided_from_facts(facts: rng.Rng, expected: str) -> None:
    assert type(rng._decide(facts)).__name__ == expected


# -- flex attention --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_flex_attention_is_accepted_and_equals_the_cpu(backend: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def causal(score: Any, _b: Any, _h: Any, q: Any, k: Any) -> Any:
        return torch.where(q >= k, score, -float("inf"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(q, k, v, score_mod=causal)

    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    f = attend if backend == "none" else torch.compile(attend, backend=backend, fullgraph=True)
    on_device = [t.to("musa") for t in (q, k, v)]
    with pytest.raises(Exception, match="FlexAttention is only supported on"):
        f(*on_device)
    torch._dynamo.reset()
    with fxpatch.install("musa"):
        torch.testing.assert_close(f(*on_device).cpu(), expected)
        with pytest.raises(ValueError, match="Found input tensors on meta device"):
            attend(*(t.to("meta") for t in (q, k, v)))
    with pytest.raises(ValueError, match="Found input tensors on musa device"):
        attend(*on_device)


# -- the device module -----------------------------------------------------------------------------------------------


class Lazy:
    """What some vendors register: an object that answers like a module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_MUSA, name)


_MUSA = None


def count_devices(x: torch.Tensor) -> torch.Tensor:
    return x + torch.get_device_module("musa").device_count()


def test_an_object_in_the_place_of_the_device_module_works_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "_MUSA", torch.musa)
    stand_in = Lazy()
    monkeypatch.setattr(torch, "musa", stand_in)
    compiled = torch.compile(count_devices, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    with fxpatch.install("musa"):
        assert state("device-module") == "applied"
        assert torch.equal(compiled(x), torch.ones(2))
        torch.musa.written = 1
        assert vars(stand_in) == {"written": 1}
        assert "written" in dir(torch.musa)
        del torch.musa.written
        assert vars(stand_in) == {}
    assert torch.musa is stand_in


def test_a_device_module_under_another_name_works_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.musa, "__name__", "vendor.musa_module")
    compiled = torch.compile(count_devices, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    with pytest.raises(Exception, match="musa_module"):
        compiled(x)
    torch._dynamo.reset()
    with fxpatch.install("musa"):
        assert torch.equal(compiled(x), torch.ones(2))
    assert torch.musa.__name__ == "vendor.musa_module"


# -- Inductor --------------------------------------------------------------------------------------------------------


def test_a_device_without_inductor_is_told_what_is_missing() -> None:
    decision = inductor._decide(
        {
            "register_backend_for_device": False,
            "register_interface_for_device": True,
            "register_device_op_overrides": False,
        }
    )
    assert decision.reason.startswith("nobody has called register_backend_for_device, register_device_op_overrides")
    assert 'compile with backend="aot_eager", or let the vendor call fxpatch.register_inductor()' in decision.reason


@pytest.mark.slow
def test_a_device_that_registered_nothing_is_refused_and_works_without_inductor(fresh: Callable[..., str]) -> None:
    out = fresh("""
        import torch, fxpatch
        fxpatch.simulate("musa", without=("inductor",))
        import torch._inductor.compile_fx
        x = torch.ones(2, device="musa")
        with fxpatch.install("musa"):
            (row,) = (row for row in fxpatch.status().rows if row.name == "inductor-backend")
            print(row.state, row.reason)
            assert torch.compile(lambda x: x + 1, backend="aot_eager")(x).tolist() == [2, 2]
            try:
                torch.compile(lambda x: x + 1)(x)
            except Exception as error:
                print(type(error).__name__)
    """)
    assert out.startswith("refused nobody has called register_backend_for_device")
    assert "let the vendor call fxpatch.register_inductor()" in out
    assert out.split()[-1] == "InductorError"


def test_the_simulated_device_has_registered_itself() -> None:
    __import__("torch._inductor.compile_fx")

    with fxpatch.install("musa"):
        assert state("inductor-backend") == "not needed"


# -- the cache key ---------------------------------------------------------------------------------------------------


def key_of_a_graph() -> str:
    from torch._inductor.codecache import FxGraphCachePickler

    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    module = torch.fx.GraphModule({}, graph)
    from torch._inductor.codecache import FxGraphHashDetails

    return str(FxGraphCachePickler(module).get_hash(FxGraphHashDetails(module, [], {}, [])))


@pytest.fixture
def in_use(musa: str) -> None:
    """The device is asked for its model only then."""
    torch.ones(1, device=musa)


@pytest.mark.usefixtures("in_use")
def test_the_key_changes_with_the_device_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of_a_graph()
    with fxpatch.install("musa"):
        one = key_of_a_graph()
        assert one == key_of_a_graph()
    assert key_of_a_graph() == before
    monkeypatch.setattr(torch.musa, "get_device_properties", lambda *_: "another model, another driver")
    with fxpatch.install("musa"):
        other = key_of_a_graph()
    assert len({before, one, other}) == 3


@pytest.mark.usefixtures("in_use")
def test_a_device_that_changes_changes_the_key_while_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not in use at install(), say, and is by the time something is compiled."""
    before = torch.compiler.config.cache_key_tag
    with fxpatch.install("musa") as installation:
        one = torch.compiler.config.cache_key_tag
        monkeypatch.setattr(torch.musa, "get_device_properties", lambda *_: "another driver")
        installation.settle()
        assert torch.compiler.config.cache_key_tag not in (before, one)
    assert torch.compiler.config.cache_key_tag == before


def test_the_vendors_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = types.ModuleType("torch_musa")
    vendor.__version__ = "2.13.7"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_musa", vendor)
    assert "/torch_musa=2.13.7/" in cache_key._probe("musa").part


def test_a_tag_that_others_wrote_is_kept() -> None:
    """Before and after ours; only our part is taken out again."""
    __import__("torch._inductor.codecache")
    config = torch.compiler.config
    with config.patch(cache_key_tag="mine"):
        with fxpatch.install("musa"):
            assert config.cache_key_tag.startswith("mine|fxpatch/musa/")
            config.cache_key_tag += "|later"
        assert config.cache_key_tag == "mine|later"


def test_other_threads_compile_with_the_same_key_and_settings() -> None:
    """torch keeps its settings per thread: what `install()` sets in one, another would compile without, silently."""
    __import__("torch._inductor.codecache")
    import torch._inductor.config as inductor_config

    seen: list[tuple[str, int | None]] = []

    def backend(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append((torch.compiler.config.cache_key_tag, inductor_config.compile_threads))
        return module.forward

    def compile_something() -> None:
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))

    def in_a_thread() -> None:
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()

    before = torch.compiler.config.cache_key_tag
    with fxpatch.install("musa"):
        compile_something()
        in_a_thread()
        here, there = seen
        assert here == there
        assert "fxpatch/musa/" in here[0]
        assert here[1] == 1
    in_a_thread()
    assert "fxpatch/musa/" not in seen[-1][0]
    assert torch.compiler.config.cache_key_tag == before


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, AssertionError])
def test_a_device_that_cannot_say_what_it_is(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch.musa, "get_device_properties", fail)
    assert cache_key._probe("musa").part.startswith(f"fxpatch/musa/model unknown ({error.__name__})/")


@pytest.mark.parametrize(("question", "answer"), [("_is_in_bad_fork", True), ("is_initialized", False)])
def test_a_device_that_is_not_in_use_is_not_asked(monkeypatch: pytest.MonkeyPatch, question: str, answer: bool) -> None:
    """Asking would initialize it, in a process that may want to fork."""
    monkeypatch.setattr(torch.musa, "get_device_properties", lambda *_: pytest.fail("it was asked"))
    monkeypatch.setattr(torch.musa, question, lambda: answer, raising=False)
    assert cache_key._probe("musa").part.startswith("fxpatch/musa/model unknown/")
