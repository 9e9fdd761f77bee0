"""On hardware each mistake in a capture is made in a process of its own. The stand-in for the vendor's package is a
module of its name that simulates the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxpatch.errors import VendorModuleError
from fxpatch.testing.capture_mistakes import check_in_new_process
from fxpatch.testing.graph_api import GraphApi

SOUND = "import fxpatch; fxpatch.simulate('npu')\n"
CARELESS = SOUND + "import torch; torch.npu.synchronize = lambda device=None: None\n"
CRASHES = "import os; os._exit(3)\n"


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a child process imports as torch_npu."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "torch_npu.py"


@pytest.mark.slow
def test_what_is_refused_there_is_reported_as_such(vendor: Path) -> None:
    vendor.write_text(SOUND)
    check_in_new_process("npu", "synchronize the device")


@pytest.mark.slow
def test_what_is_let_pass_there_is_an_error_here(vendor: Path) -> None:
    vendor.write_text(CARELESS)
    with pytest.raises(AssertionError, match="DID NOT RAISE"):
        check_in_new_process("npu", "synchronize the device")


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_here(vendor: Path) -> None:
    vendor.write_text(CRASHES)
    with pytest.raises(AssertionError, match="the process died with exit code 3"):
        check_in_new_process("npu", "item")


def test_a_device_without_graphs_is_an_error_that_says_so(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delattr(torch.get_device_module(musa), "MUSAGraph")
    with pytest.raises(
        VendorModuleError, match=r"Device 'musa' has no graphs to test.\n  seen: no torch.musa.MUSAGraph"
    ):
        GraphApi(musa)


def test_streams_that_come_round_again_are_passed_over(musa: str) -> None:
    """As CUDA's do after 32: a test that wants two streams gets two."""
    api = GraphApi(musa)
    first = api.other_stream()
    again = iter([first, first, api.module.current_stream(), api.module.Stream()])

    class Few:
        Stream = staticmethod(lambda: next(again))
        current_stream = staticmethod(api.module.current_stream)

    api.module = Few
    assert api.other_stream(first) not in (first, Few.current_stream())
