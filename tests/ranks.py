"""Python source on several ranks, with gloo between them. A rank that hangs is ended, and the test fails."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

TESTS = Path(__file__).parent

_PRELUDE = """
import datetime, os, sys, time, warnings
import torch, torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import fxpatch
from fxpatch.piecewise.runner import PiecewiseRunner

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=os.environ["STORE"], rank=RANK, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
)

def all_succeeded(ok):
    answer = torch.tensor(int(ok))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)
"""

# A rank that is through waits for the others outside of gloo, and ends without destructors: gloo's, which run while
# another rank still has the connection, have been seen to abort the process (an exception in a thread of theirs).
_END = """
sys.stdout.flush()
sys.stderr.flush()
open(os.environ["STORE"].removeprefix("file://") + f".{RANK}", "w").close()
while not all(os.path.exists(os.environ["STORE"].removeprefix("file://") + f".{rank}") for rank in range(WORLD)):
    time.sleep(0.01)
os._exit(0)
"""


def on_ranks(code: str, store: Path, world: int = 2, timeout: float = 200, prelude: str = _PRELUDE) -> list[str]:
    """What each rank printed. The code finds RANK, WORLD, `dist`, `funcol`, `all_succeeded`, `PiecewiseRunner`.

    Args:
        code: Python source.
        store: a file that is not there yet, for the ranks to meet at.
        timeout: seconds for all of them together.
        prelude: what comes before; it joins the group, and says what RANK and WORLD are.
    """
    source = prelude + textwrap.dedent(code) + _END
    started = [
        subprocess.Popen(
            [sys.executable, "-c", source],
            cwd=TESTS,
            env={
                **os.environ, "FXPATCH_AUTOLOAD": "0", "RANK": str(rank), "WORLD_SIZE": str(world),
                "STORE": f"file://{store}", "GLOO_SOCKET_IFNAME": "lo",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout
    printed, failed = [], []
    try:
        for rank, process in enumerate(started):
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            printed.append(out)
            if process.returncode != 0:
                failed.append(f"rank {rank}: exit {process.returncode}\n{out}\n{err}")
    except subprocess.TimeoutExpired:
        failed.append(f"no end after {timeout} s")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                out, err = process.communicate()
                failed.append(f"ended: {out}\n{err}")
    assert not failed, "\n".join(failed)
    return printed
