"""What the simulated device costs: an eager operator against the CPU's, and Inductor-compiled code against the CPU's.

Bounds: an eager operator at most 15 us more than on the CPU; a compiled 4-layer decoder over 512 tokens at most 1.1
times the CPU's. Device and CPU take turns within each round.

    python benchmarks/simulator.py [--json FILE] [--rounds 1.0] [--no-compile]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import difference, milliseconds, ratio, summary, take_turns

import fxpatch

CALLS = 500  # per round and way
ROUNDS = 41
DEVICE = "musa"

Operator = Callable[[torch.Tensor, torch.Tensor], object]
# over two float32 tensors of shape [16, 16], so that what is measured is the way to the kernel and not the kernel
OPERATORS: dict[str, Operator] = {
    "x + y": lambda x, y: x + y,
    "x.add_(y)": lambda x, y: x.add_(y),
    "x.relu()": lambda x, y: x.relu(),
    "x @ y": lambda x, y: x @ y,
    "addmm": lambda x, y: torch.addmm(x[0], x, y),
    "softmax": lambda x, y: x.softmax(-1),
    "layer_norm": lambda x, y: F.layer_norm(x, (16,)),
    "sum": lambda x, y: x.sum(-1),
    "cat": lambda x, y: torch.cat((x, y)),
    "where": lambda x, y: torch.where(x > y, x, y),
    "embedding": lambda x, y: F.embedding(INDICES[x.device.type], y),
    "x.view": lambda x, y: x.view(-1),
    "x.t()": lambda x, y: x.t(),
    "x[1:, 2]": lambda x, y: x[1:, 2],
    "x.copy_(y)": lambda x, y: x.copy_(y),
    "x.to(bfloat16)": lambda x, y: x.to(torch.bfloat16),
    "x.clone()": lambda x, y: x.clone(),
    "empty_like": lambda x, y: torch.empty_like(x),
    "x.max(-1)": lambda x, y: x.max(-1),
    "add(out=)": lambda x, y: torch.add(x, y, out=y),
    "dropout": lambda x, y: F.dropout(x, 0.5),
    "x[0, 0].item()": lambda x, y: x[0, 0].item(),
}
# how many operators reach the device in one call, where it is not one
OPERATIONS = {"addmm": 2, "where": 2, "x[1:, 2]": 2, "x[0, 0].item()": 3, "dropout": 4, "layer_norm": 1}
INDICES: dict[str, torch.Tensor] = {}


def eager(name: str, operator: Operator, rounds: int) -> dict[str, Any]:
    """Microseconds per call on either side, and what the device adds."""
    operands = {where: [torch.rand(16, 16).to(where) for _ in range(2)] for where in ("cpu", DEVICE)}

    def way(where: str) -> Callable[[], float]:
        x, y = operands[where]

        def calls() -> None:
            for _ in range(CALLS):
                operator(x, y)

        return lambda: milliseconds(calls)

    with torch.no_grad():
        times = take_turns({where: way(where) for where in operands}, rounds)
    per_call = 1e3 / CALLS
    added = difference(times[DEVICE], times["cpu"])
    return {
        "operator": name,
        "cpu_us": summary(times["cpu"])["median_ms"] * per_call,
        "device_us": summary(times[DEVICE])["median_ms"] * per_call,
        "added_us": added["median_ms"] * per_call,
        "added_iqr_us": added["iqr_ms"] * per_call,
        "dispatches": OPERATIONS.get(name, 1),
    }


def compiled(rounds: int) -> dict[str, Any]:
    """A Llama of 4 layers over 512 tokens, compiled by Inductor for both; ms per forward."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    tokens = torch.randint(0, 1024, (1, 512))
    ways, outputs = {}, {}
    with fxpatch.install(DEVICE), torch.no_grad():
        for where in ("cpu", DEVICE):
            forward = torch.compile(model_on(model, where), fullgraph=True)
            on_device = tokens.to(where)
            outputs[where] = forward(on_device).last_hidden_state.cpu()
            ways[where] = lambda forward=forward, on_device=on_device: milliseconds(lambda: forward(on_device))
        times = take_turns(ways, rounds)
    return {
        "cpu": summary(times["cpu"]),
        "device": summary(times[DEVICE]),
        "ratio": ratio(times[DEVICE], times["cpu"]),
        "largest_difference": (outputs["cpu"] - outputs[DEVICE]).abs().max().item(),
    }


def model_on(model: torch.nn.Module, where: str) -> torch.nn.Module:
    copy = type(model)(model.config).eval().to(where)
    copy.load_state_dict(model.state_dict())
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the measurements there as well")
    parser.add_argument("--rounds", type=float, default=1.0, help="multiply the number of rounds")
    parser.add_argument("--no-compile", action="store_true", help="eager operators only")
    options = parser.parse_args()
    fxpatch.simulate(DEVICE)
    torch.set_num_threads(1)
    for where in ("cpu", DEVICE):
        INDICES[where] = torch.arange(8).to(where)

    rounds = max(4, int(ROUNDS * options.rounds))
    print(f"torch {torch.__version__}; us per call, median of {rounds} rounds of {CALLS} calls, one thread")
    print(f"{'operator':>16} {'cpu':>8} {'device':>8} {'added':>8} {'(iqr)':>8} {'dispatches':>11}")
    results: dict[str, Any] = {"torch": torch.__version__, "eager": []}
    for name, operator in OPERATORS.items():
        row = eager(name, operator, rounds)
        results["eager"].append(row)
        print(
            f"{name:>16} {row['cpu_us']:8.2f} {row['device_us']:8.2f} {row['added_us']:8.2f} "
            f"{row['added_iqr_us']:8.2f} {row['dispatches']:11}",
            flush=True,
        )
    if not options.no_compile:
        torch.set_num_threads(2)
        results["compiled"] = decoder = compiled(rounds)
        print(
            f"Inductor, 4-layer decoder, 512 tokens: cpu {decoder['cpu']['median_ms']:.1f} ms "
            f"({decoder['cpu']['iqr_ms']:.1f}), device {decoder['device']['median_ms']:.1f} ms "
            f"({decoder['device']['iqr_ms']:.1f}), ratio {decoder['ratio']:.3f}; "
            f"largest difference {decoder['largest_difference']:.1e}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
