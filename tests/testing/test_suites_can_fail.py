"""A conformance suite that cannot fail is worth nothing. Each suite runs against devices, operators and repairs that
are wrong in one way each: it notices every one, and each of its tests notices something. (That it passes where all is
right is test_suites_on_the_simulator.py.)"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fxpatch.testing import CodegenTests, FakeKernelTests, GraphCaptureTests
from fxpatch.testing.capture_mistakes import MISTAKES

pytestmark = pytest.mark.slow
BROKEN = Path(__file__).parent / "broken"

# what has to fail, for each class that is broken; more may
NOTICED = {
    "graphs": {
        "RunsWhileItCaptures": {
            "test_a_capture_computes_nothing",
            "test_a_replay_reads_its_inputs_as_they_are_now",
            "test_a_stream_that_joins_is_captured",
            "test_capturing_twice_is_refused_until_reset",
            "test_refused_in_a_capture",
        },
        "RunsAtTheEndOfTheCapture": {
            "test_a_capture_computes_nothing",
            "test_a_replay_runs_each_launch_once_and_in_order",
        },
        "ReplaysNothing": {
            "test_values_of_the_host_are_those_of_the_capture",
            "test_a_stream_that_does_not_join_runs_at_once",
        },
        "ReplaysOnce": {
            "test_a_replay_runs_each_launch_once_and_in_order",
            "test_random_numbers_are_new_at_every_replay",
        },
        "DrawsTheSameNumbers": {"test_random_numbers_are_new_at_every_replay"},
        "IgnoresThePool": {"test_graphs_of_one_pool_share_its_memory", "test_pool_handles_tell_pools_apart"},
        "GraphsWithoutGradients": {
            "test_a_graphed_module_trains_as_an_eager_one",
            "test_several_functions_are_graphed_in_one_go",
        },
        "RefusesModes": {"test_capture_error_modes"},
    },
    "operators": {
        "NoFake": {"test_there_is_a_fake_kernel"},
        "Dtype": {"test_results_are_what_the_fake_kernel_says"},
        "Shape": {"test_results_are_what_the_fake_kernel_says"},
        "Strides": {"test_results_are_what_the_fake_kernel_says"},
        "Device": {"test_results_are_what_the_fake_kernel_says"},
        "TwoForOne": {"test_results_are_what_the_fake_kernel_says"},
        "HiddenWrite": {"test_only_what_is_declared_is_written", "test_opcheck"},
        "HiddenAlias": {"test_results_share_memory_as_declared"},
        "FakeAliases": {"test_results_share_memory_as_declared"},
    },
    "codegen": {
        "NotRepaired": {
            "test_generated_code_gives_what_the_interpreter_gives",
            "test_copies_give_the_same",
            "test_pickles_need_neither_shim_nor_vendor",
            "test_exported_programs_keep_their_devices",
            "test_random_graphs",
        },
        "ShimThatClaimsToBeEqual": {"test_compiled_code_knows_its_devices"},
        "RewritesEverything": {"test_generated_code_gives_what_the_interpreter_gives"},
    },
}
SUITES = {"graphs": GraphCaptureTests, "operators": FakeKernelTests, "codegen": CodegenTests}


@functools.cache
def failures(module: str) -> dict[str, list[str]]:
    """Runs the classes of a module under broken/ in a process of their own: which tests of each class failed, with
    their parameters. Classes that passed are there too."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-W", "ignore", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", str(BROKEN / f"{module}.py")],
            env={**os.environ, "FXPATCH_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            timeout=550,
        )
        assert done.returncode == 1, done.stdout + done.stderr  # 1: tests ran, and some failed
        cases = ElementTree.parse(report).iter("testcase")
        failed: dict[str, list[str]] = {}
        for case in cases:
            name = case.attrib["classname"].rpartition(".Test")[2]
            mine = failed.setdefault(name, [])
            if case.find("failure") is not None or case.find("error") is not None:
                mine.append(case.attrib["name"])
        return failed


def _names(cases: list[str]) -> set[str]:
    return {case.partition("[")[0] for case in cases}


@pytest.mark.parametrize(("module", "what"), [(module, what) for module, broken in NOTICED.items() for what in broken])
def test_what_is_broken_is_noticed(module: str, what: str) -> None:
    assert NOTICED[module][what] <= _names(failures(module)[what])


@pytest.mark.parametrize("module", SUITES)
def test_each_test_can_fail(module: str) -> None:
    tests = {name for name in vars(SUITES[module]) if name.startswith("test_")}
    failed = {name for cases in failures(module).values() for name in _names(cases)}
    assert tests - failed == set()


def test_each_mistake_in_a_capture_can_pass_unnoticed() -> None:
    """And on such a device the test of that mistake fails."""
    failed = failures("graphs")["RunsWhileItCaptures"]
    assert {f"test_refused_in_a_capture[{mistake}]" for mistake in MISTAKES} <= set(failed)


def test_the_table_names_every_broken_class() -> None:
    for module, broken in NOTICED.items():
        assert set(failures(module)) == set(broken)
