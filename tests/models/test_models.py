"""Models that nobody here wrote, on the simulated device: the CPU's numbers, eagerly and compiled, in forward and in
training. `sweep.py` runs all of them under all backends and writes docs/models.md; here is what every change must keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import step
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import MODELS, Model

import fxpatch

TOLERANCE = 1e-5  # outputs are of order 1. The device runs the CPU's kernels, but not the CPU's fused attention
INDUCTOR = 5e-5  # fused loops add in another order
BFLOAT16 = 1 / 16  # four of its steps, for outputs from 2 to 4

every_model = pytest.mark.parametrize("model", MODELS, ids=str)
BY_NAME = {model.name: model for model in MODELS}


@pytest.fixture(scope="module", autouse=True)
def installed(musa: str) -> Iterator[None]:
    """fxpatch's repairs, as a user has them."""
    with fxpatch.install(musa):
        yield


@pytest.fixture
def compiling() -> Iterator[None]:
    """Dynamo without the memory of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str) -> step.Call:
    return lambda net: torch.compile(net, backend=backend, fullgraph=True)


def autocast(device: str) -> step.Call:
    return lambda net: torch.autocast(device, torch.bfloat16)(net.forward)


def assert_near(got: step.Step, want: step.Step, tolerance: float) -> None:
    far = {what: value for what, value in got.distance(want).items() if not value <= tolerance}
    assert not far, f"further than {tolerance} from the CPU's: {far}"


@every_model
def test_a_training_step_is_the_cpus(musa: str, model: Model) -> None:
    assert_near(step.train(model, musa), step.train_on_cpu(model), TOLERANCE)


@every_model
def test_the_forward_pass_is_the_cpus(musa: str, model: Model) -> None:
    assert step.distance(step.forward(model, musa), step.forward_on_cpu(model)) <= TOLERANCE


# torch itself gives the CPU fused kernels for attention, layer norm and group norm, and a device out of its tree the
# composite ones. Without norms of that kind, and with the composite attention on both, nothing is left to differ.
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 2", "Mixtral", "T5", "AutoencoderKLWan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_kernels_give_the_same_bits(musa: str, name: str, dtype: torch.dtype) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        want, got = (step.forward(BY_NAME[name], device, dtype=dtype) for device in ("cpu", musa))
    assert torch.equal(got, want)


@pytest.mark.parametrize("model", [model for model in MODELS if model.generates], ids=str)
def test_greedy_decoding_gives_the_cpus_tokens(musa: str, model: Model) -> None:
    tokens = step.generate(model, "cpu")
    assert len({token for row in tokens for token in row[-6:]}) > 1  # else a device stuck on a token would pass
    assert step.generate(model, musa) == tokens


@pytest.mark.parametrize("name", ["Llama", "BERT", "UNet2DConditionModel"])
def test_a_training_step_in_mixed_precision(musa: str, name: str) -> None:
    want, got = (step.train(BY_NAME[name], device, autocast(device)) for device in ("cpu", musa))
    assert got.output.dtype is torch.bfloat16
    assert_near(got, want, BFLOAT16)


@pytest.mark.slow
@every_model
def test_a_training_step_through_aot_autograd(musa: str, compiling: None, model: Model) -> None:
    got = step.train(model, musa, compiled("aot_eager"), layers=1)
    assert_near(got, step.train_on_cpu(model, layers=1), TOLERANCE)


# of each kind one, since g++ takes minutes for all: experts; layer norms and gelu; linear attention and convolutions
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "ViT", "SanaTransformer2DModel"])
def test_the_forward_pass_through_inductor(musa: str, compiling: None, name: str) -> None:
    model = BY_NAME[name]
    got = step.forward(model, musa, compiled("inductor"), layers=1)
    assert step.distance(got, step.forward_on_cpu(model, layers=1)) <= INDUCTOR


@pytest.mark.slow
def test_a_training_step_through_inductor(musa: str, compiling: None) -> None:
    model = BY_NAME["Llama"]
    got = step.train(model, musa, compiled("inductor"), layers=1)
    assert_near(got, step.train_on_cpu(model, layers=1), INDUCTOR)


# -- that these tests can fail ----------------------------------------------------------------------


@every_model
def test_every_parameter_matters(model: Model) -> None:
    """A config in which a block does nothing would hide what the device does in it."""
    reference = step.train_on_cpu(model)
    idle = [name for name, gradient in reference.gradients.items() if not gradient.any()]
    frozen = reference.updated.keys() - reference.gradients.keys()
    assert not idle
    assert frozen <= {"model.encoder.embed_positions.weight"}  # Whisper's sinusoids
    assert 0.01 < reference.output.std() < 100


def test_one_gradient_off_by_little_shows() -> None:
    right = step.train_on_cpu(BY_NAME["Llama"])
    name, gradient = next(iter(right.gradients.items()))
    with pytest.raises(AssertionError, match=r"further than 1e-05 from the CPU's: \{'gradients'"):
        assert_near(replace(right, gradients={**right.gradients, name: gradient + 1e-4}), right, TOLERANCE)
    with pytest.raises(AssertionError, match="in one only"):
        assert_near(replace(right, gradients={}), right, TOLERANCE)
    with pytest.raises(AssertionError, match="'loss': nan"):
        assert_near(replace(right, loss=right.loss * float("nan")), right, TOLERANCE)
