"""A process that has imported torch and initialised nothing, and forks a process for each request.

Starting Python and importing torch takes seconds, and forking milliseconds; so some thirty probes, each in a process of
its own, are affordable. What keeps that honest: nothing here loads a vendor's package, Dynamo or a device, and one
request is served at a time, so that whatever is still alive after it is the request's, and is killed.

A request is a line of JSON on stdin: `limit_s`, the seconds that it has; `patient`, whether it has more on a machine
that is busy with other things; `ready_s`, the seconds before that until its process has imported the vendor's modules;
and what `child.answer` wants. The reply is a line of JSON on stdout: `answer`, what the process said, or null; `how` it
ended, where it did not end well; `output`, the last of what it wrote to stdout and stderr; `seconds`. Before the first
request comes the greeting: which probes there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxpatch.doctor.probe import Probe

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's own switch: 0 keeps `import torch` from loading the vendors' packages."""
READY = b"ready\n"
MOST_PATIENCE = 4.0
_KILL_LIMIT_S = 5.0
_OUTPUT_BYTES = 16_384
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(probes: str) -> None:
    """Serves requests until stdin ends.

    Args:
        probes: the module that has `PROBES`.
    """
    requests, replies = os.dup(0), os.dup(1)
    _redirect(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # what an import prints is no reply
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of a request become our children
    known: dict[str, Probe] = {each.name: each for each in importlib.import_module(probes).PROBES}
    import torch

    importlib.import_module("fxpatch.doctor.child")
    importlib.import_module("sympy")  # of what Dynamo imports, what takes a second and knows no device
    _write(replies, {"torch": torch.__version__, "probes": [_described(each) for each in known.values()]})
    with os.fdopen(requests, "rb", buffering=0) as lines:
        for line in lines:
            _write(replies, _serve(json.loads(line), known, lines.fileno(), replies))


def _serve(request: dict[str, Any], known: dict[str, Probe], requests: int, replies: int) -> dict[str, Any]:
    """One request, in a process that does not outlive it."""
    answers, output = os.pipe(), os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        for descriptor in (requests, replies, answers[0], output[0]):
            os.close(descriptor)
        _be_child(request, known, answers[1], output[1])
    for descriptor in (answers[1], output[1]):
        os.close(descriptor)
    running = _Running(pid, answers[0], output[0], requests, request["ready_s"], request["limit_s"], request["patient"])
    try:
        how = running.wait()
    finally:
        _kill_orphans()
        running.close()
    return {
        "answer": running.answer(),
        "how": how,
        "output": bytes(running.output).decode(errors="replace"),
        "seconds": time.monotonic() - begun,
    }


@dataclass
class _Running:
    """One request's process, from here: its number, our ends of its pipes, and what has come through them."""

    pid: int
    answers: int
    outputs: int
    requests: int
    ready_s: float
    limit_s: float
    patient: bool

    def __post_init__(self) -> None:
        self.said, self.output = bytearray(), bytearray()
        self.ended = os.pidfd_open(self.pid)
        for descriptor in (self.answers, self.outputs):
            os.set_blocking(descriptor, False)

    def wait(self) -> str:
        """Until it has ended, or has been killed; how it ended, and `""` where all went well."""
        killed = ""
        ready = False
        limit = self.ready_s
        begun = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for descriptor in (self.ended, self.answers, self.outputs, self.requests):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                events = {key.fd for key, _ in selector.select(max(0.0, begun + limit - time.monotonic()))}
                for open_ in events & {self.answers, self.outputs}:
                    if not self._drain(open_):
                        selector.unregister(open_)
                if self.ended in events:
                    break
                if self.requests in events:  # nothing is sent while we are busy: the doctor has gone
                    _kill(self.pid)
                    _kill_orphans()
                    os._exit(1)
                if not ready and self.said.startswith(READY):
                    ready, limit, begun = True, self.limit_s, time.monotonic()
                elif time.monotonic() >= begun + limit:
                    if killed:
                        return f"{killed}, and it cannot be killed"
                    longer = (self.limit_s if ready else self.ready_s) * (busy() if self.patient else 1.0)
                    if longer > limit:
                        limit = longer
                        continue
                    killed = f"no answer within {limit:.3g} s" + ("" if ready else " while it was made ready")
                    _kill(self.pid)
                    limit, begun = _KILL_LIMIT_S, time.monotonic()
        _kill(self.pid)  # what is left of its group, while its number cannot be anybody else's
        _, status = os.waitpid(self.pid, 0)
        for descriptor in (self.answers, self.outputs):
            self._drain(descriptor)
        return killed or _how(os.waitstatus_to_exitcode(status))

    def answer(self) -> Any:
        """What it said, if it came to say all of it."""
        text = bytes(self.said).removeprefix(READY)
        return json.loads(text) if text.endswith(b"\n") else None

    def close(self) -> None:
        """Our ends."""
        for descriptor in (self.ended, self.answers, self.outputs):
            os.close(descriptor)

    def _drain(self, descriptor: int) -> bool:
        """Reads what there is; False at the end."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(descriptor, 65536):
                if descriptor == self.answers:
                    self.said += data
                else:
                    self.output = (self.output + data)[-_OUTPUT_BYTES:]
            return False
        return True


def _be_child(request: dict[str, Any], known: dict[str, Probe], answers: int, output: int) -> None:
    """The forked process: never returns."""
    status, pid = 1, os.getpid()

    def tell(write: Callable[[], object]) -> None:
        if os.getpid() == pid:  # a vendor's or a model's code that forks and comes back twice, has one answer
            write()

    try:
        os.setsid()  # a group of its own, so that all of it can be killed
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _redirect(output, 1, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable(file=2)  # where in Python a crash happened
        from fxpatch.doctor import child

        said = child.answer(request, known, ready=lambda: tell(lambda: os.write(answers, READY)))
        tell(lambda: _write(answers, said))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def busy() -> float:
    """How many times longer work takes here now than on an idle machine: 1 to `MOST_PATIENCE`."""
    return min(MOST_PATIENCE, max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0))))


def _how(code: int) -> str:
    if code < 0:
        return f"killed by signal {signal.Signals(-code).name}"
    return f"exit status {code}" if code else ""


def _kill(pid: int) -> None:
    """The process and its group."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _kill_orphans() -> None:
    """Whatever a request has left behind, wherever it went: it has become a child of this process."""
    for _ in range(100):  # killing one hands us its children
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(pid) for pid in file.read().split()]
        except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN: their group has been killed, at least
            return
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _described(probe: Probe) -> dict[str, Any]:
    return {
        name: getattr(probe, name) for name in ("name", "stage", "title", "why", "todo", "limit_s", "installs")
    }  # its function stays here


def _redirect(descriptor: int, *to: int) -> None:
    for each in to:
        os.dup2(descriptor, each)
    os.close(descriptor)


def _write(descriptor: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]


def _prctl(option: int, value: int) -> None:
    """Linux's prctl(2); where it fails, a killed process may leave others behind, and nothing else is different."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1])
