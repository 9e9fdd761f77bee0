"""What a profiler, the log and torch's structured trace tell of a runner; and that nobody pays where nobody looks."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from piecewise_models import ops, runner_of
from torch.profiler import ProfilerActivity, profile

from fxpatch.piecewise import ranges, structured
from fxpatch.piecewise.breaks import eager_on_graph
from fxpatch.piecewise.runner import PiecewiseRunner


def model(x: torch.Tensor) -> torch.Tensor:
    return ops.functional(ops.functional(x + 1).tanh()).sin()


PIECES = {
    "piece 0: graph": 1,
    "piece 1: piecewise_tests::functional": 1,
    "piece 2: graph": 1,
    "piece 3: piecewise_tests::functional": 1,
    "piece 4: graph": 1,
}


def prepared(musa: str, **options: Any) -> PiecewiseRunner:
    runner = runner_of(model, **{"graphs": "device", "sizes": [2, 4], **options})
    runner.prepare(torch.randn(4, 4).to(musa))
    return runner


def seen(call: Callable[[], object]) -> Counter[str]:
    """The ranges of ours in a profile of the call, without their first word."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    names = [event.name for event in found.events()]
    return Counter(name.removeprefix("fxpatch.") for name in names if name.startswith("fxpatch."))


def test_a_replay(musa: str) -> None:
    runner, x = prepared(musa), torch.randn(3, 4).to(musa)
    want = runner(x).clone()
    got: list[torch.Tensor] = []
    assert seen(lambda: got.append(runner(x))) == {"replay size=4 n=3": 1, "copy_in": 1, **PIECES}
    assert torch.equal(got[0].cpu(), want.cpu())
    assert seen(lambda: [runner(x) for _ in range(3)])["piece 3: piecewise_tests::functional"] == 3
    runner.release()
    assert seen(lambda: runner(x)) == {"compiled n=3": 1, **PIECES}
    assert torch.equal(runner(x).cpu(), want.cpu())
    runner.recapture()
    assert seen(lambda: runner(x))["replay size=4 n=3"] == 1
    runner.release()


def test_the_other_ways(musa: str) -> None:
    runner = prepared(musa)
    x = torch.randn(9, 4).to(musa)
    assert seen(lambda: runner(x)) == {"original: n is above the largest size": 1}
    assert seen(runner.recapture) == {"capture size=4": 1, "capture size=2": 1}
    runner.release()


def test_exact_sizes_have_pieces_of_their_own(musa: str) -> None:
    runner = prepared(musa, graphs="none", compile_sizes=[3])
    x = torch.randn(3, 4).to(musa)
    got: list[torch.Tensor] = []
    assert seen(lambda: got.append(runner(x))) == {"compiled n=3": 1, **PIECES}
    torch.testing.assert_close(got[0], model(x))


@eager_on_graph
def between(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_breaks(musa: str) -> None:
    runner = runner_of(lambda x: between(x + 1).tanh(), graphs="device", sizes=[4], front_end="break")
    runner.prepare(torch.randn(4, 4).to(musa))
    x = torch.randn(3, 4).to(musa)
    told = {"replay size=4 n=3": 1, "copy_in": 1, "graph 0": 1, "break: between": 1, "graph 1": 1}
    assert seen(lambda: runner(x)) == told
    runner.release()


def test_nobody_pays_without_a_profiler(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a range is made, and a replay is the flat tuple."""

    def fail(*_: object) -> None:
        raise AssertionError("a range, and no profiler")

    runner, x = prepared(musa), torch.randn(3, 4).to(musa)
    plan = runner._made.prepared.captured[4].plan  # type: ignore[union-attr]
    monkeypatch.setattr(ranges, "record_function", fail)
    runner(x)
    assert plan._in_ranges is None
    assert len(plan.steps) == len(plan.names) == 5
    with pytest.raises(AssertionError, match="no profiler"):
        seen(lambda: runner(x))
    runner.release()


def test_where_torch_has_moved_the_question(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(torch.autograd, "_profiler_enabled")
    assert ranges._question()() is False
    assert "torch.autograd._profiler_enabled has moved" in caplog.text


# -- the log and the trace ---------------------------------------------------------------------------------------------


@pytest.fixture
def artifacts() -> Iterator[list[tuple[str, str]]]:
    """(name, payload) of each artifact that torch's structured trace gets meanwhile."""
    found: list[tuple[str, str]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            about = record.metadata.get("artifact")  # type: ignore[attr-defined]
            if about is not None and about["name"].startswith("fxpatch"):
                found.append((about["name"], str(record.payload)))  # type: ignore[attr-defined]

    trace, handler = logging.getLogger("torch.__trace"), Kept()
    trace.addHandler(handler)
    yield found
    trace.removeHandler(handler)


def test_the_trace_has_pieces_and_decisions(musa: str, artifacts: list[tuple[str, str]]) -> None:
    runner = runner_of(model, graphs="device", sizes=[2, 4])
    runner.name = "a/b c"
    report = runner.prepare(torch.randn(4, 4).to(musa))
    names = [name for name, _ in artifacts]
    first, (whole, *pieces) = artifacts[0], names
    assert whole == "fxpatch_runner_a_b_c"
    assert json.loads(first[1]) == json.loads(report.json())
    assert [row["way"] for row in json.loads(first[1])["sizes"]] == ["captured", "captured"]
    distinct = len({row.key for row in report.pieces})
    assert len(pieces) == distinct > 2
    assert pieces[:2] == ["fxpatch_runner_a_b_c_piece_0", "fxpatch_runner_a_b_c_piece_1"]
    between_graphs = dict(artifacts)["fxpatch_runner_a_b_c_piece_1"]
    assert between_graphs.startswith("# split\n# functional: splitting operator\n")
    assert "def forward(self" in between_graphs

    artifacts.clear()
    for _ in range(3):
        runner(torch.randn(9, 4).to(musa))
    told = {"runner": "a/b c", "way": "original", "reason": "n is above the largest size"}
    assert [(name, json.loads(payload)) for name, payload in artifacts] == [("fxpatch_runner_a_b_c_step_down", told)]
    runner.release()


def test_the_log(musa: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fxpatch"):
        runner = prepared(musa)
        for _ in range(2):
            runner(torch.randn(9, 4).to(musa))
    told = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "fxpatch"]
    assert [level for level, _ in told] == ["INFO", "INFO"]
    assert re.match(r"runner model(-\d+)? is prepared after [\d.]+ s: piecewise runner: prepared\n", told[0][1])
    assert told[1][1].endswith("a call goes to the original function: n is above the largest size")
    runner.release()


def test_what_was_left_out_is_a_warning(musa: str, caplog: pytest.LogCaptureFixture) -> None:
    def untraceable(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    runner = runner_of(untraceable, graphs="none", on_error="fallback")
    runner.prepare(torch.randn(4, 4).to(musa))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("untraceable" in each and "not prepared: calls go to the original function" in each for each in warned)


def test_where_torch_has_moved_the_trace(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    structured._trace.cache_clear()
    monkeypatch.setattr(torch._logging, "trace_structured", lambda name, metadata: None)
    try:
        structured.stepped_down("runner", "original", "because")
    finally:
        structured._trace.cache_clear()
    assert "torch._logging.trace_structured has moved" in caplog.text


TRACED = """
import torch, fxpatch
from fxpatch.piecewise.runner import PiecewiseRunner
runner = PiecewiseRunner(lambda x: x.sin().relu() + 1, dynamic={"x": 0}, split=["relu"], sizes=[2], compiler="eager",
                         graphs="recorder")
runner.name = "server"
runner.prepare(torch.randn(2, 3))
runner(torch.randn(3, 3))
"""


@pytest.mark.slow
def test_tlparse_shows_it(tmp_path: Path, fresh: Callable[..., str]) -> None:
    fresh(TRACED, TORCH_TRACE=str(tmp_path / "trace"))
    (written,) = (tmp_path / "trace").iterdir()
    assert written.read_text().count('"name": "fxpatch_runner_server') == 5
    tlparse = os.environ.get("FXPATCH_TLPARSE") or shutil.which(
        "tlparse", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if tlparse is None:
        pytest.skip("no tlparse on the path, and FXPATCH_TLPARSE names none")
    page = tmp_path / "page"
    subprocess.run([tlparse, str(written), "-o", str(page), "--no-browser"], check=True, capture_output=True)
    shown = re.sub(r"_\d+\.(json|txt)", r".\1", (page / "index.html").read_text())
    for name in (".json", "_piece_0.txt", "_piece_1.txt", "_piece_2.txt", "_step_down.json"):
        assert f"fxpatch_runner_server{name}" in shown
    (report,) = (each for each in page.rglob("fxpatch_runner_server_*.json") if "step_down" not in each.name)
    assert [piece["kind"] for piece in json.loads(report.read_text())["pieces"]] == ["graph", "split", "graph"]
