"""Collectives run between the graphs, without anybody asking; and a tensor-parallel decoder equals one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from ranks import on_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from fxpatch.piecewise.lint import is_collective
from fxpatch.piecewise.runner import PiecewiseRunner

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def group() -> object:
    """A process group of two ranks in which nobody answers, for what is only traced."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch._dynamo.reset()


COLLECTIVES = {
    "all_reduce": lambda x, group: funcol.all_reduce(x, "sum", group),
    "all_gather": lambda x, group: funcol.all_gather_tensor(x, 0, group),
    "reduce_scatter": lambda x, group: funcol.reduce_scatter_tensor(x, "sum", 0, group),
    "all_to_all": lambda x, group: funcol.all_to_all_single(x, None, None, group),
    "broadcast": lambda x, group: funcol.broadcast(x, 0, group),
}


def traced(function: Callable[..., object], *args: object) -> torch.fx.GraphModule:
    grabbed: list[torch.fx.GraphModule] = []

    def grab(gm: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        grabbed.append(gm)
        return gm.forward

    torch.compile(function, backend=grab, fullgraph=True)(*args)
    return grabbed[0]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_and_its_wait_get_a_reason(name: str, group: object) -> None:
    gm = traced(lambda x: COLLECTIVES[name](x * 2, group) + 1, torch.ones(4, 2))
    reasons = {node.name: is_collective(node) for node in gm.graph.nodes if node.op.startswith("call")}
    found = [node for node, reason in reasons.items() if reason == "is a collective"]
    assert len(found) == 2, reasons  # what is begun, and the wait
    assert set(reasons.values()) == {None, "is a collective"}
    assert next(iter(reasons)) not in found
    assert list(reasons)[-1] not in found


def test_what_is_no_collective_gets_none() -> None:
    gm = traced(lambda x: torch.nn.functional.gelu(x.sum(0) @ x.T).softmax(-1), torch.ones(4, 4))
    assert {is_collective(node) for node in gm.graph.nodes} == {None}


def test_the_runner_splits_at_collectives(group: object) -> None:
    """No `split=`, and the CPU's profile names none of them."""

    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = funcol.all_reduce(x * 2, "sum", group) + 1
        return x

    runner = PiecewiseRunner(model, dynamic={"x": 0}, sizes=[2, 4], compiler="eager", graphs="recorder")
    report = runner.prepare(torch.ones(3, 2))
    assert [piece.kind for piece in report.pieces] == ["graph", "split"] * 3 + ["graph"]
    for piece in report.pieces[1::2]:
        assert piece.reasons == ("all_reduce: is a collective", "wait_tensor: is a collective")
    assert "between graphs: all_reduce: is a collective" in str(report)


@pytest.mark.slow
def test_replays_communicate(tmp_path: Path) -> None:
    """Each replay sums what the ranks have now: what a capture has seen would be another sum."""
    printed = on_ranks(
        """
def model(x):
    for _ in range(2):
        x = funcol.all_reduce(x * (RANK + 1), "sum", dist.group.WORLD) + 1
    return x

runner = PiecewiseRunner(
    model, dynamic={"x": 0}, sizes=[2, 4, 8], compiler="aot_eager", graphs="recorder", agree=all_succeeded
)
runner.prepare(torch.ones(6, 2))
for n in (8, 1, 5, 2, 7, 3, 6, 4):
    x = torch.full((n, 2), float(n))
    assert torch.equal(runner(x + RANK), torch.full((n, 2), ((n + 2 * (n + 1)) + 1) * 3.0 + 1)), n
assert runner.counts == {"captured": 8}, runner.counts
print("right")
""",
        tmp_path / "store",
    )
    assert printed == ["right\n", "right\n"]


def run_example(*options: str) -> str:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "examples/tensor_parallel.py", *options,
        ],
        cwd=ROOT,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_tensor_parallel_decoder_equals_one_process() -> None:
    printed = run_example("--layers", "2")
    # a layer has two all-reduces and an attention: graphs before, between and behind them
    assert "size 8: captured, 7 graphs" in printed
    assert "between graphs: all_reduce: is a collective" in printed
    assert "calls: 8 captured" in printed
    assert "OK: 2 ranks, n from 1 to 8" in printed


@pytest.mark.slow
def test_dtensors_are_refused_with_the_reason() -> None:
    """They have no address, and communicate out of the graph's sight; calls run the original function."""
    printed = run_example("--layers", "1", "--keep-dtensor")
    assert "tensors that have no memory of their own.   seen: DTensor" in printed
    assert "to do: give DTensor parameters as their local shards" in printed
    assert "calls: 8 original: the model could not be traced, split or compiled" in printed
    assert "OK: 2 ranks" in printed
