"""The conformance suites, on the device that this package brings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fxpatch.testing import CodegenTests, FakeKernelTests, GraphCaptureTests


@pytest.mark.slow
class TestCodegen(CodegenTests):
    pass


class TestGraphCapture(GraphCaptureTests):
    pass


class TestFakeKernels(FakeKernelTests):
    """Operators of torch's own: results with strides, of unknown size, in place, as views, and several at once."""

    def samples(self, device: str) -> Iterable[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        x = torch.randn(4, 6, device=device)
        aten = torch.ops.aten
        yield aten.relu.default, (x.t(),), {}
        yield aten.add.Tensor, (x, x[0]), {"alpha": 2}
        yield aten.mul_.Tensor, (x, 2.0), {}
        yield aten.transpose.int, (x, 0, 1), {}
        yield aten.sort.default, (x,), {"descending": True}
        yield aten.cat.default, ([x, x],), {"dim": 1}
        yield aten.nonzero.default, (x,), {}
        yield aten.native_layer_norm.default, (x, [6], None, None, 1e-5), {}
        yield aten.mm.out, (x, x.t().contiguous()), {"out": torch.empty(4, 4, device=device)}
