"""Workers. The problem: one operator that crashes or hangs must not take the run along, and has to be named. The rule:
a worker runs one case at a time; if it dies or takes too long, that case is to blame, and a new worker goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from opinfo.cases import COMPILED, Case
from opinfo.results import CRASHED, HUNG, Result

COMMAND = (sys.executable, "-m", "opinfo.worker")
_CASES_PER_WORKER = 400  # what compilers keep adds up
_STARTS_WITHIN = 300.0


def run_all(
    cases: Iterable[Case],
    device: str,
    *,
    workers: int = 2,
    limit: Callable[[Case], float] = lambda case: 600 if case.stage in COMPILED else 300,
    done: Callable[[Result], None] = lambda result: None,
    command: Sequence[str] = COMMAND,
) -> list[Result]:
    """Runs all cases, each on one of the workers; the results come in any order.

    Args:
        limit: seconds that a case may take.
        done: called with every result, one at a time.
        command: what starts a worker, up to the name of the device.
    """
    todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)
    results: list[Result] = []
    one_at_a_time = threading.Lock()

    def work() -> None:
        worker = Worker(device, command)
        try:
            while True:
                try:
                    case = todo.get_nowait()
                except queue.Empty:
                    return
                if worker.ended or worker.cases >= _CASES_PER_WORKER:
                    worker.end()
                    worker = Worker(device, command)
                result = worker.run(case, limit(case))
                with one_at_a_time:
                    results.append(result)
                    done(result)
        finally:
            worker.end()

    with ThreadPoolExecutor(workers) as threads:
        for working in [threads.submit(work) for _ in range(workers)]:
            working.result()
    return results


class Worker:
    """A process that answers cases."""

    def __init__(self, device: str, command: Sequence[str] = COMMAND) -> None:
        self.cases = 0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        tests = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [*command, device],
            env={**os.environ, "PYTHONPATH": path, "FXPATCH_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, case: Case, limit: float) -> Result:
        """The result of a case; if there is none, because the process ended or took too long, that is the result."""
        self.cases += 1
        if self.cases == 1 and self._answer(_STARTS_WITHIN) is None:  # imports are not the case's time
            return Result(case).gave_out(CRASHED, f"the worker does not start: {self._how_it_ended()}")
        try:
            _pipe(self._process.stdin).write(json.dumps(dataclasses.asdict(case)).encode() + b"\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError:
            self._process.wait()  # it died after its last answer; and said nothing, so this case is to blame
        reply = self._answer(limit)
        if reply is not None:
            return Result(**{**reply, "case": case})
        if self.ended:
            return Result(case).gave_out(CRASHED, self._how_it_ended())
        self.end()
        return Result(case, seconds=limit).gave_out(HUNG, f"no result after {limit:g} seconds")

    def _answer(self, limit: float) -> Any:
        """The next line of the process; None if it ends, or is silent for so many seconds."""
        replies = _pipe(self._process.stdout)
        if not select.select([replies], [], [], limit)[0]:
            return None
        line = replies.readline()
        if line.endswith(b"\n"):
            return json.loads(line)
        self._process.wait()
        return None

    def _how_it_ended(self) -> str:
        code = self._process.poll()
        how = "still running" if code is None else signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        fatal = said.rfind("Fatal Python error")  # faulthandler's; its traceback and list of modules may be long
        return f"{how}: {said[fatal : fatal + 1500] if fatal >= 0 else said[-1500:]}"

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            try:
                _pipe(pipe).close()
            except BrokenPipeError:
                continue  # a request that was never read


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
