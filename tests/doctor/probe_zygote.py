"""A process that has imported torch and the compilers and simulates `musa`, and forks a child for each probe: plant,
install, ask.

Run as a script, with `plain` to leave compilers and device to the children: there they come after what is planted, and
the device may lack something. One line in is one line out, as JSON: the request is the keyword arguments of `asked`,
the reply is `[state, text]`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch

import fxpatch
from fxpatch.doctor.probe import Broken, NotApplicable, Subject
from fxpatch.doctor.probes import PROBES

BY_NAME = {probe.name: probe for probe in PROBES}


def asked(probe: str, subject: dict[str, Any], fault: int | None, install: bool) -> tuple[str, str]:
    """What a probe says in a process with the fault of that number.

    Args:
        probe: its name.
        subject: keyword arguments of `Subject`.
        fault: a place in `FAULTS`; None: a healthy device.
        install: call `fxpatch.install()`, before or after the fault as it says.
    """
    from planted_faults import FAULTS

    planted = FAULTS[fault] if fault is not None else None
    device = subject["device"]
    if device != "cpu":  # in the plain process: now; in the other: it is the same already
        fxpatch.simulate("musa", without=planted.without if planted else ())
    if install and planted is not None and planted.after_install:
        fxpatch.install(device)
    if planted is not None:
        planted.plant()
    if install and (planted is None or not planted.after_install):
        fxpatch.install(device)
    try:
        return "ok", BY_NAME[probe].run(Subject(**{**subject, "imports": tuple(subject.get("imports", ()))}))
    except NotApplicable as error:
        return "not applicable", str(error)
    except Broken as error:
        return "broken", error.what
    except Exception as error:
        return "broken", f"{type(error).__name__}: {error}"


def child(line: str, writing: int) -> None:
    warnings.simplefilter("ignore")
    try:
        said = asked(**json.loads(line))
    except BaseException as error:
        said = "failed", f"{type(error).__name__}: {error}"
    os.write(writing, json.dumps(said).encode())
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)  # a process with worker threads cannot be forked: the child would wait for them
    if sys.argv[1:] != ["plain"]:
        for module in ("torch._dynamo", "torch._inductor.compile_fx"):
            __import__(module)
        fxpatch.simulate("musa")  # and does not use it: that would keep the children from it
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(line, writing)
        os.close(writing)
        said = b""
        while part := os.read(reading, 65536):
            said += part
        os.close(reading)
        _, status = os.waitpid(pid, 0)
        print(said.decode() or json.dumps(["crashed", f"status {status}"]), flush=True)
    os._exit(0)  # the compilers take seconds to be taken down


if __name__ == "__main__":
    main()
