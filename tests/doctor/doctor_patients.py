"""Probes for the tests of the doctor: each ends in another way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import fxpatch
from fxpatch.doctor.probe import Broken, NotApplicable, Probe, Subject

HOSTILE = "</script><script>alert('x')</script>[red]\x1b[31m\" onload='x' &amp; \ud800 caf\u00e9"


def fine(subject: Subject) -> str:
    return f"{torch.ones(2, device=subject.device).sum().item():.0f} on {subject.device}"


def repaired(subject: Subject) -> str:
    if not fxpatch.status().installed:
        raise ValueError("first line\nsecond line")
    return "well now"


def broken(subject: Subject) -> str:
    raise LookupError(HOSTILE)


def diagnosed(subject: Subject) -> str:
    raise Broken("seen: a wheel is missing", why="it falls over", todo="put it back")


def absent(subject: Subject) -> str:
    raise NotApplicable("there is no wheel to be missing")


def crashes(subject: Subject) -> str:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def hangs(subject: Subject) -> str:
    print("hanging", flush=True)
    time.sleep(600)
    return "never"


def exits(subject: Subject) -> str:
    os._exit(7)


def leaves(subject: Subject) -> str:
    """Children that outlive it: one in its group, one in a session of its own."""
    code = "import time; time.sleep(600)"
    pids = [subprocess.Popen([sys.executable, "-c", code], start_new_session=own).pid for own in (False, True)]
    return " ".join(map(str, pids))


def talks(subject: Subject) -> str:
    sys.stdout.write("x" * 10_000_000 + "\nthe end\n")
    sys.stdout.flush()
    raise SystemExit(3)


def kills_its_starter(subject: Subject) -> str:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    return "never"


def clean(subject: Subject) -> str:
    """What its process looked like when the probe began."""
    loaded = [name for name in ("torch._dynamo", "torch._inductor", "torch_npu") if name in sys.modules]
    return f"loaded {loaded}, cache {os.environ['TORCHINDUCTOR_CACHE_DIR']}, autoload {os.environ.get(AUTOLOAD)}"


def drops(subject: Subject) -> str:
    if not fxpatch.status().installed:
        raise ValueError("broken")
    raise NotApplicable("not any more")


def deep(subject: Subject) -> str:
    def deeper() -> int:
        return 1 // 0

    return str(deeper())


AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _probe(run: Callable[[Subject], str], stage: str = "device", **options: Any) -> Probe:
    name = run.__name__.replace("_", "-")
    return Probe(name, stage, name.replace("-", " "), run, f"why of {name}", f"what to do about {name}", **options)


PROBES = (
    _probe(fine),
    _probe(clean),
    _probe(repaired, "fx"),
    _probe(broken, "dynamo"),
    _probe(diagnosed, "dynamo"),
    _probe(absent, "aot"),
    _probe(crashes, "inductor", installs=False),
    _probe(hangs, "numerics", limit_s=0.5, installs=False),
    _probe(exits, "runtime", installs=False),
    _probe(leaves, "processes"),
    _probe(talks, "processes", installs=False),
    _probe(drops, "artifacts"),
    _probe(deep, "artifacts"),
    _probe(kills_its_starter, "versions", installs=False),
)
