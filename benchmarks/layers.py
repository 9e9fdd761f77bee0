"""What FP32LayerNorm saves by converting its parameters once, and what finding out costs.

    python benchmarks/layers.py [--rounds N] [--json FILE]

bfloat16 parameters, no_grad. Ways, which take turns within each round: `converts`, diffusers' own class, which converts
in every call; `keeps`, ours; `float32`, ours over float32 parameters, where there is nothing to convert: as fast as it
can get. Layers of the widths of Wan 1.3B and 14B, for few rows and many; then a whole WanTransformer3DModel, as it is
and after `optimize(model, "cpu")`. "saves" is the median over rounds of `converts` less `keeps`. Single-threaded on the
CPU: on an accelerator the conversion is a launch or two per parameter, which this does not measure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.normalization import FP32LayerNorm as Converts
from interleaved import difference, milliseconds, ratio, summary, take_turns

from fxpatch.layers.adoption import optimize
from fxpatch.layers.norm import FP32LayerNorm

WIDTHS = {"Wan 1.3B": 1536, "Wan 14B": 5120}
ROWS = (1, 16, 1024)
CALLS = {1: 200, 16: 100, 1024: 2}  # per turn, so that a turn is long enough to time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with torch.no_grad():
        for name, width in WIDTHS.items():
            for rows in ROWS:
                results[f"{name}, {rows} rows"] = compare(layer_ways(width, rows), options.rounds)
        results["Wan, 2 layers"] = compare(model_ways(), options.rounds)
    for case, each in results.items():
        print(f"{case}: saves {each['saves']['median_ms'] * 1e3:.2f} us of a call ({each['share']:+.1%})")
        for way, times in each["ways"].items():
            print(f"  {way:9} median {times['median_ms'] * 1e3:10.2f} us   IQR {times['iqr_ms'] * 1e3:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


def layer_ways(width: int, rows: int) -> dict[str, Callable[[], float]]:
    """Each way's time per call, in ms."""
    x = torch.randn(rows, width).bfloat16()
    modules = {
        "converts": Converts(width).bfloat16(),
        "keeps": FP32LayerNorm(width).bfloat16(),
        "float32": FP32LayerNorm(width),
    }
    assert torch.equal(modules["converts"](x), modules["keeps"](x))
    calls = CALLS[rows]

    def timed(module: torch.nn.Module) -> Callable[[], float]:
        return lambda: milliseconds(lambda: [module(x) for _ in range(calls)]) / calls

    return {name: timed(module) for name, module in modules.items()}


def model_ways() -> dict[str, Callable[[], float]]:
    """The first Wan's width, two of its thirty layers, 16 latent positions: the norms' share is at its largest. One
    model for both ways, optimized and undone outside of what is timed: a copy has its weights at other addresses, which
    makes more of a difference than the norms."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64, ffn_dim=2048,
        num_layers=2, cross_attn_norm=True,
    ).bfloat16().eval()  # fmt: skip
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, 1, 8, 8).bfloat16(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 64).bfloat16(),
    }

    def converts() -> float:
        model(**inputs)
        return milliseconds(lambda: model(**inputs))

    def keeps() -> float:
        with optimize(model, "cpu"):
            return converts()

    return {"converts": converts, "keeps": keeps}


def compare(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Times per call, and what `keeps` saves of `converts`."""
    times = take_turns(ways, rounds)
    return {
        "ways": {name: summary(each) for name, each in times.items()},
        "saves": difference(times["converts"], times["keeps"]),
        "share": 1 - ratio(times["keeps"], times["converts"]),
    }


if __name__ == "__main__":
    main()
