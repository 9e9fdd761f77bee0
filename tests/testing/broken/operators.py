"""Operators whose fake kernels, or schemas, are wrong, one way each. Collected by test_suites_can_fail.py only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxpatch.testing import FakeKernelTests

library = torch.library.Library("broken", "DEF")


def operator(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any] | None) -> Any:
    """Defines `broken::<schema>` with a real kernel for every device, and a fake one."""
    name = schema.partition("(")[0]
    library.define(schema)
    for key in ("CPU", "PrivateUse1"):
        library.impl(name, kernel, key)
    if fake is not None:
        torch.library.register_fake(f"broken::{name}", fake, lib=library)
    return getattr(torch.ops.broken, name)


class OneOperator(FakeKernelTests):
    """Mostly without torch's own checks, which take seconds each."""

    op: Any
    test_opcheck = None

    def samples(self, device: str) -> Iterable[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        yield self.op, (torch.ones(4, 6, device=device),), {}


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class TestNoFake(OneOperator):
    op = operator("no_fake(Tensor x) -> Tensor", doubled, None)


class TestDtype(OneOperator):
    op = operator("dtype(Tensor x) -> Tensor", doubled, lambda x: torch.empty_like(x, dtype=torch.float16))


class TestShape(OneOperator):
    op = operator("shape(Tensor x) -> Tensor", doubled, lambda x: x.new_empty(4, 7))


class TestStrides(OneOperator):
    op = operator("strides(Tensor x) -> Tensor", doubled, lambda x: x.new_empty(6, 4).t())


class TestDevice(OneOperator):
    op = operator("device(Tensor x) -> Tensor", doubled, lambda x: torch.empty_like(x, device="cpu"))


class TestHiddenWrite(OneOperator):
    """The trivial fake that makes compiled code drop the call."""

    test_opcheck = FakeKernelTests.test_opcheck

    op = operator("hidden_write(Tensor x) -> Tensor", lambda x: x.mul_(2).clone(), torch.empty_like)


class TestHiddenAlias(OneOperator):
    op = operator("hidden_alias(Tensor x) -> Tensor", lambda x: x.view(6, 4), lambda x: x.new_empty(6, 4))


class TestFakeAliases(OneOperator):
    op = operator("fake_aliases(Tensor x) -> Tensor", lambda x: x.clone(), lambda x: x.view_as(x))


class TestTwoForOne(OneOperator):
    op = operator("two_for_one(Tensor x) -> Tensor[]", lambda x: [x * 2, x * 3], lambda x: [torch.empty_like(x)])
