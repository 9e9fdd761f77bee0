"""Vendor operators on the simulated device: declared as the vendor does, computed by plain torch, and taken back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from fake_kernels.declare import _held, declare
from fake_kernels.errors import (
    FakeKernelError,
    OperatorNameError,
    RegisteredTwiceError,
    SchemaError,
    UnknownOperatorError,
)
from fake_kernels.schemas import find, load, names

SILU_AND_MUL = "declare_test::silu_and_mul(Tensor! out, Tensor input) -> ()"
SWIGLU = "declare_test::swiglu(Tensor input) -> Tensor"


def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    half = input.shape[-1] // 2
    out.copy_(silu(input[..., :half]) * input[..., half:])


def swiglu(input: torch.Tensor) -> torch.Tensor:
    half = input.shape[-1] // 2
    return silu(input[..., :half]) * input[..., half:]


def halved(input: torch.Tensor) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))


def ops() -> Any:
    return torch.ops.declare_test


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    left = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(("declare_test", "sgl_kernel"))]
    assert left == []


def test_a_call_computes_and_writes_on_the_device(musa: str) -> None:
    x = torch.randn(3, 8)
    kinds: list[str] = []

    def kernel(out: torch.Tensor, input: torch.Tensor) -> None:
        kinds.append(f"{out.device.type} {input.device.type}")
        silu_and_mul(out, input)

    with declare([SILU_AND_MUL], {"declare_test::silu_and_mul": kernel}):
        out = torch.empty(3, 4, device=musa)
        address = out.data_ptr()
        assert ops().silu_and_mul(out, x.to(musa)) is None
    torch.testing.assert_close(out.cpu(), swiglu(x))
    assert out.data_ptr() == address
    assert kinds == ["musa musa"]


def test_declared_mutation_is_kept_by_compiled_code_and_runs_once_a_call(musa: str) -> None:
    runs = 0

    def kernel(out: torch.Tensor, input: torch.Tensor) -> None:
        nonlocal runs
        runs += 1
        silu_and_mul(out, input)

    def model(out: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        ops().silu_and_mul(out, input)
        return out + 1

    with declare([SILU_AND_MUL], {"declare_test::silu_and_mul": kernel}):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for rows in (3, 3, 5):
            x, out = torch.randn(rows, 8), torch.zeros(rows, 4, device=musa)
            torch.testing.assert_close(compiled(out, x.to(musa)).cpu(), swiglu(x) + 1)
            torch.testing.assert_close(out.cpu(), swiglu(x))
    assert runs == 3


def test_a_functional_operator_compiles_with_a_fake_and_not_without(musa: str) -> None:
    x = torch.randn(2, 3, 8)
    with declare([SWIGLU], {"declare_test::swiglu": swiglu}):
        compiled = torch.compile(lambda x: ops().swiglu(x) * 2, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=r"declare_test\.swiglu"):
            compiled(x.to(musa))
        with torch.library._scoped_library("declare_test", "FRAGMENT") as library:
            torch.library.register_fake("declare_test::swiglu", halved, lib=library)
            torch._dynamo.reset()
            torch.testing.assert_close(compiled(x.to(musa)).cpu(), swiglu(x) * 2)


def test_a_hidden_mutation_stays_hidden(musa: str) -> None:
    """The schema is the vendor's, so the operator has the vendor's bug: this is what has to be reproducible."""
    found = find("sgl_kernel::sgl_per_token_quant_fp8", "sgl_kernel_musa")
    assert found is not None
    _, schema = found
    with declare([schema]):
        overload = torch.ops.sgl_kernel.sgl_per_token_quant_fp8.default
        assert not overload._schema.is_mutable
        assert not overload._schema.returns


def test_an_aten_operator_of_a_vendor(musa: str) -> None:
    found = find("aten::_fused_swiglu_forward")
    assert found is not None
    _, schema = found
    x = torch.randn(4, 6)
    with declare([schema], {"aten::_fused_swiglu_forward": swiglu}) as declared:
        assert declared.operators == ("aten::_fused_swiglu_forward",)
        torch.testing.assert_close(torch.ops.aten._fused_swiglu_forward(x.to(musa)).cpu(), swiglu(x))
    assert not hasattr(torch.ops.aten, "_fused_swiglu_forward")
    torch.testing.assert_close(torch.ops.aten.add.Tensor(x, x), x + x)  # the rest of aten is there


@pytest.mark.parametrize("name", [name for name in names() if name != "torch_musa_2ff04547"])
def test_every_file_can_be_declared_and_taken_back(name: str) -> None:
    before = set(torch._C._dispatch_get_all_op_names())
    data = load(name)
    with declare(data.schemas) as declared:
        assert set(declared.operators) | set(declared.present) == set(data.operators)
        assert set(torch._C._dispatch_get_all_op_names()) - before == set(declared.operators)
    assert set(torch._C._dispatch_get_all_op_names()) == before


def test_what_torch_has_now_by_another_schema_is_refused() -> None:
    """The first torch_musa had an `aten::rms_norm` of its own; torch has one since, and it takes symbolic sizes."""
    schemas = load("torch_musa_2ff04547").schemas
    with pytest.raises(SchemaError, match=r"aten::rms_norm is registered with another schema") as error:
        declare(schemas)
    assert "seen: aten::rms_norm(Tensor input, SymInt[] normalized_shape, " in str(error.value)
    assert not hasattr(torch.ops.aten, "_fused_rmsnorm_forward")
    with declare(schema for schema in schemas if not schema.startswith("aten::rms_norm(")) as declared:
        assert len(declared.operators) == 16


def test_the_newest_torch_musa_after_an_older_one(musa: str) -> None:
    """Another schema of the same operator: an error while the first is declared, and fine afterwards."""
    operator = "aten::_scaled_dot_product_attention_flash_musa"
    older, newest = find(operator, "torch_musa_14ed48bb"), find(operator, "torch_musa")
    assert older is not None
    assert newest is not None
    with declare([older[1]]):
        assert len(torch.ops.aten._scaled_dot_product_attention_flash_musa.default._schema.returns) == 3
        with pytest.raises(SchemaError, match="is registered with another schema"):
            declare([newest[1]])
    with declare([newest[1]]):
        assert len(torch.ops.aten._scaled_dot_product_attention_flash_musa.default._schema.returns) == 4


def test_redefinition_with_another_schema_and_kernel(musa: str) -> None:
    x = torch.randn(2, 4)

    def model(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        ops().scale(out, x)
        return out

    for by in (2, 3):
        schema = "declare_test::scale(Tensor! out, Tensor x" + (", int unused=0" if by == 3 else "") + ") -> ()"

        def kernel(out: torch.Tensor, x: torch.Tensor, unused: int = 0, by: int = by) -> None:
            out.copy_(x * by)

        torch._dynamo.reset()
        with declare([schema], {"declare_test::scale": kernel}):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x.to(musa)).cpu(), x * by)
    with pytest.raises(AttributeError):
        ops().scale(x, x)


def test_what_is_there_already_is_left_alone() -> None:
    with declare([SWIGLU], {"declare_test::swiglu": swiglu}, key="CPU") as first:
        x = torch.randn(2, 6)
        with declare([SWIGLU, SILU_AND_MUL]) as second:
            assert (first.operators, first.present) == (("declare_test::swiglu",), ())
            assert (second.operators, second.present) == (("declare_test::silu_and_mul",), ("declare_test::swiglu",))
        torch.testing.assert_close(ops().swiglu(x), swiglu(x))  # the second took back only its own
        assert declare(["aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor"]).operators == ()


def test_an_operator_that_is_there_without_a_kernel_can_be_given_one() -> None:
    x = torch.randn(2, 6)
    with declare([SWIGLU]):
        with declare([SWIGLU], {"declare_test::swiglu": swiglu}, key="CPU"):
            torch.testing.assert_close(ops().swiglu(x), swiglu(x))
        with pytest.raises(NotImplementedError):
            ops().swiglu(x)


def test_overloads() -> None:
    wide = "declare_test::swiglu.wide(Tensor input, int by) -> Tensor"
    x = torch.randn(2, 6)
    given = {"declare_test::swiglu.default": swiglu, "declare_test::swiglu.wide": lambda input, by: swiglu(input) * by}
    with declare([SWIGLU, wide], given, key="CPU"):
        torch.testing.assert_close(ops().swiglu(x), swiglu(x))
        torch.testing.assert_close(ops().swiglu.wide(x, 3), swiglu(x) * 3)


def test_the_same_schema_twice_counts_once() -> None:
    with declare([SWIGLU, SWIGLU]) as declared:
        assert declared.operators == ("declare_test::swiglu",)


def test_remove_twice_and_after_an_error() -> None:
    declared = declare([SWIGLU])
    declared.remove()
    declared.remove()
    with pytest.raises(ZeroDivisionError), declare([SWIGLU]):
        raise ZeroDivisionError
    assert not hasattr(ops(), "swiglu")


def refused(error: type[FakeKernelError], *parts: str, **given: Any) -> None:
    with pytest.raises(error) as raised:
        declare(**given)
    for part in parts:
        assert part in str(raised.value)


def test_nothing_is_defined_where_anything_is_wrong() -> None:
    other = "declare_test::swiglu(Tensor input, int dim=-1) -> Tensor"
    refused(
        SchemaError,
        "cannot be parsed",
        "seen: 'declare_test::swiglu(Tensr",
        schemas=[SILU_AND_MUL, "declare_test::swiglu(Tensr x) -> x y"],
    )
    refused(SchemaError, "has no namespace", schemas=[SILU_AND_MUL, "swiglu(Tensor input) -> Tensor"])
    refused(SchemaError, "Two schemas are given for declare_test::swiglu", other, SWIGLU, schemas=[SWIGLU, other])
    refused(
        SchemaError,
        "aten::add.Tensor is registered with another schema",
        "seen: aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
        "expected: aten::add.Tensor(Tensor x) -> Tensor",
        schemas=[SILU_AND_MUL, "aten::add.Tensor(Tensor x) -> Tensor"],
    )
    refused(
        UnknownOperatorError,
        "There is an implementation for declare_test::glu, and no schema",
        "expected: one of declare_test::swiglu",
        schemas=[SWIGLU],
        implementations={"declare_test::glu": swiglu},
    )
    refused(OperatorNameError, "swiglu", schemas=[SWIGLU], implementations={"swiglu": swiglu})
    with declare([SWIGLU], {"declare_test::swiglu": swiglu}, key="CPU"):
        refused(
            RegisteredTwiceError,
            "declare_test::swiglu has a kernel for CPU already",
            "seen: a second one, swiglu",
            schemas=[SILU_AND_MUL, SWIGLU],
            implementations={"declare_test::swiglu": swiglu},
            key="CPU",
        )
    assert not hasattr(ops(), "silu_and_mul")


def test_a_failure_half_way_takes_everything_back() -> None:
    with pytest.raises(RuntimeError):
        declare([SWIGLU], {"declare_test::swiglu": swiglu}, key="NoSuchKey")
    assert not hasattr(ops(), "swiglu")


def test_a_declaration_that_nobody_holds_stays() -> None:
    declare([SWIGLU])
    gc.collect()
    assert hasattr(ops(), "swiglu")
    (held,) = _held
    held.remove()
    assert not _held


def test_a_captured_graph_replays_it(musa: str) -> None:
    """What an implementation launches is recorded launch by launch, as a vendor's kernel is."""
    device: Any = torch.musa  # type: ignore[attr-defined]
    x, out = torch.zeros(2, 6, device=musa), torch.zeros(2, 3, device=musa)
    with declare([SILU_AND_MUL], {"declare_test::silu_and_mul": silu_and_mul}):
        graph = device.MUSAGraph()
        with device.graph(graph):
            ops().silu_and_mul(out, x)
        fresh = torch.randn(2, 6)
        x.copy_(fresh)
        graph.replay()
    torch.testing.assert_close(out.cpu(), swiglu(fresh))
