"""A transformers model, as it is, on the simulated device: the CPU's logits and gradients under every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
# torch's own use of it, at import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny Llama with random weights, on the CPU."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "backend",
    [
        None,
        "eager",
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients(musa: str, llama: Any, backend: str | None) -> None:
    torch._dynamo.reset()
    device_llama = copy.deepcopy(llama).to(musa)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    model = torch.compile(device_llama, backend=backend, fullgraph=True) if backend else device_llama
    with torch.no_grad():
        logits = model(ids.to(musa), use_cache=False).logits
    torch.testing.assert_close(logits.cpu(), llama(ids, use_cache=False).logits, atol=1e-4, rtol=0)

    llama.zero_grad()
    want, got = (m(i, labels=i, use_cache=False).loss for m, i in ((llama, ids), (model, ids.to(musa))))
    want.backward()
    got.backward()
    torch.testing.assert_close(got.cpu(), want)
    for a, b in zip(llama.parameters(), device_llama.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, atol=1e-5, rtol=1e-3)


def test_generation(musa: str, llama: Any) -> None:
    ids = torch.arange(5)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = llama.generate(ids, **options)
    got = copy.deepcopy(llama).to(musa).generate(ids.to(musa), **options)
    assert got.device.type == musa
    assert got.tolist() == want.tolist()
