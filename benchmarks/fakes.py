"""What `install()` costs with the whole library of fake kernels, and how much of that the library is.

    python benchmarks/fakes.py [--rounds N] [--json FILE]

On the simulated musa in this environment, and on the real torch_npu where `make npu` has made one. Each round starts
fresh processes in turn: `install()` as it is, and with an empty library; each takes the time of its first `install()`,
after torch (and torch_npu) have been imported, and of a second one after `uninstall()`. "cpu" is the processor time of
the first one, which other processes disturb less, "library" is what the first one costs more than with an empty
library, "collections" what of the first one is Python's garbage collector, which walks all that torch has made when a
few thousand objects more come. Bytecode is cached, as in an installed package. Target: the first one under 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interleaved import difference, summary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "vendor"))
from npu_python import environment, interpreter  # noqa: E402

MEASURE = """
import gc, json, time
{prepare}
import fxpatch
{empty}
before = set(__import__("sys").modules)
collecting = [0.0]
def watch(phase, _):
    collecting[0] += time.perf_counter() * (1e3 if phase == "stop" else -1e3)
gc.callbacks.append(watch)
def milliseconds():
    start, work = time.perf_counter(), time.process_time()
    installation = fxpatch.install({device!r})
    return (time.perf_counter() - start) * 1e3, (time.process_time() - work) * 1e3, installation
first, busy, installation = milliseconds()
collections = collecting[0]
kinds = [type(outcome).__name__ for outcome in installation.fakes.values()]
installation.uninstall()
again, _, installation = milliseconds()
imported = sorted({{name.partition(".")[0] for name in set(__import__("sys").modules) - before}})
print("RESULT", json.dumps([first, busy, collections, again, {{kind: kinds.count(kind) for kind in kinds}}, imported]))
"""
NPU, MUSA = "import torch, torch_npu", "import torch, fxpatch; fxpatch.simulate('musa')"
WITHOUT = "import fxpatch.fakes; fxpatch.fakes.library.load = lambda *_: ()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    devices = {"musa, simulated": (sys.executable, {**os.environ, "FXPATCH_AUTOLOAD": "0"}, MUSA, "musa")}
    python = interpreter()
    if python is not None:
        devices["npu, torch_npu"] = (str(python), environment(python), NPU, "npu")
    results = {}
    for name, (binary, variables, prepare, device) in devices.items():
        with tempfile.TemporaryDirectory() as cache:
            variables = {**variables, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
            results[name] = each = measure(binary, variables, prepare, device, options.rounds)
        print(f"{name}: {', '.join(f'{number} {kind}' for kind, number in each['outcomes'].items())}")
        for case in ("first", "cpu", "library", "collections", "again"):
            print(f"  {case:11} median {each[case]['median_ms']:6.2f} ms   IQR {each[case]['iqr_ms']:5.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


def measure(python: str, env: dict[str, str], prepare: str, device: str, rounds: int) -> dict[str, Any]:
    """`first` and `again`: an install(); `library`: what of the first one is the library's."""
    with_it, without, again, collecting, busy_in = [], [], [], [], []
    for turn in range(rounds + 1):
        for empty in ("", WITHOUT) if turn % 2 else (WITHOUT, ""):
            code = MEASURE.format(prepare=prepare, empty=empty, device=device)
            done = subprocess.run([python, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            first, busy, collections, second, kinds, imported = json.loads(done.stdout.split("RESULT ", 1)[1])
            if turn == 0:
                continue  # files that nobody has read yet
            (without if empty else with_it).append(first)
            if not empty:
                again.append(second)
                collecting.append(collections)
                busy_in.append(busy)
                outcomes, modules = kinds, imported
    return {
        "first": summary(with_it),
        "cpu": summary(busy_in),
        "library": difference(with_it, without),
        "collections": summary(collecting),
        "again": summary(again),
        "outcomes": outcomes,
        "imported": modules,
    }


if __name__ == "__main__":
    main()
