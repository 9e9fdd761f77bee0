"""Whole models in a graph: captured once as they are, and replayed on other inputs, they give eager's bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import step
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import import_utils
from zoo import MODELS, Model

pytestmark = pytest.mark.slow

# grouped_mm is one kernel in bfloat16; for other dtypes torch's fallback reads offsets on the host (GroupedMMUtils.h)
DTYPES = {"Mixtral": torch.bfloat16}


@contextmanager
def transformers_asking(device: str) -> Iterator[None]:
    """transformers leaves the values of masks alone in a capture, but asks only cuda and xpu whether there is one."""
    before = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = torch.get_device_module(device).is_current_stream_capturing
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = before


class Captured:
    """A model's forward pass in a graph, warmed up on a side stream as torch.cuda's manual says."""

    def __init__(self, model: Model, device: str) -> None:
        dtype = DTYPES.get(model.name, torch.float32)
        self._net, self._field = step.build(model, device, dtype=dtype).eval(), model.output
        # a cache would move a tensor of its own from the host in the middle of the capture
        self._options = {"use_cache": False} if model.generates else {}
        self.inputs = step.inputs(model, device, dtype)
        module = torch.get_device_module(device)
        side = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            self.eager()
        module.current_stream().wait_stream(side)
        self.graph = module.MUSAGraph()
        with module.graph(self.graph):
            self.output = self.eager()

    @torch.no_grad()
    @sdpa_kernel(SDPBackend.MATH)  # in a capture, transformers passes masks that it leaves out elsewhere
    def eager(self) -> torch.Tensor:
        """The output for the inputs of now, uncaptured."""
        output: torch.Tensor = getattr(self._net(**self.inputs, **self._options), self._field)
        return output

    def replay(self) -> torch.Tensor:
        """The output for the inputs of now, from the graph."""
        self.graph.replay()
        return self.output


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_replay_follows_the_inputs(musa: str, model: Model) -> None:
    with transformers_asking(musa):
        captured = Captured(model, musa)
    assert captured.output.isnan().all()  # nothing is computed until the first replay
    seen = []
    for _ in range(2):
        torch.testing.assert_close(captured.replay(), captured.eager(), atol=0, rtol=0)
        seen.append(captured.output.clone())
        for x in captured.inputs.values():
            x.copy_(x.flip(-1))
    assert not torch.equal(*seen)


def test_transformers_that_does_not_know_of_the_capture_is_refused(musa: str) -> None:
    """As it is, it reads the padding mask on the host, which no device can do in a capture."""
    llama = next(model for model in MODELS if model.name == "Llama")
    with pytest.raises(torch.AcceleratorError, match="not permitted when stream is capturing"):
        Captured(llama, musa)
