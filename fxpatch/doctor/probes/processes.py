"""Other processes: workers that load data, children that use the device after a fork, children that start anew.

What a child does may hang, so each has a time limit, and is ended by its number.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import expect, in_words
from fxpatch.doctor.probes.presence import needs_accelerator

_LIMIT_S = 8.0
_SPAWN_LIMIT_S = 30.0


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    """What a DataLoader's worker hands over: CPU tensors."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= len(self):
            raise IndexError(index)
        return torch.full((3,), float(index))


def _worker(subject: Subject) -> str:
    needs_accelerator(subject)
    used = torch.ones(3, device=subject.device)  # the parent has used the device, as training loops have
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=_LIMIT_S
    )
    got = [float((batch.to(subject.device) * used).sum()) for batch in loader]
    expect(got, [18.0, 66.0], "the sums of two batches")
    return "a forked worker hands over CPU tensors while the device is in use"


def _forked_child(work: Callable[[], str]) -> str:
    """What `work` says in a forked child; what it raises, after `"error: "`.

    Raises:
        Broken: the child hangs, or dies.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = work()
        except BaseException as error:
            said = f"error: {in_words(error)}"
        os.write(writing, said.encode() + b"\n")
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], _LIMIT_S)
        if not ready:
            raise Broken(f"a forked child that uses the device hangs: no answer within {_LIMIT_S:g} s")
        said = os.read(reading, 4096).decode(errors="replace").strip()
    finally:
        os.close(reading)
        _end(pid)
    if not said:
        raise Broken("a forked child that uses the device dies without a word")
    return said


def _end(pid: int) -> None:
    """The end of a child of ours, whether it has come to its own or not."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _fork(subject: Subject) -> str:
    needs_accelerator(subject)
    x = torch.arange(4.0, device=subject.device)
    want = (x + 1).tolist()

    said = _forked_child(lambda: repr((x + 1).tolist()))
    fresh = _forked_child(lambda: repr((torch.arange(4.0, device=subject.device) + 1).tolist()))
    for what, answer in (("the parent's tensor", said), ("a tensor of its own", fresh)):
        if not answer.startswith("error: ") and answer != repr(want):
            raise Broken(f"a forked child computes {answer} from {what}, and the parent {want}")
    expect((x + 1).tolist(), want, "what the parent computes after its children")
    return f"a child that uses the device gets {'an error' if said.startswith('error') else 'the right result'}"


def spawned(connection: Any, subject: Subject, given: torch.Tensor) -> None:
    """What a spawned child does: the vendor's imports, then one computation on the device."""
    try:
        for module in subject.imports:
            importlib.import_module(module)
        if subject.simulated:
            from fxpatch.simulator.registration import simulate

            simulate(subject.device)
        connection.send((given.to(subject.device) * 2).tolist())
    except Exception as error:
        connection.send(f"error: {in_words(error)}")


def _spawn(subject: Subject) -> str:
    needs_accelerator(subject)
    torch.ones(3, device=subject.device)
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=spawned, args=(sender, subject, torch.tensor([1.0, 2.0])), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(_SPAWN_LIMIT_S):
            raise Broken(f"a spawned child that uses the device does not answer within {_SPAWN_LIMIT_S:g} s")
        try:
            said = receiver.recv()
        except EOFError as error:
            child.join()
            raise Broken(f"a spawned child that uses the device dies with exit code {child.exitcode}") from error
    finally:
        child.kill()
        child.join()
    if isinstance(said, str):
        raise Broken(f"a spawned child cannot use the device: {said.removeprefix('error: ')}")
    expect(said, [2.0, 4.0], "what a spawned child computes")
    return "a spawned child uses the device"


PROBES = (
    Probe(
        name="data-workers",
        stage="processes",
        title="data loading in workers",
        run=_worker,
        why="DataLoader forks its workers while the parent uses the device: a runtime whose threads hold locks at the "
        "fork makes them hang",
        todo="multiprocessing_context='spawn' for DataLoader; vendor: pthread_atfork handlers in the runtime",
        installs=False,
    ),
    Probe(
        name="fork",
        stage="processes",
        title="the device after a fork",
        run=_fork,
        why="a device that was used before a fork cannot be used in the child; without _is_in_bad_fork and an error it "
        "hangs or computes garbage (torch/cuda/__init__.py, _lazy_init)",
        todo="use the start method 'spawn'; vendor: raise in the child, as torch.cuda does",
        limit_s=40.0,
        installs=False,
    ),
    Probe(
        name="spawn",
        stage="processes",
        title="the device in a new process",
        run=_spawn,
        why="engines start their workers by spawn: the child has to import the vendor's package again, by torch's "
        "entry point or by itself (out-of-tree catalogue A13)",
        todo="import the vendor's package at the top of the program's main module, outside `if __name__`",
        limit_s=45.0,
        installs=False,
    ),
)
