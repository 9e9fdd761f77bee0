"""A fake kernel is registered where the operator exists, has none, fits and hides nothing; later if need be; and can
be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_kernels import (
    AlreadyHad,
    Deferred,
    FakeKernel,
    RefusedHidden,
    Registered,
    Registry,
    SchemaDiffers,
    Skipped,
    UserFake,
    adapter,
    register_fake_if_exists,
)
from fake_kernels.errors import (
    FakeReadsDataError,
    FakeResultsError,
    OperatorNameError,
    RegisteredTwiceError,
    SchemaError,
    SignatureError,
)
from fake_kernels.kernel import parse
from fake_kernels.registry import Wanted
from fake_kernels.same_schema import same_schema
from fake_kernels.user import USERS


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    library = torch.library.Library("fake_test", "DEF")
    yield library
    library._destroy()


@pytest.fixture
def wanted() -> Iterator[Callable[..., UserFake]]:
    """`register_fake_if_exists(op, **options)(fn)`, removed after the test."""
    made: list[UserFake] = []

    def register(op: str, fn: Callable[..., Any], **options: Any) -> UserFake:
        made.append(register_fake_if_exists(op, **options)(fn))
        return made[-1]

    yield register
    for each in made:
        each.remove()


def halve(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def record(schema: str, fn: Callable[..., Any] = halve, **more: Any) -> FakeKernel:
    return FakeKernel(
        schema, fn, reference=fn, source="a test", library="fake_vendor", arguments=lambda d: ((), {}), **more
    )


def defined(library: torch.library.Library, name: str = "halve") -> Any:
    library.define(f"{name}(Tensor x) -> Tensor")
    library.impl(name, lambda x: x[..., : x.shape[-1] // 2].clone(), "CPU")
    return getattr(torch.ops.fake_test, name)


def shape_of(op: Any, *shape: int) -> tuple[int, ...]:
    return tuple(op(torch.empty(shape, device="meta")).shape)


def test_it_traces_while_registered_and_not_afterwards(library: Any, wanted: Any) -> None:
    halves = defined(library)
    x = torch.randn(4, 6)
    compiled = torch.compile(lambda x: halves(x) + 1, backend="aot_eager", fullgraph=True)
    fake = wanted("fake_test::halve", halve)
    assert isinstance(fake.outcome, Registered)
    assert fake(x).shape == (4, 3), "the function can still be called"
    torch.testing.assert_close(compiled(x), x[:, :3] + 1)
    fake.remove()
    assert fake.outcome is None
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"fake_test\.halve"):
        compiled(x)


def test_an_overload_is_found_by_its_name(library: Any, wanted: Any) -> None:
    library.define("halve.wide(Tensor x, int n) -> Tensor")
    assert isinstance(wanted("fake_test::halve", halve).outcome, Deferred), "there is no default overload"
    fake = wanted("fake_test::halve.wide", lambda x, n: halve(x))
    assert isinstance(fake.outcome, Registered)
    assert torch.ops.fake_test.halve.wide(torch.empty(2, 4, device="meta"), 1).shape == (2, 2)


def test_an_absent_operator_is_deferred_and_registered_when_it_comes(wanted: Any) -> None:
    fake = wanted("fake_test::late", halve, library="fake_vendor")
    assert fake.outcome == Deferred(
        "fake_test::late",
        "fake_vendor",
        "fake_test::late is not registered: waits for fake_vendor, and asks at each compilation",
    )
    library = torch.library.Library("fake_test", "DEF")
    late = defined(library, "late")
    USERS.settle()
    assert isinstance(fake.outcome, Registered)
    assert shape_of(late, 2, 4) == (2, 2)
    library._destroy()  # the vendor's library goes, as it does in tests, and comes back
    USERS.settle()
    assert isinstance(fake.outcome, Deferred)
    library = torch.library.Library("fake_test", "DEF")
    late = defined(library, "late")
    USERS.settle()
    assert isinstance(fake.outcome, Registered)
    assert shape_of(late, 2, 4) == (2, 2)
    library._destroy()


@pytest.mark.parametrize(("op", "module"), [("npu::none", "torch_npu"), ("atb::none", "torch_npu"), ("x::none", "x")])
def test_the_library_is_known_by_the_namespace(wanted: Any, op: str, module: str) -> None:
    assert wanted(op, halve).outcome.module == module


def test_a_fake_that_is_there_is_left_alone_unless_it_is_to_be_replaced(library: Any, wanted: Any) -> None:
    """torch 2.13's own default would replace it; and what was replaced comes back."""
    halves = defined(library)
    torch.library.register_fake("fake_test::halve", lambda x: x.new_empty(7), lib=library)
    left = wanted("fake_test::halve", halve)
    assert isinstance(left.outcome, AlreadyHad)
    assert "fake_test::halve has a fake kernel from" in left.outcome.reason
    assert shape_of(halves, 2, 4) == (7,)
    left.remove()
    fake = wanted("fake_test::halve", halve, policy="override")
    assert isinstance(fake.outcome, Registered)
    assert "fake_test::halve has a fake kernel from" in fake.outcome.replaced
    assert shape_of(halves, 2, 4) == (2, 2)
    fake.remove()
    assert shape_of(halves, 2, 4) == (7,)


def test_a_meta_kernel_is_replaced_for_fake_tensors_and_comes_back(library: Any) -> None:
    """torch_npu's fakes are Meta kernels from Python."""
    halves = defined(library)
    library.impl("halve", lambda x: x.new_empty(7), "Meta")
    registry = Registry([record("fake_test::halve(Tensor x) -> Tensor")], override=["fake_test::halve"])
    assert registry.settle()["fake_test::halve"].replaced == "fake_test::halve has a kernel for Meta"  # type: ignore[union-attr]
    with torch._subclasses.FakeTensorMode():
        assert halves(torch.empty(2, 4)).shape == (2, 2)
    assert shape_of(halves, 2, 4) == (7,), "of meta tensors, the Meta kernel is asked"
    registry.undo()
    assert shape_of(halves, 2, 4) == (7,)
    with torch._subclasses.FakeTensorMode():
        assert halves(torch.empty(2, 4)).shape == (7,)


@pytest.mark.parametrize("operator", ["aten::mm", "aten::add.Tensor"])
def test_torchs_own_operators_need_none(wanted: Any, operator: str) -> None:
    signature = {"aten::mm": lambda self, mat2: self, "aten::add.Tensor": lambda self, other, *, alpha=1: self}
    outcome = wanted(operator, signature[operator]).outcome
    assert isinstance(outcome, AlreadyHad)
    assert "has a kernel for" in outcome.reason


def test_what_decomposes_is_skipped(wanted: Any) -> None:
    """A fake kernel for it would register, and never be asked."""
    outcome = wanted("aten::matmul", lambda self, other: self).outcome
    assert isinstance(outcome, Skipped)
    assert "it decomposes" in outcome.reason


def test_a_hidden_mutation_is_refused(library: Any, wanted: Any) -> None:
    """The silent bug: with a trivial fake, the call that fills `out` is deleted from compiled code."""
    library.define("fill(Tensor x, Tensor out) -> ()")
    library.impl("fill", lambda x, out: out.copy_(x * 2) and None, "CPU")
    for policy in ("if_missing", "override"):
        fake = wanted("fake_test::fill", lambda x, out: None, policy=policy)
        assert isinstance(fake.outcome, RefusedHidden)
        assert "returns nothing and declares no mutation" in fake.outcome.reason
        assert "Say what it writes: fake_kernels.shadow(op, mutates_args=(...))" in fake.outcome.reason
        fake.remove()


def test_a_declared_mutation_needs_none_and_a_record_checks_its_arguments(library: Any, wanted: Any) -> None:
    library.define("fill(Tensor x, Tensor(a!) out) -> ()")
    outcome = wanted("fake_test::fill", lambda x, out: None).outcome
    assert isinstance(outcome, AlreadyHad)
    assert "torch makes its fake kernel" in outcome.reason

    def check(x: torch.Tensor, out: torch.Tensor) -> None:
        torch._check(x.shape == out.shape, lambda: "x and out differ")

    registry = Registry([record("fake_test::fill(Tensor x, Tensor(a!) out) -> ()", check)])
    assert isinstance(registry.settle()["fake_test::fill"], Registered)
    with pytest.raises(RuntimeError, match="x and out differ"):
        torch.ops.fake_test.fill(torch.empty(2, device="meta"), torch.empty(3, device="meta"))
    registry.undo()
    with torch._subclasses.FakeTensorMode():
        torch.ops.fake_test.fill(torch.empty(2), torch.empty(3))


def test_another_schema_is_refused_with_both(library: Any) -> None:
    library.define("halve(Tensor x, int dim=-1) -> Tensor")
    registry = Registry([record("fake_test::halve(Tensor x) -> Tensor")])
    outcome = registry.settle()["fake_test::halve"]
    assert outcome == SchemaDiffers(
        "fake_test::halve",
        "fake_test::halve(Tensor x, int dim=-1) -> Tensor",
        "fake_test::halve(Tensor x) -> Tensor",
    )
    assert outcome.reason == (
        "registered is fake_test::halve(Tensor x, int dim=-1) -> Tensor, "
        "and the fake kernel is for fake_test::halve(Tensor x) -> Tensor"
    )


def test_a_function_that_does_not_fit_is_refused_with_its_signature(library: Any, wanted: Any) -> None:
    library.define("halve(Tensor x, int dim=-1) -> Tensor")
    outcome = wanted("fake_test::halve", lambda x, dim: x).outcome
    assert isinstance(outcome, SchemaDiffers)
    assert outcome.expected == "a fake kernel that is <lambda>(x, dim)"


def test_of_several_versions_the_one_that_is_there_is_taken(library: Any) -> None:
    library.define("halve(Tensor x, int dim=-1) -> Tensor")
    old = record("fake_test::halve(Tensor x) -> Tensor")
    new = record("fake_test::halve(Tensor x, int dim=-1) -> Tensor", lambda x, dim=-1: halve(x))
    for order in ([old, new], [new, old]):
        registry = Registry(order)
        assert isinstance(registry.settle()["fake_test::halve"], Registered)
        assert shape_of(torch.ops.fake_test.halve, 2, 4) == (2, 2)
        registry.undo()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a::b(Tensor(a!) x, Tensor(b!) y) -> ()", "a::b(Tensor(c!) x, Tensor(d!) y) -> ()", True),
        ("a::b(Tensor! x) -> ()", "a::b(Tensor(z!) x) -> ()", True),
        ("a::b(Tensor(a!) x) -> Tensor(a!)", "a::b(Tensor(q!) x) -> Tensor(q!)", True),
        ("a::b(float e=1e-06) -> ()", "a::b(float e=0.000001) -> ()", True),
        ("a::b(Tensor(a!) x) -> Tensor(a!)", "a::b(Tensor(a!) x) -> Tensor", False),
        ("a::b(Tensor(a!) x) -> ()", "a::b(Tensor x) -> ()", False),
        ("a::b(Tensor x, int d=1) -> ()", "a::b(Tensor x, int d=2) -> ()", False),
        ("a::b(Tensor x, int d=1) -> ()", "a::b(Tensor x, int d) -> ()", False),
        ("a::b(Tensor x, int d) -> ()", "a::b(Tensor x, *, int d) -> ()", False),
        ("a::b(SymInt d) -> ()", "a::b(int d) -> ()", False),
        ("a::b(Tensor x) -> ()", "a::b(Tensor y) -> ()", False),
        ("a::b.c(Tensor x) -> ()", "a::b(Tensor x) -> ()", False),
    ],
)
def test_schemas_are_compared_by_what_they_mean(one: str, other: str, same: bool) -> None:
    assert same_schema(parse(one), parse(other)) is same
    assert same_schema(parse(other), parse(one)) is same


@given(
    steps=st.lists(st.sampled_from(["define", "drop", "settle", "undo"]), max_size=12),
    theirs=st.booleans(),
)
def test_in_any_order_what_is_registered_is_what_the_outcome_says(steps: list[str], theirs: bool) -> None:
    """A model of one operator: there or not, ours or theirs or none; after every settling it holds."""
    registry = Registry([record("fake_steps::halve(Tensor x) -> Tensor")])
    vendor: torch.library.Library | None = None
    try:
        for step in [*steps, "settle"]:
            if step == "define" and vendor is None:
                vendor = torch.library.Library("fake_steps", "DEF")
                vendor.define("halve(Tensor x) -> Tensor")
                if theirs:
                    vendor.impl("halve", lambda x: x.new_empty(7), "Meta", allow_override=True)
            elif step == "drop" and vendor is not None:
                registry.settle()
                vendor._destroy()
                vendor = None
            elif step == "undo":
                registry.undo()
                assert registry.outcomes == {}
            elif step == "settle":
                outcome = registry.settle()["fake_steps::halve"]
                if vendor is None:
                    assert isinstance(outcome, Deferred)
                else:
                    assert isinstance(outcome, AlreadyHad if theirs else Registered)
                    assert shape_of(torch.ops.fake_steps.halve, 2, 4) == ((7,) if theirs else (2, 2))
    finally:
        registry.undo()
        if vendor is not None:
            vendor._destroy()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["halve", "fake_test.halve", "::halve", "a::b c", "a::", "", "a::b.c.d", "a::é"])
def test_a_malformed_name(operator: str) -> None:
    with pytest.raises(OperatorNameError, match=r"expected: 'namespace::name' or 'namespace::name\.overload'"):
        register_fake_if_exists(operator)


def test_twice_for_one_operator(library: Any, wanted: Any) -> None:
    defined(library)
    wanted("fake_test::halve", halve)
    with pytest.raises(
        RegisteredTwiceError, match=r"fake_test::halve.* has a fake kernel here already.\n  seen: halve \("
    ):
        register_fake_if_exists("fake_test::halve.default")(halve)
    registry = Registry()
    registry.want(Wanted("a::b", halve, "a"))
    with pytest.raises(RegisteredTwiceError, match="to do: remove one of the two"):
        registry.want(Wanted("a::b", halve, "a"))


@pytest.mark.parametrize(
    ("schema", "error", "match"),
    [
        (
            "fake_test::halve(Tensor x -> Tensor",
            SchemaError,
            "This schema cannot be parsed.\n  seen: 'fake_test::halve",
        ),
        ("halve(Tensor x) -> Tensor", SchemaError, "This schema has no namespace"),
        ("a::b(Tensor y) -> Tensor", SignatureError, r"seen: halve\(x\)\n  expected: \(y\)"),
        ("a::b(Tensor x, int n=3) -> Tensor", SignatureError, r"seen: halve\(x\)\n  expected: \(x, n=3\)"),
        ("a::b(*, Tensor x) -> Tensor", SignatureError, r"expected: \(\*, x\)"),
    ],
)
def test_a_record_with_a_wrong_schema_cannot_be_made(schema: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        record(schema)


def test_a_record_of_arguments_that_are_not_there_cannot_be_made() -> None:
    with pytest.raises(SignatureError, match="seen: y, z\n  expected: some of x"):
        record("a::b(Tensor x) -> Tensor", writes=("y",), returns_arguments={0: "z"})


def test_a_fake_with_a_wrong_number_of_results(library: Any, wanted: Any) -> None:
    halves = defined(library)
    wanted("fake_test::halve", lambda x: (halve(x), halve(x)))
    with pytest.raises(
        FakeResultsError, match=r"seen: 2 from .*<lambda>.*\n  expected: 1: fake_test::halve\(Tensor x\)"
    ):
        halves(torch.empty(4, device="meta"))


def test_a_fake_that_reads_data(library: Any, wanted: Any) -> None:
    halves = defined(library)
    wanted("fake_test::halve", lambda x: x.new_empty(int(x.sum().item())))
    with torch._subclasses.FakeTensorMode():
        with pytest.raises(FakeReadsDataError, match=r"seen: .*calls aten\._local_scalar_dense.*\n  expected: shapes"):
            halves(torch.empty(4))


def test_a_torch_that_has_moved(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = defined(library)
    registry = Registry([record("fake_test::halve(Tensor x) -> Tensor")])
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_NAMES", ("_library.gone",))
        with pytest.raises(RuntimeError, match=r"no torch\._library\.gone\n  expected: it, as in torch 2.11 to 2.15"):
            registry.settle()
    with pytest.raises(NotImplementedError):
        shape_of(halves, 2, 4)
