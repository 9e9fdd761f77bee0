"""Probes of which the second is the last that a process can be started for: `DOCTOR_LATE` names a file that tells."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fxpatch.doctor.probe import Probe, Subject

BROKEN_NOW = Path(os.environ["DOCTOR_LATE"])
if BROKEN_NOW.exists():
    raise OSError("libtorch.so: cannot open shared object file")


def first(subject: Subject) -> str:
    return "found"


def forks(subject: Subject) -> str:
    os.fork()
    return "one of two"


def last(subject: Subject) -> str:
    return "never asked"


def breaks_torch(subject: Subject) -> str:
    BROKEN_NOW.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    return "never"


PROBES = tuple(
    Probe(run.__name__.replace("_", "-"), "device", run.__name__, run, "why", "to do", limit_s=limit)
    for run, limit in ((first, 90.0), (forks, 80.0), (breaks_torch, 70.0), (last, 60.0))
)
