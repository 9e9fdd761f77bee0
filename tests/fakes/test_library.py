"""Every fake kernel of the library: against its reference, under symbolic sizes, and in compiled models on a device
whose kernels are the references."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fxpatch
from fake_kernels import FakeKernel, Registered, Registry, Shadowed
from fake_kernels.adapter import overload_of
from fake_kernels.agreement import tensors_in
from fake_kernels.conformance import check, check_call, check_symbolic
from fake_kernels.declare import declare
from fake_kernels.drawing import RandomDraw
from fake_kernels.library import MODULES, load
from fake_kernels.shadow import shadow_of
from fxpatch.testing.calls import calls, draws
from fxpatch.testing.layout import significant_strides

RECORDS = load()
FIRST = {record.op: record for record in reversed(RECORDS)}  # of each operator the newest version
OTHERS = tuple(record for record in RECORDS if FIRST[record.op] is not record)
BY_MODULE = {
    module: [record for record in group if record not in OTHERS]
    for module, group in itertools.groupby(RECORDS, key=lambda record: record.fn.__module__)
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
few = settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
on_the_device = pytest.mark.parametrize("record", FIRST.values(), ids=FIRST)
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.op)


def seed_of(record: FakeKernel) -> int:
    return zlib.crc32(record.op.encode())


def test_there_are_many_in_every_family() -> None:
    assert len(RECORDS) >= 60
    assert len({record.schema for record in RECORDS}) == len(RECORDS)
    assert set(MODULES) == set(compile_configs_families())
    assert all(load([family]) for family in MODULES)


def compile_configs_families() -> tuple[str, ...]:
    from compile_configs.profile import FAMILIES

    return FAMILIES


@each_record
def test_the_record_says_where_it_comes_from(record: FakeKernel) -> None:
    assert len(record.source) > 10
    assert record.fn.__doc__ is not None
    assert len(record.fn.__doc__.split()) >= 5


@pytest.mark.parametrize("module", BY_MODULE, ids=lambda module: module.rpartition(".")[2])
def test_the_first_of_each_module_says_what_its_reference_does(module: str) -> None:
    """The quick part of what follows."""
    check(BY_MODULE[module][0], calls=2)


@pytest.mark.slow
@each_record
def test_it_says_what_its_reference_does(record: FakeKernel) -> None:
    done = check(record, calls=6, seed=seed_of(record))
    assert done.calls == done.symbolic == 6


@pytest.mark.slow
@each_record
def test_hypothesis_finds_no_call_it_is_wrong_about(record: FakeKernel) -> None:
    @few
    @given(call=calls(record))
    def static(call: Any) -> None:
        check_call(record, call)

    @few
    @given(data=st.data())
    def symbolic(data: st.DataObject) -> None:
        check_symbolic(record, data.draw(draws(smallest=2)))

    static()
    symbolic()


# -- on a device -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device(musa: str) -> Iterator[str]:
    """The simulated device with the operators of every vendor, each computed by its reference."""
    with (
        declare([r.schema for r in FIRST.values()], {op: r.reference for op, r in FIRST.items()}),
        fxpatch.install(musa),
    ):
        registry = Registry(RECORDS)
        outcomes = registry.settle()
        taken = {op: outcome for op, outcome in outcomes.items() if not isinstance(outcome, (Registered, Shadowed))}
        # the installation has those of its own vendor and of the engines already
        assert {type(outcome).__name__ for outcome in taken.values()} <= {"AlreadyHad"}
        yield musa
        registry.undo()
    torch._dynamo.reset()


@pytest.mark.slow
@on_the_device
def test_on_a_device_it_says_what_the_kernel_does(record: FakeKernel, device: str) -> None:
    check(record, device=device, calls=2, seed=seed_of(record))


@pytest.mark.slow
@on_the_device
def test_opcheck(record: FakeKernel, device: str) -> None:
    """torch's own checks; of a shadowed operator those of its honest one."""
    op = overload_of(record.op)
    made = shadow_of(record.op)
    for number in range(2):
        args, kwargs = record.arguments(RandomDraw(seed_of(record) + number, device, smallest=1))  # no mean of nothing
        tests = ["test_faketensor", "test_aot_dispatch_dynamic"]
        if not any(t.dtype in FLOAT8 for t in tensors_in((args, kwargs))):
            tests.append("test_schema")  # it computes with the arguments, which torch cannot do in float8
        if made is None:
            torch.library.opcheck(op, args, kwargs, test_utils=tests)
        else:
            rest = [kwargs.get(a.name, a.default_value) for a in op._schema.arguments[len(args) :]]
            torch.library.opcheck(made.op, (*args, *rest), test_utils=tests)


def model_of(records: list[FakeKernel]) -> Callable[..., Any]:
    """One that calls each operator once, and computes with what comes out."""

    operators = [overload_of(record.op) for record in records]

    def model(arguments: list[Any]) -> list[Any]:
        results = []
        for operator, (args, kwargs) in zip(operators, arguments, strict=True):
            result = operator(*args, **kwargs)
            tensors = [t for t in pytree.tree_leaves((result, args, kwargs)) if isinstance(t, torch.Tensor)]
            results += [(t + 1 if t.is_floating_point() and t.element_size() > 1 else t.clone()) for t in tensors]
        return results

    return model


@pytest.mark.slow
@pytest.mark.parametrize("module", BY_MODULE, ids=lambda module: module.rpartition(".")[2])
def test_a_model_that_uses_them_compiles_whole_with_inductor(module: str, device: str) -> None:
    records = BY_MODULE[module]
    model = model_of(records)

    def arguments() -> list[Any]:
        return [record.arguments(RandomDraw(seed_of(record), device, smallest=2)) for record in records]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(arguments())
        torch.manual_seed(0)
        found = torch.compile(model, fullgraph=True)(arguments())
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert significant_strides(one) == significant_strides(other)
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)
