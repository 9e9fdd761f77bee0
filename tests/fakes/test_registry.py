"""A fake kernel is registered where the operator exists, has none, fits and hides nothing; later if need be; and can
be taken back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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
    Shadowed,
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
from fake_kernels.registry import Wanted, fingerprint
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


def test_the_library_that_is_waited_for_is_the_first_ones() -> None:
    old = record("fake_test::halve(Tensor x) -> Tensor")
    new = replace(record("fake_test::halve(Tensor x, int d) -> Tensor", lambda x, d: halve(x)), library="newer")
    assert Registry([old, new]).settle()["fake_test::halve"].module == "fake_vendor"  # type: ignore[union-attr]
    assert Registry([new, old]).settle()["fake_test::halve"].module == "newer"  # type: ignore[union-attr]


def test_what_the_caller_has_just_asked_is_not_asked_again(library: Any) -> None:
    defined(library)
    registry = Registry([record("fake_test::halve(Tensor x) -> Tensor")])
    assert isinstance(registry.settle(set())["fake_test::halve"], Deferred)
    assert isinstance(registry.settle({"fake_test::halve"})["fake_test::halve"], Registered)
    registry.undo()


def test_an_outcome_by_name_and_what_is_removed(library: Any) -> None:
    halves = defined(library)
    registry = Registry([record("fake_test::halve(Tensor x) -> Tensor"), record("fake_test::none(Tensor x) -> Tensor")])
    assert registry.outcome("fake_test::halve") is None
    registry.settle()
    assert isinstance(registry.outcome("fake_test::halve.default"), Registered)
    assert isinstance(registry.outcome("fake_test::none"), Deferred)
    registry.remove("fake_test::halve")
    with pytest.raises(NotImplementedError):
        shape_of(halves, 2, 4)
    assert registry.settle().keys() == {"fake_test::none"}
    registry.remove("fake_test::halve")


def test_only_the_operators_that_are_named_are_replaced(library: Any) -> None:
    halves = defined(library)
    torch.library.register_fake("fake_test::halve", lambda x: x.new_empty(7), lib=library)
    kernel = record("fake_test::halve(Tensor x) -> Tensor")
    for override, shape in ((["fake_test::other"], (7,)), (["fake_test::halve.default"], (2, 2))):
        registry = Registry([kernel], override=override)
        registry.settle()
        assert shape_of(halves, 2, 4) == shape
        registry.undo()


def test_what_is_in_place_is_not_registered_again_nor_kept_when_it_changes(library: Any) -> None:
    """Settling is for the start of every compilation: where nothing changed, it must not drop what tracing knows."""
    halves = defined(library)
    registry = Registry([record("fake_test::halve(Tensor x) -> Tensor")])
    first = registry.settle()["fake_test::halve"]
    holder = torch._library.simple_registry.singleton.find("fake_test::halve").fake_impl
    kernel = holder.kernel
    assert registry.settle()["fake_test::halve"] is first
    assert holder.kernel is kernel
    assert shape_of(halves, 2, 4) == (2, 2)
    registry.undo()
    registry.undo()
    assert holder.kernel is None


def test_fake_tensors_forget_what_another_fake_kernel_said(library: Any) -> None:
    """They keep the results of operators in torch's namespaces by the arguments."""
    vendor = torch.library.Library("aten", "FRAGMENT")
    vendor.define("_fake_test_halve(Tensor x) -> Tensor")
    registry = Registry([record("aten::_fake_test_halve(Tensor x) -> Tensor")])
    other = Registry([record("aten::_fake_test_halve(Tensor x) -> Tensor", lambda x: x.new_empty(7))])
    for each, shape in ((registry, (2, 2)), (other, (7,)), (registry, (2, 2))):
        each.settle()
        with torch._subclasses.FakeTensorMode():
            assert torch.ops.aten._fake_test_halve(torch.empty(2, 4)).shape == shape
        each.undo()
    vendor._destroy()


def returns_what_it_writes(library: torch.library.Library, key: str) -> Registry:
    """An operator whose schema says so, with a kernel for `key`, and a registry that wants it traced."""
    library.define("bump(Tensor(a!) x) -> Tensor(a!)")
    library.impl("bump", lambda x: x.add_(1), key)
    return Registry([record("fake_test::bump(Tensor(a!) x) -> Tensor(a!)", lambda x: x)])


def test_what_returns_what_it_writes_is_shadowed(library: Any) -> None:
    registry = returns_what_it_writes(library, "PrivateUse1")
    assert registry.settle()["fake_test::bump"] == Shadowed(
        "fake_test::bump",
        "it returns what it writes, which torch functionalizes for its own operators only: "
        "calls go through shadow::fake_test__bump_privateuse1",
    )
    registry.undo()


def test_what_returns_what_it_writes_and_has_a_derivative_is_skipped(library: Any) -> None:
    registry = returns_what_it_writes(library, "AutogradPrivateUse1")
    outcome = registry.settle()["fake_test::bump"]
    assert isinstance(outcome, Skipped)
    assert outcome.reason == (
        "fake_test::bump returns what it writes: torch does not functionalize it, and it has a derivative, which a "
        "shadow would hide. Call the variant that returns new tensors"
    )


def test_what_hides_its_writes_is_shadowed_also_with_a_derivative(library: Any) -> None:
    library.define("fill(Tensor x, Tensor out) -> ()")
    library.impl("fill", lambda x, out: out.copy_(x) and None, "PrivateUse1")
    schema = "fake_test::fill(Tensor x, Tensor out) -> ()"
    registry = Registry([record(schema, lambda x, out: None, writes=("out",))])
    assert registry.settle()["fake_test::fill"] == Shadowed(
        "fake_test::fill",
        "it writes out, and its schema does not say so: calls go through shadow::fake_test__fill_privateuse1",
    )
    assert Registry([record(schema, lambda x, out: None, writes=("out",))]).settle()["fake_test::fill"] == AlreadyHad(
        "fake_test::fill", "calls go through shadow::fake_test__fill_privateuse1 already"
    )
    registry.undo()


def test_the_fingerprint_tells_what_is_in_place(library: Any) -> None:
    """Traced graphs depend on it, and torch's cache keys leave it out."""
    defined(library)
    defined(library, "other")
    before = fingerprint()

    def of(*kernels: FakeKernel) -> str:
        registry = Registry(kernels)
        registry.settle()
        try:
            return fingerprint()
        finally:
            registry.undo()

    one, other = (record(f"fake_test::{name}(Tensor x) -> Tensor") for name in ("halve", "other"))
    changed = record("fake_test::halve(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
    found = [of(one), of(other), of(changed), of(one, other)]
    assert len({before, *found}) == 5
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in found)
    assert of(other, one) == found[3]
    assert of(one) == found[0]
    assert fingerprint() == before


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
    with pytest.raises(RegisteredTwiceError):
        registry.add([record("a::b(Tensor x) -> Tensor")])


def test_twice_for_one_schema_names_the_one_that_has_it() -> None:
    first = record("a::b(Tensor x) -> Tensor")
    second = record("a::b(Tensor x, int n) -> Tensor", lambda x, n: x)
    for records in ([first, second], [second, first]):
        registry = Registry(records)
        with pytest.raises(RegisteredTwiceError, match=r"seen: halve \(.*, and now .*<lambda> \("):
            registry.add([record("a::b(Tensor x) -> Tensor", lambda x: x)])
        registry.want(Wanted("a::b", halve, "a"))  # a user's own, for whatever schema there is


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
