"""Every model of the zoo under every backend on the simulated device, against the CPU, as the table of docs/models.md.

    python tests/models/sweep.py                                 all of it: half an hour on two cores, most of it g++
    python tests/models/sweep.py --models Llama T5 --backends eager
    python tests/models/sweep.py --write docs/models.md          replaces the table there

The exit status is 1 if anything failed or is further from the CPU than the tests allow.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ["FXPATCH_AUTOLOAD"] = "0"

import step
import torch
import torch._dynamo
import transformers
from test_captured import Captured, transformers_asking
from test_models import INDUCTOR, TOLERANCE, compiled
from zoo import MODELS, Model

import fxpatch

DEVICE = "musa"
BACKENDS = ("eager", "aot_eager", "inductor")
BEGIN, END = "<!-- measured by tests/models/sweep.py -->", "<!-- end -->"


def compare(model: Model, backend: str) -> tuple[str, bool]:
    """The cell of one model and one backend, and whether it is near enough."""
    torch._dynamo.reset()
    call = step.uncompiled if backend == "eager" else compiled(backend)
    layers = 2 if backend == "eager" else 1
    forward = step.distance(step.forward(model, DEVICE, call, layers), step.forward_on_cpu(model, layers))
    torch._dynamo.reset()
    training = step.train(model, DEVICE, call, layers).distance(step.train_on_cpu(model, layers))
    tolerance = INDUCTOR if backend == "inductor" else TOLERANCE
    near = all(value <= tolerance for value in (forward, *training.values()))
    return " ".join(f"{value:.0e}" for value in (forward, training["gradients"], training["updated"])), near


def decode(model: Model) -> tuple[str, bool]:
    """Whether greedy decoding gives the CPU's tokens."""
    if not model.generates:
        return "", True
    same = step.generate(model, DEVICE) == step.generate(model, "cpu")
    return ("equal" if same else "different"), same


def capture(model: Model) -> tuple[str, bool]:
    """Whether a replay gives eager's bits."""
    with transformers_asking(DEVICE):
        captured = Captured(model, DEVICE)
    same = torch.equal(captured.replay(), captured.eager())
    return ("equal" if same else "different"), same


def measure(model: Model, backends: list[str]) -> tuple[list[str], bool]:
    """A row of the table, printed as it grows."""
    print(f"{model!s:<24}", end="", flush=True)
    cells, right = [str(model), f"{sum(p.numel() for p in step.build(model, 'cpu').parameters()):,}"], True
    for part in (*backends, decode, capture):
        before = time.perf_counter()
        try:
            cell, near = compare(model, part) if isinstance(part, str) else part(model)
        except Exception as error:  # whatever it is, it belongs in the table
            cell, near = f"{type(error).__name__}", False
            print(f"\n{error}", file=sys.stderr)
        cells.append(cell)
        right = right and near
        print(f"  {cell or '-'} ({time.perf_counter() - before:.0f} s){'' if near else ' WRONG'}", end="", flush=True)
    print()
    return cells, right


def table(rows: list[list[str]], backends: list[str]) -> str:
    """The rows as Markdown, with the versions they were measured with."""
    import diffusers

    head = ["model", "parameters", *backends, "`generate`", "captured"]
    lines = [head, ["---"] * len(head), *rows]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    return "\n".join([f"Measured with {versions}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


def replace_table(document: Path, text: str) -> None:
    """Puts the table between the two marks of the document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--write", type=Path, metavar="FILE", help="a document with the marks the table goes between")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.jit.script")
    transformers.logging.set_verbosity_error()
    fxpatch.simulate(DEVICE)
    rows, right = [], True
    with fxpatch.install(DEVICE):
        for model in MODELS:
            if options.models is None or model.name in options.models:
                row, near = measure(model, options.backends)
                rows.append(row)
                right = right and near
    if options.write is not None:
        replace_table(options.write, table(rows, options.backends))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
