"""The plugin: what it costs a test run that does not use it, and which device a test run gets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., str]
PRINTS_THE_DEVICE = """
    def test_it(accelerator):
        import torch
        x = torch.ones(2, device=accelerator)
        print("runs on", x.device, torch.__name__)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs pytest on a test module in a new process, without this repository's settings; returns what it printed."""

    def run(source: str, *options: str, status: int = 0, conftest: str = "", ini: str = "") -> str:
        lines = source.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        (tmp_path / "test_it.py").write_text("\n".join(line[indent:] for line in lines) + "\n")
        (tmp_path / "conftest.py").write_text(conftest)
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--strict-markers", *options],
            cwd=tmp_path,
            env={**os.environ, "FXPATCH_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_a_run_that_does_not_use_it_imports_nothing(run: Run) -> None:
    """Neither torch nor Hypothesis, which need not be installed."""
    out = run(
        """
        import sys
        def test_it():
            assert "fxpatch.testing.plugin" in sys.modules
            loaded = {name.partition(".")[0] for name in sys.modules}
            assert loaded & {"torch", "hypothesis", "numpy", "wrapt", "rich"} == set()
            assert [name for name in sys.modules if name.startswith("fxpatch.")] == [
                "fxpatch.testing", "fxpatch.testing.plugin"
            ]
        """,
        "-p",
        "no:hypothesispytest",
    )
    assert "1 passed" in out


@pytest.mark.slow
def test_without_hypothesis_fixtures_work(run: Run) -> None:
    """Only the strategies, and the suite that draws graphs, want it."""
    out = run(
        PRINTS_THE_DEVICE
        + """
        from fxpatch.testing import FakeKernelTests, GraphCaptureTests
        """,
        "-p",
        "no:hypothesispytest",
        conftest='import sys\nsys.modules["hypothesis"] = None\n',
    )
    assert "runs on musa:0" in out


@pytest.mark.slow
def test_the_device_of_the_ini_file(run: Run) -> None:
    assert "runs on acme:0" in run(PRINTS_THE_DEVICE, ini="simulated_device = acme")


@pytest.mark.slow
def test_the_device_of_the_command_line_comes_first(run: Run) -> None:
    assert "runs on npu:0" in run(PRINTS_THE_DEVICE, "--simulated-device=npu", ini="simulated_device = acme")


@pytest.mark.slow
def test_a_real_device_that_is_missing_is_an_error(run: Run) -> None:
    """And not a reason to simulate, or to skip."""
    out = run(PRINTS_THE_DEVICE, "--real-device=npu", status=1)
    assert "The tests cannot run on a real 'npu'" in out
    assert "seen: torch.npu is no device module in this process" in out
    assert "to do: leave --real-device out to run on a simulated one" in out


@pytest.mark.slow
def test_a_real_device_that_is_not_available_is_an_error(run: Run) -> None:
    out = run(PRINTS_THE_DEVICE, "--real-device=cuda", status=1, conftest="import torch")
    assert "torch.cuda.is_available() is False" in out


@pytest.mark.slow
def test_a_real_device_is_not_simulated(run: Run) -> None:
    """The stand-in for a vendor's package is the simulator, loaded under the vendor's name by conftest.py."""
    out = run(
        PRINTS_THE_DEVICE,
        "--real-device=acme",
        conftest="""
import fxpatch
fxpatch.simulate("acme")
from fxpatch.simulator import registration
registration._simulated.clear()
""",
    )
    assert "runs on acme:0" in out


@pytest.mark.slow
def test_a_vendor_in_the_way_is_an_error_that_says_how_to_test_it(run: Run) -> None:
    conftest = 'import torch\ntorch.utils.rename_privateuse1_backend("theirs")\n'
    out = run(PRINTS_THE_DEVICE, status=1, conftest=conftest)
    assert "PrivateUse1 cannot become a simulated 'musa' in this process" in out
    assert "to test the device that is there: pytest --real-device=theirs" in out


@pytest.mark.slow
def test_the_limits_of_a_device_can_be_given(run: Run) -> None:
    """What `simulate_options` of conftest.py returns ends up at `fxpatch.simulate`."""
    out = run(
        """
        import pytest
        def test_it(accelerator):
            import torch
            torch.ones(2, device=accelerator)
            with pytest.raises(torch.OutOfMemoryError):
                torch.ones(2**20, device=accelerator)
        """,
        conftest="""
import pytest

@pytest.fixture(scope="session")
def simulate_options():
    return {"memory": "1 MiB"}
""",
    )
    assert "1 passed" in out


def test_compiled_runs_once_per_backend(run: Run) -> None:
    out = run(
        """
        def test_it(compiled):
            compiled(lambda x: x + 1)
        """,
        "--collect-only",
        "-m",
        "not inductor",
    )
    assert "test_it[eager]" in out
    assert "test_it[aot_eager]" in out
    assert "2/3 tests collected (1 deselected)" in out


def test_the_backends_of_a_device_can_be_named(run: Run) -> None:
    conftest = """
import pytest

@pytest.fixture(params=["aot_eager"])
def compiled_backend(request):
    return request.param
"""
    out = run("def test_it(compiled): pass", "--collect-only", conftest=conftest)
    assert "test_it[aot_eager]" in out
    assert "1 test collected" in out


@pytest.mark.slow
def test_a_failed_comparison_shows_its_operands(run: Run) -> None:
    """pytest rewrites the assertions of the suites, although they are a library's."""
    out = run(
        """
        from fxpatch.testing.device_literals import assert_runs_as_interpreted
        import torch
        def test_it():
            graph = torch.fx.Graph()
            graph.output(graph.placeholder("x"))
            gm = torch.fx.GraphModule({}, graph)
            gm.forward = lambda x: 7
            assert_runs_as_interpreted(gm, 1)
        """,
        status=1,
    )
    assert "assert '7' == '1'" in out
