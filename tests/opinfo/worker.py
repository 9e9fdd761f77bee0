"""The process in which cases run. It says when it is ready; then it is one line of JSON in, one out. If an operator
takes the process down, whoever reads the output knows which it was. `python -m opinfo.worker musa` simulates that
device first.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import sys
import time
import traceback
import warnings

import torch

from opinfo import eager, modules
from opinfo.cases import COMPILED, Case, infos
from opinfo.results import FAILED, Result


def run(case: Case, device: str) -> Result:
    """Runs a case in this process."""
    start = time.perf_counter()
    if case.stage in COMPILED:
        from opinfo import compiled  # here, because it imports the compiler

        stage = compiled.run
    else:
        stage = modules.run if case.suite == "module" else eager.run
    try:
        result = stage(case, device)
    except Exception:
        result = Result(case).gave_out(FAILED, f"the harness: {traceback.format_exc(limit=-3)}")
    result.seconds = round(time.perf_counter() - start, 3)
    return result


def main(device: str) -> None:
    """Answers cases until there are no more."""
    faulthandler.enable()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what operators print is not a reply
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if device != "cpu":
        import fxpatch

        fxpatch.simulate(device)
    infos("op")  # takes seconds
    replies.write('"ready"\n')
    for line in sys.stdin:
        result = run(Case(**json.loads(line)), device)
        replies.write(json.dumps(dataclasses.asdict(result)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
