"""Whether an operator's fake kernel says what its real kernel does.

    from fxpatch.testing import FakeKernelTests

    class TestMyOperators(FakeKernelTests):
        def samples(self, device):
            yield torch.ops.mine.rotate, (torch.randn(4, 8, device=device),), {"angle": 0.5}

A compiled program is made from what the fake says: where it is wrong about a shape, a stride or a dtype, memory is read
the wrong way; where an operator writes to what it does not declare, the call is reordered or deleted. Both are silent.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fake_kernels.agreement import bytes_of, result_disagreements, sharing, storage, tensors_in, written_as_declared

Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


class FakeKernelTests:
    """Each test runs once for each of `samples`."""

    def samples(self, device: str) -> Iterable[Sample]:
        """Calls to test: an operator (`torch.ops.ns.name`, an overload of it, or a `torch.library.custom_op`), its
        arguments, its keyword arguments.

        Args:
            device: where to make the tensors. While pytest collects the tests this is "meta", to count and name them:
                no operator is called then.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define samples(self, device)")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "call" in metafunc.fixturenames:
            names = [_overload(op).name() for op, _, _ in self.samples("meta")]
            metafunc.parametrize("call", range(len(names)), ids=names, indirect=True)

    @pytest.fixture
    def device(self, accelerator: str) -> str:
        """The device type under test."""
        return accelerator

    @pytest.fixture
    def call(self, request: pytest.FixtureRequest, device: str) -> Sample:
        """One sample, made anew for each test: a kernel may have written to the last one."""
        torch.manual_seed(0)
        op, args, kwargs = list(self.samples(device))[request.param]
        return _overload(op), args, kwargs

    def test_there_is_a_fake_kernel(self, call: Sample) -> None:
        op, args, kwargs = call
        try:
            _fake(op, args, kwargs)
        except (NotImplementedError, torch._subclasses.fake_tensor.UnsupportedOperatorException) as error:
            raise AssertionError(
                f"{op} has no fake kernel, so torch.compile stops at it: register one with "
                f"torch.library.register_fake({op.name()!r})"
            ) from error

    def test_results_are_what_the_fake_kernel_says(self, call: Sample) -> None:
        """Their number, shapes, strides, dtypes and devices."""
        op, args, kwargs = call
        wrong = result_disagreements(_fake(op, args, kwargs)[0], op(*args, **kwargs))
        assert not wrong, f"{op}: {'; '.join(wrong)}"

    def test_results_share_memory_as_declared(self, call: Sample) -> None:
        """Which result is which argument's memory: as the schema has it, and as the fake kernel does."""
        op, args, kwargs = call
        fake_results, fake_inputs = _fake(op, args, kwargs)
        told = sharing(fake_results, fake_inputs)
        results = op(*args, **kwargs)
        found = sharing(results, (args, kwargs))
        assert told == found, f"{op}: results share memory with {found}, and in the fake kernel with {told}"
        declared = any(returned.alias_info is not None for returned in op._schema.returns)
        assert declared or not any(found), f"{op} returns memory of its arguments, and its schema does not say so"

    def test_only_what_is_declared_is_written(self, call: Sample) -> None:
        op, args, kwargs = call
        declared = written_as_declared(op._schema, args, kwargs)
        tensors = tensors_in((args, kwargs))
        before = [bytes_of(tensor) for tensor in tensors]
        op(*args, **kwargs)
        for number, (tensor, then) in enumerate(zip(tensors, before, strict=True)):
            written = not torch.equal(bytes_of(tensor), then)
            assert not written or storage(tensor) in declared, (
                f"{op} writes to its tensor argument {number}, which {op._schema} does not declare: compiled code may "
                "delete or reorder the call. Declare it (Tensor(a!)), or shadow the operator: fake_kernels.shadow(op, "
                "mutates_args=(...))"
            )

    def test_opcheck(self, call: Sample) -> None:
        """torch's own checks of an operator, which compile it among other things."""
        op, args, kwargs = call
        checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        devices = {t.device.type for t in tensors_in((args, kwargs))}
        if devices <= {"cpu", "cuda", "xpu"}:  # torch implements it for no others
            checks.append("test_autograd_registration")
        torch.library.opcheck(op, args, kwargs, test_utils=checks)


def _overload(op: Any) -> torch._ops.OpOverload:
    if isinstance(op, CustomOpDef):
        op = op._opoverload
    if isinstance(op, torch._ops.OpOverloadPacket):
        names = op.overloads()
        if len(names) != 1:
            raise TypeError(f"{op} has the overloads {', '.join(names)}: name one, as in {op}.{names[0]}")
        op = getattr(op, names[0])
    if not isinstance(op, torch._ops.OpOverload):
        raise TypeError(f"samples() yields operators such as torch.ops.aten.add.Tensor; {op!r} is none")
    return op


def _fake(op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What `op` gives for fake tensors, and those; sizes that depend on data are symbols."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        convert = functools.partial(mode.from_tensor, static_shapes=True)
        inputs = pytree.tree_map_only(torch.Tensor, convert, (args, kwargs))
        return op(*inputs[0], **inputs[1]), inputs
