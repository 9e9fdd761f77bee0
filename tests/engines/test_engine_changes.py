"""A module that changes after it was captured, is copied, or has masks of another form: its results stay its own."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, StaticCache

import fxpatch
from fxpatch.engines.attached import Attached
from fxpatch.engines.cache_rows import Rows
from fxpatch.engines.decoding import capture_decoding
from fxpatch.engines.unchanged import Snapshot
from fxpatch.engines.whole_module import run_in_pieces

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def built(kind: Any, config: Any, device: str) -> Any:
    fxpatch.simulate(device)
    torch.manual_seed(0)
    return kind(config(**TINY)).eval().to(device)


def generated(model: PreTrainedModel, batch: int = 2, **options: Any) -> torch.Tensor:
    ids = torch.randint(2, 64, (batch, 5), generator=torch.Generator().manual_seed(batch))
    ids[1:, :2] = 0  # padded on the left
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    moved = {name: tensor.to(model.device) for name, tensor in given.items()}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    return model.generate(**moved, cache_implementation="static", disable_compile=True, **options).cpu()  # type: ignore[operator, no-any-return]


def test_masks_by_the_kind_of_layer_and_a_model_that_changes(musa: str, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen2's masks are in a dict; and two rows, the largest size, are not all there are, or n would be a constant."""
    model = built(Qwen2ForCausalLM, Qwen2Config, musa)
    want = generated(model)
    captured = capture_decoding(model, sizes=[2], compiler="eager", progress=False)
    assert torch.equal(generated(model), want)
    assert captured.calls == {"prompts": 1, "captured decoding": 3}
    assert captured.runner is not None
    assert captured.runner.counts == {"captured": 3}
    with torch.no_grad():
        model.lm_head.weight.neg_()  # in place: graphs see it
    in_place = generated(model)
    assert captured.runner.counts == {"captured": 6}
    assert not torch.equal(in_place, want)
    with caplog.at_level(logging.WARNING, logger="fxpatch"):
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
        got = generated(model)
    assert torch.equal(got, want)
    reason = "another module or parameter"
    assert captured.calls == {"prompts": 3, "captured decoding": 6, f"the model has changed: {reason}": 3}
    told = [record.getMessage() for record in caplog.records if "has changed" in record.getMessage()]
    assert told == [
        f"Qwen2ForCausalLM has changed since it was captured ({reason}): its calls go to the module itself; "
        "undo() and attach anew"
    ]
    captured.undo()


def test_masks_of_another_kind_are_of_another_graph() -> None:
    cache = StaticCache(config=LlamaConfig(**TINY), max_cache_len=8)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    bools = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    rows = Rows(cache, bools, 4, 10)
    assert rows.fit(cache, bools)
    assert not rows.fit(cache, bools.float())  # after set_attn_implementation("eager")
    assert not Rows(cache, bools, 4, 7).fit(cache, bools)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x))  # type: ignore[no-any-return]


def block(device: str) -> tuple[Block, Attached]:
    fxpatch.simulate(device)
    module = Block().eval().to(device)
    attached = run_in_pieces(module, dynamic={"x": 0}, sizes=[2, 4], compiler="eager", progress=False)
    return module, attached


def test_a_copy_is_its_own(musa: str) -> None:
    module, attached = block(musa)
    x = torch.randn(3, 4, device=musa)
    with torch.no_grad():
        module(x)
        other = copy.deepcopy(module)
        other.linear.weight.zero_()
        other.linear.bias.zero_()
        assert torch.equal(other(x).cpu(), torch.zeros(3, 4))
        assert attached.runner is not None
        assert attached.runner.counts == {"captured": 1}
        with run_in_pieces(other, dynamic={"x": 0}, sizes=[4], compiler="eager", progress=False):
            assert torch.equal(other(x).cpu(), torch.zeros(3, 4))
        attached.undo()
        assert module(x).abs().sum() > 0


def test_training_is_no_replay(musa: str) -> None:
    module, attached = block(musa)
    x = torch.randn(64, 4, device=musa)
    with torch.no_grad():
        module(x[:3])
        module.train()
        assert (module(x) == 0).sum() > 64  # of 256, half are dropped
        module.eval()
        assert (module(x[:3]) != 0).all()
    assert attached.calls == {"the model has changed: train() or eval()": 1}
    assert attached.runner is not None
    assert attached.runner.counts == {"captured": 2}


def test_a_call_that_the_module_refuses_is_no_example(musa: str) -> None:
    module, attached = block(musa)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 7, device=musa))
        module(torch.randn(2, 4, device=musa))
    assert attached.runner is not None
    assert attached.runner.counts["captured"] == 1


def test_what_is_a_change() -> None:
    module = torch.nn.Sequential(Block(), torch.nn.BatchNorm1d(4))
    snapshot = Snapshot(module)
    with torch.no_grad():
        module[0].linear.weight.add_(1)  # type: ignore[union-attr]
    assert snapshot.change() == ""
    module[0].train(mode=False)
    assert snapshot.change() == "train() or eval()"
    module[0].train()
    module[0].adapter = torch.nn.Identity()
    assert snapshot.change() == "another module or parameter"
    del module[0].adapter
    module[1].running_mean.data = torch.zeros(4)  # type: ignore[union-attr]
    assert snapshot.change() == "weights elsewhere"
