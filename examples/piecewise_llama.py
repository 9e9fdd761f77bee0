"""A Llama served in pieces: graphs between the attentions, padded batches, a token loop over a cache of the caller's.

    python examples/piecewise_llama.py                    on a simulated `musa` accelerator: no hardware needed
    python examples/piecewise_llama.py --device npu       on real hardware (cuda, npu, musa, xpu), or on the cpu
    options: --layers N, --tokens N, --compiler eager|aot_eager|inductor

The model is transformers' own, unchanged; its attention is an operator that is registered here, as an engine does it.
A step takes n tokens, whichever sequences they belong to: a prompt is n tokens of one sequence, decoding is one token
of each of n. Each token brings its row in the cache and its position; keys and values are written there in place. So
one runner serves prompts and decoding, and its graphs never see how long a sequence is.

A captured size pads a step with zeros: token 0 at position 0 of row 0 of the cache, which is another sequence's. So
each step brings ones for its tokens, too: where padding has made a zero of that, a token stores what the first one
stores. (The runner tries it when it prepares. A model that stores padded rows gets exact sizes only.) Tokens and logits
are compared with the model run eagerly over a cache of its own; the exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse
import sys

import torch
from devices import prepare_device
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import fxpatch

ROWS, LENGTH = 6, 48  # of the cache
SIZES = [2, 4, 8, 16]
TOLERANCE = 2e-4  # fp32 logits of order 1: padded, a matrix product may add in another order

LIBRARY = torch.library.Library("piecewise_llama", "DEF")
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor rows, "
    "Tensor positions, Tensor real, float scale, Tensor(c!) out) -> ()"
)


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    real: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes keys and values of n tokens to the cache, then attends from each to what its row holds up to itself.

    Args:
        query, out: `[n, heads, size]`.
        key, value: `[n, key heads, size]`.
        keys, values: the cache, `[rows, key heads, length, size]`.
        rows, positions: of each token in the cache, `[n]`.
        real: `[n]`, False for tokens that only fill a captured size up.
    """
    store = torch.where(real, torch.arange(len(rows), device=rows.device), 0)
    keys[rows[store], :, positions[store]], values[rows[store], :, positions[store]] = key[store], value[store]
    visible = torch.arange(keys.shape[2], device=keys.device) <= positions[:, None]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], keys[rows], values[rows], attn_mask=visible[:, None, None], scale=scale, enable_gqa=True
    )
    out.copy_(attended[:, :, 0])


@torch.library.register_fake("piecewise_llama::attention", lib=LIBRARY)
def _(*arguments: object) -> None:
    """Nothing is returned; the schema says what is written."""


def cached_attention(module, query, key, value, mask, scaling, cache, rows, positions, real, **_):
    """What transformers calls: `[1, heads, n, size]` in, `[1, n, heads, size]` out. It has no mask for us."""
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    keys, values = cache[module.layer_idx]
    torch.ops.piecewise_llama.attention(query, key, value, keys, values, rows, positions, real, scaling, out)
    return out[None], None


AttentionInterface.register("piecewise_llama", cached_attention)

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Step(torch.nn.Module):
    """n tokens to their logits `[n, vocabulary]`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=LENGTH, initializer_range=0.1,
            attn_implementation="piecewise_llama",
        )  # fmt: skip
        torch.manual_seed(0)
        self.llama = LlamaForCausalLM(config).eval()

    def forward(
        self, ids: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        logits = self.llama(
            input_ids=ids[None], position_ids=positions[None], use_cache=False,
            cache=cache, rows=rows, positions=positions, real=real,
        ).logits  # fmt: skip
        return logits[0]

    def new_cache(self, device: torch.device) -> Cache:
        config = self.llama.config
        shape = (ROWS, config.num_key_value_heads, LENGTH, config.head_dim)
        return [tuple(torch.zeros(shape, device=device) for _ in "kv") for _ in range(config.num_hidden_layers)]


@torch.no_grad()
def generate(step, cache: Cache, tokens: int, device: torch.device) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts of several lengths, then decoding of all sequences together, each until it has its number of tokens: the
    batch becomes smaller. Returns the tokens of each sequence, and all logits."""
    prompts = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 512, (length,), generator=prompts).tolist() for length in (5, 9, 1, 3, 12, 7)]
    wanted = [len(sequence) + tokens + 2 * i for i, sequence in enumerate(sequences)]
    seen: list[torch.Tensor] = []

    def run(places: list[tuple[int, int]]) -> torch.Tensor:
        """(sequence, which is its row in the cache; position) of each token."""
        rows, positions = zip(*places, strict=True)
        ids = [sequences[s][position] for s, position in places]
        given = [torch.tensor(each, device=device) for each in (ids, rows, positions, [True] * len(ids))]
        logits = step(*given, cache).to("cpu", copy=True)  # what a runner returns is valid until its next call
        seen.append(logits)
        return logits

    for s, sequence in enumerate(sequences):
        logits = run([(s, position) for position in range(len(sequence))])
        sequence.append(int(logits[-1].argmax()))
    while running := [s for s, sequence in enumerate(sequences) if len(sequence) < wanted[s]]:
        logits = run([(s, len(sequences[s]) - 1) for s in running])
        for s, row in zip(running, logits, strict=True):
            sequences[s].append(int(row.argmax()))
    return sequences, seen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated", choices=["simulated", "cpu", "cuda", "npu", "musa", "xpu"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="to generate, for the first sequence; others get more")
    parser.add_argument("--compiler", default="aot_eager")
    options = parser.parse_args(arguments)

    device = prepare_device(options.device)
    handle = fxpatch.install(device.type) if device.type != "cpu" else None
    step = Step(options.layers).to(device)
    cache = step.new_cache(device)

    runner = fxpatch.PiecewiseRunner(
        step,
        dynamic={"ids": 0, "rows": 0, "positions": 0, "real": 0},
        split=["piecewise_llama::attention"],
        sizes=SIZES,
        compiler=options.compiler,
        graphs="recorder" if device.type == "cpu" else "device",
        progress=True,
    )
    example = [torch.tensor(each, device=device) for each in ([7, 8, 9], [0, 0, 1], [0, 1, 0], [True] * 3)]
    runner.prepare(*example, cache)

    want, want_logits = generate(step, step.new_cache(device), options.tokens, device)
    got, got_logits = generate(runner, cache, options.tokens, device)
    far = max(float((a - b).abs().max()) for a, b in zip(got_logits, want_logits, strict=True))
    replayed = runner.counts["captured"]

    # Another cache is at another address: the graphs would still write to the old one, so they are not used.
    moved, moved_logits = generate(runner, step.new_cache(device), options.tokens, device)
    far = max(far, *(float((a - b).abs().max()) for a, b in zip(moved_logits, want_logits, strict=True)))

    print(runner.report)
    right = got == want and moved == want and far <= TOLERANCE and replayed == len(got_logits)
    print(
        f"{'OK' if right else 'WRONG'}: {len(got)} sequences on {device.type}, {replayed} of {len(got_logits)} steps "
        f"replayed; with another cache {runner.counts['captured'] - replayed}; max |logit - eager| = {far:.1e}"
    )
    if handle is not None:
        handle.uninstall()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
