"""Worker processes: one operator each at a time, a time limit, and a new process for every one that dies.

What a worker was doing when it died, or when its time was up, is the last stage it announced; the operator is then
taken up again without that stage by a new worker, so that one crash hides nothing but itself.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any, BinaryIO

from fake_kernels.audit.errors import ImportFailedError, WorkerFailedError
from fake_kernels.audit.findings import Finding
from fake_kernels.audit.probes import SEARCH

Progress = Callable[[int, int, str], None]
_START_LIMIT_S = 300.0


class Worker:
    """One process. `operator` is what it is at, `stage` how far it has got, `deadline` when its time is up; once it has
    ended, `last_output` is the last line that it printed."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.operator = self.stage = self.last_output = ""
        self.deadline = time.monotonic() + _START_LIMIT_S
        self._output: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        ours, theirs = os.pipe(), os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # the worker does it itself, once it can overhear registrations
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fake_kernels.audit.worker", str(theirs[0]), str(ours[1])],
            pass_fds=(theirs[0], ours[1]),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self.answers, self._requests = ours[0], theirs[1]
        self._rest = b""
        self.send(start)

    def send(self, message: dict[str, Any]) -> None:
        """One request. A worker that is gone is noticed where its answers end."""
        try:
            os.write(self._requests, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self.stage = self.stage or "start"

    def receive(self) -> list[dict[str, Any]] | None:
        """The complete answers that have come; None once there will be no more."""
        data = os.read(self.answers, 65536)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> str:
        """Ends the process, and says how it ended: `signal SIGSEGV`, `exit status 3`, `killed`.

        One that waits for a request ends by itself; one that does not within 2 s is killed."""
        os.close(self._requests)
        killed = False
        if self.process.poll() is None:
            try:
                self.process.wait(2.0)
            except subprocess.TimeoutExpired:
                killed = True
                self.process.kill()
        code = self.process.wait()
        os.close(self.answers)
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        self.last_output = lines[-1][:200] if lines else ""
        self._output.close()
        if killed:
            return "killed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def start_worker(start: dict[str, Any]) -> tuple[Worker, dict[str, Any]]:
    """A worker, and its first answer.

    Raises:
        ImportFailedError: a module cannot be imported.
        WorkerFailedError: the process ended, or hung, before it could answer.
    """
    worker = Worker(start)
    with selectors.DefaultSelector() as selector:
        selector.register(worker.answers, selectors.EVENT_READ)
        while selector.select(max(0.0, worker.deadline - time.monotonic())):
            received = worker.receive()
            if received is None:
                break
            if received:
                if "import_failed" in received[0]:
                    worker.end()
                    raise ImportFailedError(received[0]["import_failed"], received[0]["error"])
                return worker, received[0]
    how = worker.end()
    raise WorkerFailedError(how, worker.last_output)


class Pool:
    """Audits `operators` with up to `jobs` workers; `first` is one that has already answered."""

    def __init__(
        self, start: dict[str, Any], operators: list[str], first: Worker, jobs: int, limit_s: float, progress: Progress
    ) -> None:
        self.start, self.first, self.jobs, self.limit_s, self.progress = start, first, jobs, limit_s, progress
        self.total = len(operators)
        self.waiting: deque[tuple[str, tuple[str, ...]]] = deque((name, ()) for name in operators)
        self.skipped: dict[str, tuple[str, ...]] = {}
        self.findings: list[Finding] = []
        self.states: dict[str, str] = {}
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Until every operator has a state."""
        workers = [self.first]
        try:
            while len(workers) < min(self.jobs, 1 + self.total // 8):
                workers.append(Worker(self.start))
            for worker in workers:
                self.selector.register(worker.answers, selectors.EVENT_READ, worker)
            self._next(self.first)
            while len(self.states) < self.total:
                self._turn(workers)
        finally:
            self.selector.close()
            for worker in workers:
                os.set_blocking(worker.answers, False)
                if worker.operator:  # it is not through: something has been raised here
                    worker.process.kill()
                worker.end()

    def _turn(self, workers: list[Worker]) -> None:
        wait = min(worker.deadline for worker in workers) - time.monotonic()
        for key, _ in self.selector.select(min(max(0.0, wait), 1.0)):
            worker = key.data
            received = worker.receive()
            if received is None:
                self._lost(workers, worker, "crash")
                continue
            for message in received:
                self._take(worker, message)
        for worker in list(workers):
            if worker.operator and time.monotonic() > worker.deadline:
                self._lost(workers, worker, "hang")

    def _take(self, worker: Worker, message: dict[str, Any]) -> None:
        if "stage" in message:
            worker.stage = message["stage"]
        elif "finding" in message:
            fields = {name: value for name, value in message["finding"].items() if name != "level"}
            self.findings.append(Finding(**fields))
        else:  # a state, or the greeting of a new worker
            if "state" in message:
                self._done(worker.operator, message["state"])
            self._next(worker)

    def _done(self, operator: str, state: str) -> None:
        if operator not in self.states:
            self.states[operator] = state
            self.progress(len(self.states), self.total, operator)

    def _next(self, worker: Worker) -> None:
        worker.operator = worker.stage = ""
        worker.deadline = time.monotonic() + 3600.0
        if self.waiting:
            name, skip = self.waiting.popleft()
            worker.operator, worker.deadline = name, time.monotonic() + self.limit_s
            worker.send({"operator": name, "skip": skip})

    def _lost(self, workers: list[Worker], worker: Worker, rule: str) -> None:
        self.selector.unregister(worker.answers)
        workers.remove(worker)
        if rule == "hang":
            worker.process.kill()
        how = worker.end()
        name, stage = worker.operator, worker.stage or "start"
        if not name:
            raise WorkerFailedError(how, worker.last_output)
        text = f"no answer within {self.limit_s:g} s" if rule == "hang" else f"the process ended with {how}"
        last = worker.last_output if rule == "crash" else ""
        self.findings.append(
            Finding(name, rule, f"{text} in the stage: {stage}" + (f"; its last words: {last}" if last else ""))
        )
        skip = (*self.skipped.get(name, ()), stage)
        if stage == SEARCH or stage == "start" or len(skip) > 8:
            self._done(name, rule)
        else:
            self.skipped[name] = skip
            self.waiting.appendleft((name, skip))
        if self.waiting:
            new = Worker(self.start)
            workers.append(new)
            self.selector.register(new.answers, selectors.EVENT_READ, new)
