"""Runs a module's tests against another source of it, in a fork of this process.

The child imports the module under test, and all that imports it, itself: so none of it may be imported here. Limits
are of processor time, which a busy machine does not change, and of memory, for mutants that never end.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from mutation.mutants import ROOT

_MEMORY = 4 << 30  # bytes that a child may take on top of what this process has
_PATIENCE = 20  # wall-clock seconds for one of processor time: a child that waits for a lock takes none
_NOT_RUN = 70  # the child's exit status where it did not get as far as pytest


@dataclass(frozen=True)
class Trial:
    """What became of one run.

    Attributes:
        how: `"passed"`, `"failed"`, `"took too long"`, `"died"`, or `"nothing ran"`, which is no fault of the source.
        seconds: of processor time.
        output: what pytest printed.
    """

    how: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        """All tests passed."""
        return self.how == "passed"


def run(module: str, source: str, tests: Sequence[str], *, seconds: float, examples: int = 100) -> Trial:
    """Runs `tests` where `module` has `source`.

    Args:
        module: its dotted name.
        tests: files, or pytest's node ids, from the root of the repository.
        seconds: of processor time, at most.
        examples: Hypothesis examples for each property; always the same ones.
    """
    if module in sys.modules:
        raise RuntimeError(f"{module} is imported already: a mutant would not be the one that is tested")
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            try:
                _become(module, source, tests, int(seconds) + 1, examples, output.fileno())
            except BaseException:  # the child must not go on as its parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(_NOT_RUN)
        how, used = _wait(child, seconds)
        output.seek(0)
        return Trial(how, used, output.read())


def _become(module: str, source: str, tests: Sequence[str], seconds: int, examples: int, output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(ROOT)
    sys.meta_path.insert(0, _Instead(module, source))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes longer than most tests
    options = ["-x", "-q", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider", "--no-header", "--tb=native"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # this process has imported Hypothesis
    status = pytest.main([*options, *tests], plugins=[_SameExamples(examples)])
    sys.stdout.flush()
    os._exit(int(status))


def _wait(child: int, seconds: float) -> tuple[str, float]:
    limit = time.monotonic() + _PATIENCE * seconds
    late = False
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > limit and not late:
            late = True
            os.killpg(child, 9)
        time.sleep(0.01)
    spent = used.ru_utime + used.ru_stime
    if late or spent > seconds:
        return "took too long", spent
    if os.WIFSIGNALED(status):
        return "died", spent
    code = os.WEXITSTATUS(status)
    if code in (_NOT_RUN, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "nothing ran", spent
    return "passed" if code == pytest.ExitCode.OK else "failed", spent


class _SameExamples:
    """A pytest plugin: few examples, the same ones in each run, and no time spent on making a failure smaller."""

    def __init__(self, examples: int) -> None:
        self._examples = examples

    def pytest_sessionstart(self) -> None:
        settings.register_profile(
            "mutation",
            max_examples=self._examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("mutation")


class _Instead:
    """A finder for one module, whose source it brings along."""

    def __init__(self, module: str, source: str) -> None:
        self._module, self._source = module, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        file = os.path.join(ROOT, *name.split(".")) + ".py"
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file, self._source))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        with warnings.catch_warnings(action="ignore"):  # `is` with a literal: no test has noticed anything yet
            return compile(self._source, self.path, "exec", dont_inherit=True)
