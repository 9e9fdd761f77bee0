"""A real Llama through Dynamo, AOTAutograd and Inductor on a device PyTorch does not know, under a vendor's shim.

    python examples/llama_on_musa.py                    on a simulated `musa` accelerator: no hardware needed
    python examples/llama_on_musa.py --device npu       on real hardware (cuda, npu, musa; imports the vendor's package)
    options: --no-shim, --layers N, --tokens N, --backends eager aot_eager inductor

The model is transformers' own LlamaForCausalLM, built from a small config with random weights. It is run on the CPU
first; then compiled on the device with `fullgraph=True`, as torch is today; then again after `fxpatch.install()`.
The logits and the generated tokens must equal the CPU's, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxpatch
from fxpatch.simulator.shim import load_shim

CONSOLE = Console()
PROMPT_LENGTH = 12
TOLERANCE = 2e-4  # fp32 logits of order 1: another order of summation, and nothing more
VENDOR_PACKAGES = {"npu": "torch_npu", "musa": "torch_musa"}


@dataclass
class Run:
    """One pass: logits of the prompt `[1, prompt, vocabulary]` on the CPU, the tokens generated, and seconds spent."""

    logits: torch.Tensor
    tokens: list[int]
    prefill: float
    first_decode: float
    decode: float


def build_model(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def prefill_and_generate(model: torch.nn.Module, config: LlamaConfig, prompt: torch.Tensor, tokens: int) -> Run:
    """Greedy decoding over a static cache: two shapes, so two compilations."""
    device = prompt.device
    cache = StaticCache(config=config, max_cache_len=64)
    seconds = [time.perf_counter()]

    def step(ids: torch.Tensor, start: int) -> torch.Tensor:
        positions = torch.arange(start, start + ids.shape[1], device=device)
        logits = model(input_ids=ids, past_key_values=cache, cache_position=positions, use_cache=True).logits
        logits = logits.cpu()
        seconds.append(time.perf_counter())
        return logits

    logits = step(prompt, 0)
    generated = [int(logits[0, -1].argmax())]
    for position in range(prompt.shape[1], prompt.shape[1] + tokens - 1):
        following = step(torch.tensor([[generated[-1]]], device=device), position)
        generated.append(int(following[0, -1].argmax()))
    took = [after - before for before, after in itertools.pairwise(seconds)]
    return Run(logits, generated, took[0], took[1], sum(took[2:]) / max(len(took[2:]), 1))


def prepare_device(wanted: str | None, shim: bool) -> str:
    """Brings the device up and loads the shim, in the order in which a vendor's package does."""
    if wanted is None:
        device = "musa"
        fxpatch.simulate(device)
        CONSOLE.print(f"device: simulated accelerator {device!r} over host memory")
    else:
        device = wanted
        if device in VENDOR_PACKAGES:
            importlib.import_module(VENDOR_PACKAGES[device])
        CONSOLE.print(f"device: {device}, {torch.get_device_module(device).get_device_name(0)}")
    if shim:
        replaced = load_shim(device)
        CONSOLE.print(f"shim:   torch.device is now {replaced.__module__}.{replaced.__qualname__}")
    return device


def show_failure_today(model: torch.nn.Module, config: LlamaConfig, prompt: torch.Tensor) -> bool:
    """Compiles without fxpatch, and prints what torch says. Returns whether it failed."""
    try:
        prefill_and_generate(torch.compile(model, backend="eager", fullgraph=True), config, prompt, tokens=2)
    except Exception as error:  # whatever it is, it is what a user sees today
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        CONSOLE.print(f"[red]today:  {type(error).__name__}[/red]: {' | '.join(lines[:3])[:300]}", highlight=False)
        return True
    CONSOLE.print("today:  compiles (nothing here needed a repair)")
    return False


def compile_and_compare(
    model: torch.nn.Module, config: LlamaConfig, prompt: torch.Tensor, tokens: int, backends: list[str], reference: Run
) -> bool:
    table = Table(title=f"LlamaForCausalLM, {config.num_hidden_layers} layers, on {prompt.device}, fullgraph=True")
    for column in ("", "prefill s", "first decode s", "ms / token", "max |logit - CPU|", "tokens"):
        table.add_column(column, justify="left" if column == "" else "right")
    right = True
    for backend in ["no compile", *backends]:
        torch._dynamo.reset()
        compiled = model if backend == "no compile" else torch.compile(model, backend=backend, fullgraph=True)
        if not CONSOLE.is_terminal:  # where the spinner below shows nothing
            CONSOLE.print(f"{backend}: prefill and decode ...")
        with CONSOLE.status(f"{backend}: prefill and decode ..."):
            run = prefill_and_generate(compiled, config, prompt, tokens)
        error = (run.logits - reference.logits).abs().max().item()
        same = error <= TOLERANCE and run.tokens == reference.tokens
        right = right and same
        table.add_row(
            backend,
            f"{run.prefill:.2f}",
            f"{run.first_decode:.2f}",
            f"{run.decode * 1000:.1f}",
            f"{error:.1e}",
            "[green]equal[/green]" if same else f"[red]{run.tokens} != {reference.tokens}[/red]",
        )
    CONSOLE.print(table)
    return right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "npu", "musa"], help="real hardware; default: a simulated musa")
    parser.add_argument("--no-shim", action="store_true", help="leave torch.device as it is")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=5, help="tokens to generate, at least 3")
    parser.add_argument("--backends", nargs="+", default=["eager", "aot_eager", "inductor"])
    options = parser.parse_args(arguments)
    if options.tokens < 3 or options.layers < 1:
        parser.error("--tokens must be at least 3 and --layers at least 1")

    model = build_model(options.layers)
    config = model.config
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT_LENGTH))
    reference = prefill_and_generate(model, config, prompt, options.tokens)
    CONSOLE.print(f"CPU:    generated {reference.tokens}")

    device = prepare_device(options.device, shim=not options.no_shim)
    model, prompt = model.to(device), prompt.to(device)
    show_failure_today(model, config, prompt)

    with fxpatch.install(device):
        right = compile_and_compare(model, config, prompt, options.tokens, options.backends, reference)
        CONSOLE.print(str(fxpatch.status()), highlight=False, soft_wrap=True)
    if right:
        CONSOLE.print(
            f"[green]OK[/green]: logits and tokens on {device} equal the CPU's with {', '.join(options.backends)}"
        )
        return 0
    CONSOLE.print("[red]WRONG[/red]: see the table")
    return 1


if __name__ == "__main__":
    sys.exit(main())
