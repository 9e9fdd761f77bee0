"""The doctor's end of a zygote: a process that is started, asked, and replaced when it is lost.

The doctor's own process imports neither torch nor the vendor's package, and touches no device: whatever these do to a
process, they do it to another.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxpatch.doctor.zygote import AUTOLOAD, MOST_PATIENCE
from fxpatch.errors import DoctorError

JOBS = 2
"""Zygotes side by side: a probe is mostly imports and a compiler, which use one core."""
START_LIMIT_S = 300.0
_GRACE_S = 30.0
"""What a zygote has for itself: forking, killing, and a machine that is busy."""


@dataclass(frozen=True)
class Ended:
    """One request's process, once it is no more.

    Args:
        answer: what it said; None where it did not come to it.
        how: how it ended, where it did not end well: `killed by signal SIGSEGV`, `exit status 3`, `no answer within
            20 s`.
        output: the last of what it wrote to stdout and stderr.
        seconds: from fork to end.
    """

    answer: dict[str, Any] | None
    how: str = ""
    output: str = ""
    seconds: float = 0.0


class Zygote:
    """A running `fxpatch.doctor.zygote`, which greets, and then serves one request at a time.

    Args:
        probes: the module that has `PROBES`.
        folder: where compilers cache and temporary files go; exists.

    Raises:
        DoctorError: no process can be started.

    Attributes:
        greeting: `torch`, its version, and `probes`, a list; None as long as `receive` has not had it.
        lost: `receive` has found it ended, or has ended it; nothing can be asked any more.
    """

    def __init__(self, probes: str, folder: str) -> None:
        self.greeting: dict[str, Any] | None = None
        self.lost = False
        self._rest = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fxpatch.doctor.zygote", probes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(folder),
                start_new_session=True,  # Ctrl-C is for the doctor, which ends its zygotes itself
            )
        except OSError as error:
            self._errors.close()
            raise _no_start(str(error)) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._replies.fileno(), False)
        self.deadline = self._begun = time.monotonic()
        self.deadline += START_LIMIT_S

    def fileno(self) -> int:
        """Readable when `receive` has something to say, for selectors."""
        return self._replies.fileno()

    def send(self, request: Mapping[str, Any]) -> None:
        """One request: `ready_s`, `limit_s`, `patient` and what `child.answer` wants. That a zygote is gone is noticed
        by `receive`."""
        self._begun = time.monotonic()
        self.deadline = self._begun + MOST_PATIENCE * (request["ready_s"] + request["limit_s"]) + _GRACE_S
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()

    def receive(self) -> Ended | None:
        """What has come; None for the greeting, or where no whole line has come yet.

        Raises:
            DoctorError: the zygote has ended before it greeted.
        """
        data = self._replies.read()
        if data == b"" or (data is None and time.monotonic() > self.deadline):
            return self._lost("" if data is not None else "does not answer, and was killed")
        *lines, self._rest = (self._rest + (data or b"")).split(b"\n")
        for line in lines:
            if self.greeting is not None:
                return Ended(**json.loads(line))
            self.greeting = json.loads(line)
        return None

    def ask(self, request: Mapping[str, Any]) -> Ended:
        """`send`, and wait for the answer; for the greeting first, if need be."""
        while self.greeting is None:
            self._wait()
            self.receive()
        self.send(request)
        while True:
            self._wait()
            ended = self.receive()
            if ended is not None:
                return ended

    def close(self) -> None:
        """Ends it, and with it whatever it has started."""
        if self.greeting is None:
            self._process.kill()  # it has forked nothing yet
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()  # it kills what it waits for, and ends by itself
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # what it has forked gets the same from the kernel
            self._process.wait()
        self._replies.close()
        self._errors.close()

    def _wait(self) -> None:
        select.select([self], [], [], max(0.0, self.deadline - time.monotonic()))

    def _lost(self, how: str) -> Ended:
        self.lost = True
        if how:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)  # its pipe closes a moment before it is gone
        code = self._process.poll()
        if not how and code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self._errors.seek(0)
        output = self._errors.read().decode(errors="replace")[-4000:]
        if self.greeting is None:
            raise _no_start(f"it {how}: {output.strip() or 'it wrote nothing'}")
        how = f"the process that starts the probes {how}: out of memory, perhaps"
        return Ended(None, how, output, time.monotonic() - self._begun)


def _no_start(seen: str) -> DoctorError:
    return DoctorError(
        "The doctor cannot start a process with torch.",
        seen=seen,
        expected=f"{sys.executable} -c 'import torch' to work",
        hint="mend this installation of torch first; where it works, there was no memory or no process left",
    )


def _environment(folder: str) -> dict[str, str]:
    """A zygote's: this process's modules can be imported, nothing loads a device by itself, no cache is warm."""
    threads = max(1, len(os.sched_getaffinity(0)) // JOBS)
    return {
        "OMP_NUM_THREADS": str(threads),  # unless the user has said how many
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "FXPATCH_AUTOLOAD": "0",  # the probes install it, or do not
        AUTOLOAD: "0",  # each forked process does it itself
        "TMPDIR": folder,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",  # what another probe compiled would hide what is broken in this one
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes for each probe
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # takes longer than the few kernels it would serve
    }
