"""What a probe is: one question about a device, asked in a process of its own.

A probe's function gets the `Subject` and returns one line that says what it found, or raises. By the time it runs, its
process has torch, has imported the vendor's modules, has simulated the device where that was asked for, and has or has
not called `fxpatch.install()`; a probe does none of that itself, and may leave its process in any state, or end it.

Inductor's cache folder is the doctor's own, shared by the probes so that C++ is compiled once; its caches of whole
graphs are off, and a probe that is about them turns them on, in a folder of its own
(`torch._inductor.utils.fresh_cache`).
A probe's module is imported before any vendor's: at its top it imports torch and nothing of Dynamo or Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

STAGES = (
    "device",
    "torch.device",
    "fx",
    "dynamo",
    "aot",
    "inductor",
    "numerics",
    "runtime",
    "graphs",
    "fakes",
    "artifacts",
    "processes",
    "versions",
)
"""The pipeline, in the order in which a model passes through it."""


class State(Enum):
    """How a probe ended. The value is the word in the report."""

    OK = "ok"
    REPAIRED = "repaired by fxpatch"
    BROKEN = "broken"
    NOT_APPLICABLE = "not applicable"


class Broken(Exception):
    """A diagnosis that the probe knows. Any other exception is one too, with its own text for `what`.

    Args:
        what: what was seen, and what was expected.
        why: what comes of it; the probe's own `why` where empty.
        todo: what to do now; the probe's own `todo` where empty.
    """

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        self.what, self.why, self.todo = what, why, todo
        super().__init__(what)


class NotApplicable(Exception):
    """The question makes no sense for this subject. `str(error)` says why."""


@dataclass(frozen=True)
class Subject:
    """What is examined; plain data, so that it travels to other processes.

    Args:
        device: the device type, e.g. `musa`.
        simulated: a probe's process calls `fxpatch.simulate(device)`.
        imports: modules that a probe's process imports before anything else, e.g. `torch_npu`.
        model: `module:function` of a model whose operators are to be examined, for `model.example()`; empty for none.
    """

    device: str
    simulated: bool = False
    imports: tuple[str, ...] = ()
    model: str = ""


@dataclass(frozen=True)
class Probe:
    """One question.

    Args:
        name: unique, lower case with hyphens, e.g. `fx-positions`; what `--only` matches.
        stage: one of `STAGES`.
        title: what it asks, in at most 36 characters: the table's second column, 28 wide.
        run: returns what was found, in one line; raises `Broken`, `NotApplicable` or anything else.
        why: why it matters: what goes wrong for a user, and the source (upstream file, issue or document).
        todo: what to do where it is broken and the diagnosis has no advice of its own.
        limit_s: seconds for one run in one process.
        installs: where it is broken, ask again in a process with `fxpatch.install()`.
    """

    name: str
    stage: str
    title: str
    run: Callable[[Subject], str]
    why: str
    todo: str
    limit_s: float = 20.0
    installs: bool = True

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"{self.name}: stage {self.stage!r} is none of {', '.join(STAGES)}")
