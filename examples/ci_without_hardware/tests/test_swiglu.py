"""The operator and the module: against the CPU, compiled, captured, and on whatever Hypothesis comes up with."""

import copy

import torch
from acme_kernels import SwiGLU, swiglu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxpatch.testing.strategies import dtypes, shapes, tensors


def test_the_module_compiled(compiled):
    """Values, dtypes, strides and all gradients are the CPU's."""
    compiled(SwiGLU(16, 32)).check(torch.randn(4, 16, requires_grad=True))


def test_the_operator_is_not_traced_into(compiled, accelerator):
    x = torch.randn(3, 8, device=accelerator)
    torch.testing.assert_close(compiled(lambda x: swiglu(x) + 1)(x), swiglu(x) + 1)


# the fixture is the same device for every example
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=tensors(shapes=shapes(min_dims=1).map(lambda shape: (*shape[:-1], 2 * shape[-1])), dtypes=dtypes()))
def test_every_shape_and_layout(accelerator, x):
    """Empty, transposed, expanded, in the middle of its storage: the device gives what the formula gives."""
    half = x.shape[-1] // 2
    want = torch.nn.functional.silu(x[..., :half]) * x[..., half:]
    torch.testing.assert_close(swiglu(x.to(accelerator)).cpu(), want)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_decode_step_replays(accelerator, rows, seed):
    """What an inference engine does: capture once, copy inputs in, replay, read outputs."""
    torch.manual_seed(seed)
    device = torch.get_device_module(accelerator)
    reference = SwiGLU(8, 16)
    model = copy.deepcopy(reference).to(accelerator)
    static = torch.zeros(rows, 8, device=accelerator)
    with torch.no_grad():
        model(static)  # warm up
        graph = device.ACMEGraph()
        with device.graph(graph):
            out = model(static)
        for _ in range(2):
            x = torch.randn(rows, 8)
            static.copy_(x)
            graph.replay()
            torch.testing.assert_close(out.cpu(), reference(x))
