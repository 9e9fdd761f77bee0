"""`generate` with captured decoding gives the tokens of the unchanged model on the CPU, however its caches are used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxpatch
from fxpatch.engines.decoding import CapturedDecoding, capture_decoding
from fxpatch.errors import AlreadyInstalledError, InputError, SizesError

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 4


def built() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


REFERENCE = built()


def prompts(batch: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Padded on the left, each by another number of tokens."""
    ids = torch.randint(2, 128, (batch, 7), generator=torch.Generator().manual_seed(seed))
    for i in range(batch):
        ids[i, :i] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generated(model: LlamaForCausalLM, given: dict[str, torch.Tensor], **options: Any) -> Any:
    moved = {name: tensor.to(model.device) for name, tensor in given.items()}
    found = model.generate(**moved, **{"max_new_tokens": TOKENS, "do_sample": False, **options})
    return found.cpu() if isinstance(found, torch.Tensor) else found


def check(captured: CapturedDecoding, given: dict[str, torch.Tensor], **options: Any) -> None:
    """The tokens are those of the CPU, with transformers' own cache that grows."""
    got = generated(captured.module, given, cache_implementation="static", **options)
    assert torch.equal(got, generated(REFERENCE, given, **options))


@pytest.fixture(scope="module")
def captured(musa: str) -> Iterator[CapturedDecoding]:
    """Prepared once; each test looks at what it adds to `calls`."""
    fxpatch.simulate(musa, strict=True)
    with capture_decoding(built().to(musa), sizes=[2, 4], compiler="eager", progress=False) as found:
        check(found, prompts(3))
        yield found
    fxpatch.simulate(musa, strict=False)


def steps(captured: CapturedDecoding) -> tuple[int, int]:
    """Of decoding; and how many of them were replayed."""
    assert captured.runner is not None
    assert captured.runner.counts.total() == captured.calls["captured decoding"]
    return captured.calls["captured decoding"], captured.runner.counts["captured"]


@pytest.mark.parametrize("batch", [1, 4])
def test_every_batch_is_replayed(captured: CapturedDecoding, batch: int) -> None:
    before = steps(captured)
    check(captured, prompts(batch, seed=batch))
    done, replayed = (now - then for now, then in zip(steps(captured), before, strict=True))
    assert done == replayed > 0


def test_what_was_made(captured: CapturedDecoding) -> None:
    assert captured.runner is not None
    report = captured.runner.report
    assert [(row.size, row.way) for row in report.sizes] == [(4, "captured"), (2, "captured")]
    assert not any("exact sizes" in note for note in report.notes)


def test_beams_reorder_the_cache(captured: CapturedDecoding) -> None:
    check(captured, prompts(2), num_beams=2)


def test_a_batch_that_is_too_large(captured: CapturedDecoding) -> None:
    before = captured.calls["a batch above 4"]
    check(captured, prompts(5))
    assert captured.calls["a batch above 4"] - before == TOKENS - 1


def test_another_cache(captured: CapturedDecoding) -> None:
    before = steps(captured)
    assert torch.equal(generated(captured.module, prompts(2)), generated(REFERENCE, prompts(2)))
    assert steps(captured) == before


def test_in_inference_mode(captured: CapturedDecoding) -> None:
    with torch.inference_mode():
        check(captured, prompts(2, seed=5))


def test_what_is_asked_for_besides(captured: CapturedDecoding) -> None:
    """Hidden states of every step: graphs do not return them, the model does."""
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    got = generated(captured.module, prompts(2), cache_implementation="static", **options)
    want = generated(REFERENCE, prompts(2), **options)
    assert len(got.hidden_states) == len(want.hidden_states) == TOKENS
    torch.testing.assert_close(got.hidden_states[-1][-1].cpu(), want.hidden_states[-1][-1], rtol=1e-4, atol=1e-4)
    assert captured.calls["asked for output_hidden_states"] == TOKENS - 1


def test_logits_are_the_callers(captured: CapturedDecoding) -> None:
    """All logits are kept over the steps."""
    options = {"output_logits": True, "return_dict_in_generate": True}
    got = generated(captured.module, prompts(2), cache_implementation="static", **options)
    want = generated(REFERENCE, prompts(2), **options)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_two_caches_in_turn(captured: CapturedDecoding) -> None:
    """Two conversations, a token of each in turn: neither writes into the other's cache."""
    model = captured.module
    found: list[list[int]] = []
    walks = [walk(model, prompts(2, seed=seed), found) for seed in (11, 12)]
    for _ in range(TOKENS):
        for each in walks:
            next(each)
    want = [generated(REFERENCE, prompts(2, seed=seed), min_new_tokens=TOKENS)[:, 7:] for seed in (11, 12)]
    for conversation in (0, 1):
        rows = torch.tensor(
            [tokens for whose, tokens in zip([0, 1] * TOKENS, found, strict=True) if whose == conversation]
        )
        assert torch.equal(rows.T, want[conversation])


def walk(model: Any, given: dict[str, torch.Tensor], found: list[list[int]]) -> Iterator[None]:
    """Decodes token by token, as `generate` calls the model; an end is not taken for one."""
    ids, mask = given["input_ids"].to(model.device), given["attention_mask"].to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=16)
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    new = ids
    while True:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        prepared = model.prepare_inputs_for_generation(
            new, attention_mask=mask, position_ids=positions, is_first_iteration=new is ids, **options
        )
        with torch.no_grad():
            logits = model(**prepared, return_dict=True).logits[:, -1].clone()
        logits[:, 1] = -torch.inf
        new = logits.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(new)], dim=-1)
        found.append(new[:, 0].tolist())
        yield


def test_these_tests_notice(captured: CapturedDecoding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is not moved out when another one comes."""
    from fxpatch.engines.cache_rows import Rows

    monkeypatch.setattr(Rows, "leave", lambda self: None)
    with pytest.raises(AssertionError):
        test_two_caches_in_turn(captured)


def test_a_longer_cache_and_the_way_back(musa: str) -> None:
    """One that has no room is prepared for anew; hooks run once; and undone, the model is what it was."""
    model = built().to(musa)
    before = {**vars(model)}
    compiled = model.generation_config.disable_compile
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    captured = capture_decoding(model, sizes=[2], compiler="eager", progress=False)
    with pytest.raises(AlreadyInstalledError, match=r"Calls of this LlamaForCausalLM go through a runner already"):
        capture_decoding(model, sizes=[2])
    check(captured, prompts(2), max_new_tokens=3)
    first = captured.runner
    check(captured, prompts(2), max_new_tokens=5)
    assert captured.runner is not first
    assert len(calls) == 3 + 5
    assert captured.calls == {"prompts": 2, "captured decoding": 2 + 4}
    captured.undo()
    captured.undo()
    hook.remove()
    assert {name for name in vars(model) if name not in before} <= {"_previous_max_cache_length"}
    assert "forward" not in vars(model)
    assert model.generation_config.disable_compile == compiled
    assert torch.equal(generated(model, prompts(2), cache_implementation="static"), generated(REFERENCE, prompts(2)))
    assert captured.calls["prompts"] == 2


def test_models_that_are_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    ones = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, **ones}
    window = MistralForCausalLM(MistralConfig(**small, sliding_window=4))
    with pytest.raises(InputError, match=r"Decoding of MistralForCausalLM cannot be captured\.\n  seen: "):
        capture_decoding(window, sizes=[2])
    with pytest.raises(InputError, match=r"seen: no config of transformers'"):
        capture_decoding(torch.nn.Linear(1, 1), sizes=[2])
    for wrong in ([], [1, 2]):
        with pytest.raises(SizesError, match=r"These batch sizes cannot be captured\.\n  seen: sizes="):
            capture_decoding(REFERENCE, sizes=wrong)
    assert "forward" not in vars(REFERENCE)


@pytest.mark.slow
def test_the_example() -> None:
    done = subprocess.run(
        [sys.executable, "examples/generate_llama.py", "--layers", "1", "--tokens", "4", "--compiler", "eager"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: 6 sequences on musa, 9 of 9 steps replayed; tokens equal the CPU's" in done.stdout
