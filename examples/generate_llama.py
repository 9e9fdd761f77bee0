"""transformers' own `generate`, its decoding captured: two lines of a program that exists already.

    python examples/generate_llama.py                    on a simulated `musa` accelerator: no hardware needed
    python examples/generate_llama.py --device npu       on real hardware (cuda, npu, musa, xpu), or on the cpu
    options: --layers N, --tokens N, --compiler eager|aot_eager|inductor

The lines are marked (1) and (2). Prompts of several lengths are padded on the left, as batches for `generate` are; then
batches of 3, of 1 and of 2 are decoded with a static cache. A graph for 4 rows serves the first, one for 2 the others.
Tokens are compared with those of the unchanged model on the CPU, which has a cache that grows; the exit status is 1 if
one differs, or if a step of decoding was not replayed. (On the cpu there are no graphs: there it runs compiled pieces.)
"""

from __future__ import annotations

import argparse
import sys

import torch
from devices import prepare_device
from transformers import LlamaConfig, LlamaForCausalLM

import fxpatch
from fxpatch.engines.decoding import capture_decoding

BATCHES = (3, 1, 2)
PAD, END = 0, 1


def build_model(layers: int) -> LlamaForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.1, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int) -> dict[str, torch.Tensor]:
    """Of 4, 7, 10, ... tokens, filled up on the left."""
    words = torch.Generator().manual_seed(1)
    longest = 4 + 3 * (batch - 1)
    rows = [torch.randint(2, 512, (4 + 3 * i,), generator=words) for i in range(batch)]
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def generate(model: LlamaForCausalLM, device: torch.device, tokens: int, **options: str) -> list[list[list[int]]]:
    """The sequences of each batch."""
    found = []
    for batch in BATCHES:
        given = {name: tensor.to(device) for name, tensor in prompts(batch).items()}
        found.append(model.generate(**given, max_new_tokens=tokens, do_sample=False, **options).tolist())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated", choices=["simulated", "cpu", "cuda", "npu", "musa", "xpu"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="to generate for each sequence, at most")
    parser.add_argument("--compiler", default="aot_eager")
    options = parser.parse_args(arguments)

    want = generate(build_model(options.layers), torch.device("cpu"), options.tokens)
    device = prepare_device(options.device)
    model = build_model(options.layers).to(device)

    fxpatch.install(device.type)  # (1)
    captured = capture_decoding(model, sizes=[2, 4], max_length=32, compiler=options.compiler)  # (2)

    got = generate(model, device, options.tokens, cache_implementation="static")

    assert captured.runner is not None
    print(captured.runner.report)
    steps, replayed = captured.calls["captured decoding"], captured.runner.counts["captured"]
    right = got == want and steps > 0 and (replayed == steps or device.type == "cpu")
    print(
        f"{'OK' if right else 'WRONG'}: {sum(BATCHES)} sequences on {device.type}, {replayed} of {steps} steps "
        f"replayed; tokens {'equal' if got == want else 'differ from'} the CPU's"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
