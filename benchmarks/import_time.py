"""What fxpatch adds to `import torch`: the `torch.backends` entry point, without a device and with one.

    python benchmarks/import_time.py [--rounds N] [--json FILE]

Each round starts fresh processes in turn (A, B, A, B, ...) and takes, inside each, the time of the entry point itself
as torch calls it: loading it (`import fxpatch.autoload`) and running it. The whole `import torch` is measured beside
it, for scale; its own spread is larger than what is measured here. Target: under 5 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = 'import types; torch.utils.rename_privateuse1_backend("musa");'
NAME += 'torch._register_device_module("musa", types.ModuleType("torch.musa"));'
ENTRY = """
import sys, time
sys.path.insert(0, {root!r})
begin = time.perf_counter()
import torch
whole = time.perf_counter() - begin
{named}
begin = time.perf_counter()
from fxpatch.autoload import autoload
autoload()
print(time.perf_counter() - begin, whole)
"""


def measure(named: bool) -> tuple[float, float]:
    """Milliseconds of the entry point, and of `import torch` without it, in one fresh process."""
    code = ENTRY.format(root=str(ROOT), named=NAME if named else "")
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "FXPATCH_AUTOLOAD": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    entry, whole = map(float, out.split())
    return entry * 1000, whole * 1000


def summary(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    return {"median_ms": statistics.median(values), "iqr_ms": quarters[2] - quarters[0], "min_ms": min(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    samples: dict[str, list[float]] = {"no device": [], "device named": [], "import torch": []}
    for _ in range(options.rounds):
        for case, named in (("no device", False), ("device named", True)):
            entry, whole = measure(named)
            samples[case].append(entry)
            samples["import torch"].append(whole)
    result = {case: summary(values) for case, values in samples.items()}
    for case, numbers in result.items():
        spread = f"IQR {numbers['iqr_ms']:7.2f}   min {numbers['min_ms']:8.2f}"
        print(f"{case:13}  median {numbers['median_ms']:8.2f} ms   {spread}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
