"""The suites that come with fxpatch, on Acme's device and operators."""

from typing import Any

import torch
from acme_kernels import swiglu

from fxpatch.testing import CodegenTests, FakeKernelTests, GraphCaptureTests


class TestCodegen(CodegenTests):
    pass


class TestGraphs(GraphCaptureTests):
    pass


class TestOperators(FakeKernelTests):
    def samples(self, device: str) -> Any:
        yield swiglu, (torch.randn(4, 6, device=device),), {}
        yield swiglu, (torch.randn(2, 3, 8, device=device).transpose(0, 1),), {}
        yield swiglu, (torch.randn(4, 6, device=device, dtype=torch.bfloat16)[1:],), {}
