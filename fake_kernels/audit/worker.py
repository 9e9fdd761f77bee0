"""The process that audits: imports the vendor's package, overhears its registrations, and answers for one operator at
a time.

A fake kernel may take its process with it, so it runs here, and says what it is about to do before it does it. Lines
of JSON, on two file descriptors of their own: vendors print to stdout as they like.

    in:  {"namespace", "imports", "autoload"}, then {"operator", "skip"} for each operator
    out: {"operators", "namespaces", "versions"} or {"import_failed", "error"}; then {"stage"} ..., {"finding"} ...,
    {"state"}
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from typing import Any, TextIO

import torch

from fake_kernels.audit.adapter import all_operator_names, check_torch, find_overload, load_device_backends, warm_up
from fake_kernels.audit.kernels import Recorder
from fake_kernels.audit.probes import Audit
from fake_kernels.audit.target import Target


def main(read: int, write: int) -> None:
    """Serves until the parent closes its end."""
    logging.disable(logging.CRITICAL)  # torch logs every refused call with its traceback
    warnings.simplefilter("ignore")
    with os.fdopen(read) as requests, os.fdopen(write, "w") as answers:
        start = json.loads(requests.readline())
        check_torch()
        recorder = Recorder()
        with recorder:
            if not _import_all(start, answers):
                return
        names = all_operator_names()
        warm_up()
        prefix = start["namespace"] + "::"
        mine = [name for name in names if name.startswith(prefix)]
        schemas = {name.removeprefix(prefix): find_overload(name)._schema for name in mine}
        _say(
            answers,
            operators=mine,
            namespaces=sorted({name.partition("::")[0] for name in names}),
            versions={"torch": torch.__version__, **_versions(start["imports"])},
        )
        for line in requests:
            request = json.loads(line)
            _serve(request["operator"], frozenset(request["skip"]), recorder, schemas, answers)
    os._exit(0)  # what a vendor does when Python ends is not looked at, and may hang


def _import_all(start: dict[str, Any], answers: TextIO) -> bool:
    module = "the plugins that `import torch` loads"
    try:
        if start["autoload"]:
            load_device_backends()
        for module in start["imports"]:
            importlib.import_module(module)
    except Exception as error:  # whatever a vendor's import raises: the caller is told which module, and why
        _say(answers, import_failed=module, error=f"{type(error).__name__}: {error}")
        return False
    return True


def _serve(name: str, skip: frozenset[str], recorder: Recorder, schemas: dict[str, Any], answers: TextIO) -> None:
    audit = Audit(Target(name, find_overload(name), recorder.kernel_of(name)), schemas)
    for stage, run in audit.stages():
        if stage in skip:
            continue
        _say(answers, stage=stage)
        for finding in run():
            _say(answers, finding=finding.as_dict())
    _say(answers, state=audit.state)


def _versions(modules: list[str]) -> dict[str, str]:
    return {name: str(getattr(sys.modules[name], "__version__", "unknown")) for name in modules}


def _say(answers: TextIO, **message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
