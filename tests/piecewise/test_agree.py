"""Ranks that decide together, in two processes with gloo: where one fails, both take the same way, no rank waits for
another that does not come, and results stay right. The model has collectives, so ranks that go different ways hang.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import on_ranks

pytestmark = pytest.mark.slow

# A tensor-parallel stack, its twin in one process, and what both ranks report.
MODEL = """
import json

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Part(torch.nn.Module):
    def __init__(self, block, breaks):
        super().__init__()
        self.up = torch.nn.Parameter(block.up.weight.detach().chunk(WORLD, 0)[RANK].clone())
        self.down = torch.nn.Parameter(block.down.weight.detach().chunk(WORLD, 1)[RANK].clone())
        self.breaks = breaks

    def forward(self, x):
        if self.breaks:
            torch._dynamo.graph_break()
        hidden = torch.nn.functional.linear(x, self.up).relu()
        return x + funcol.all_reduce(torch.nn.functional.linear(hidden, self.down), "sum", dist.group.WORLD)

torch.manual_seed(0)
whole = torch.nn.Sequential(*[Block() for _ in range(3)])

def model(breaks=False):
    return torch.nn.Sequential(*[Part(block, breaks) for block in whole])

def tokens(n):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(n))

def runner(**options):
    return PiecewiseRunner(
        options.pop("model", None) or model(), dynamic={"input": 0}, sizes=[2, 4, 8], graphs="recorder",
        **{"compiler": "eager", "agree": all_succeeded, **options},
    )

def calls_are_right(prepared):
    with torch.no_grad():
        for n in [*range(1, 10), 3, 8, 4]:
            torch.testing.assert_close(prepared(tokens(n)), whole(tokens(n)))

def told(prepared):
    report = prepared.report
    print(json.dumps({
        "ways": {row.size: row.way for row in report.sizes}, "why": {row.size: row.reason for row in report.sizes},
        "calls": dict(report.calls), "state": report.state, "notes": report.notes,
    }))
"""


def on_both(code: str, tmp_path: Path) -> list[list[dict]]:
    """What `told` said, by rank."""
    printed = on_ranks(MODEL + code, tmp_path / "store")
    return [[json.loads(line) for line in out.splitlines()] for out in printed]


def test_ranks_that_succeed_are_captured(tmp_path: Path) -> None:
    for (told,) in on_both("r = runner()\nr.prepare(tokens(6))\ncalls_are_right(r)\ntold(r)", tmp_path):
        assert told["ways"] == {"8": "captured", "4": "captured", "2": "captured"}
        assert told["calls"] == {"captured": 11, "original: n is above the largest size": 1}


# The compiler's pieces run for 6 rows (the example), and 4 rows are warmed up by the first call and captured by the
# second. Each of the graph pieces is tried: the collectives that are left behind it differ.
FAILS_AT_FOUR = """
def failing(piece):
    made = []

    def compiler(gm, inputs):
        made.append(gm)
        number, seen = len(made) - 1, []

        def run(*args):
            if RANK == 1 and number == piece and any(isinstance(a, torch.Tensor) and a.shape[:1] == (4,) for a in args):
                seen.append(0)
                if len(seen) == 2:
                    raise RuntimeError(f"no kernel for 4 rows in piece {number}")
            return gm.forward(*args)

        return run

    return compiler

for piece in range(3):
    r = runner(compiler=failing(piece), **options)
    r.prepare(tokens(6))
    calls_are_right(r)
    told(r)
"""


def test_a_size_that_one_rank_cannot_capture_is_left_out_on_both(tmp_path: Path) -> None:
    by_rank = on_both("options = {}\n" + FAILS_AT_FOUR, tmp_path)
    for rank, all_told in enumerate(by_rank):
        assert len(all_told) == 3
        for piece, told in enumerate(all_told):
            assert told["ways"] == {"8": "captured", "4": "compiled", "2": "captured"}
            reason = "another rank could not prepare this" if rank == 0 else f"no kernel for 4 rows in piece {piece}"
            assert reason in told["why"]["4"]
            (counted,) = (way for way in told["calls"] if way.startswith("compiled"))
            assert told["calls"][counted] == 4  # n = 3 and 4, twice
            assert "another rank" in counted if rank == 0 else "could not be captured" in counted


def test_ranks_that_do_not_agree_come_apart(tmp_path: Path) -> None:
    """That the test above can fail: without `agree` one rank has a size that the other one has not."""
    code = "options = {'agree': None}\n" + FAILS_AT_FOUR.replace("    calls_are_right(r)\n", "")
    first, second = on_both(code, tmp_path)
    assert [told["ways"]["4"] for told in first] == ["captured"] * 3
    assert [told["ways"]["4"] for told in second] == ["compiled"] * 3


def test_where_one_rank_cannot_trace_both_run_the_original_function(tmp_path: Path) -> None:
    by_rank = on_both(
        "r = runner(model=model(breaks=RANK == 1))\nr.prepare(tokens(6))\ncalls_are_right(r)\ntold(r)", tmp_path
    )
    for rank, (told,) in enumerate(by_rank):
        assert told["state"] == "not prepared: calls go to the original function"
        assert told["ways"] == {}
        assert told["calls"] == {"original: the model could not be traced, split or compiled": 12}
        assert ("Another rank could not prepare this." if rank == 0 else "cannot be traced whole") in told["notes"][0]


def test_where_one_rank_cannot_compile_both_run_the_original_function(tmp_path: Path) -> None:
    by_rank = on_both(
        """
        def compiler(gm, inputs):
            if RANK == 1:
                raise RuntimeError("no kernels here")
            return gm.forward

        r = runner(compiler=compiler)
        r.prepare(tokens(6))
        calls_are_right(r)
        told(r)
        """.replace("\n        ", "\n"),
        tmp_path,
    )
    for rank, (told,) in enumerate(by_rank):
        assert told["calls"] == {"original: the model could not be traced, split or compiled": 12}
        assert ("Another rank could not prepare this." if rank == 0 else "no kernels here") in told["notes"][0]


def test_a_rank_that_cannot_replay_communicates_as_the_others_do(tmp_path: Path) -> None:
    """One rank has released its graphs, or brings a tensor from another place: its collectives have the rows of the
    size that the others replay, not of its own call."""
    code = """
r = runner()
r.prepare(tokens(6))
if RANK == 1:
    r.release()
calls_are_right(r)
told(r)
"""
    first, second = (told for (told,) in on_both(code, tmp_path))
    assert first["calls"] == {"captured": 11, "original: n is above the largest size": 1}
    assert second["calls"] == {
        "compiled: the graphs have been released": 11, "original: n is above the largest size": 1,
    }  # fmt: skip


# What a musa has another form of, on the CPU: both ranks have it, and rank 1's is wrong, or it has none of it.
OPERATORS = """
class Gate(torch.nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward_native(self, x):
        return torch.relu(x)

    def forward_cpu(self, x):
        return torch.clamp_min(x, 0.5 if self.wrong else 0)

    def forward(self, x):
        return self.forward_native(x)

parts = list(model())

def gated(gates):
    return torch.nn.Sequential(*[each for pair in zip(parts, gates) for each in pair])

gates = [Gate(False), Gate(RANK == 1), Gate(False)]
whole = torch.nn.Sequential(*[each for block in whole for each in (block, torch.nn.ReLU())])
"""


def test_an_operator_is_promoted_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    code = """
r = runner(model=gated(gates), native="any_speed")
report = r.prepare(tokens(6))
calls_are_right(r)
print(json.dumps({"operators": {row.operator: [row.chosen, row.reason] for row in report.operators}}))
"""
    first, second = (told["operators"] for (told,) in on_both(OPERATORS + code, tmp_path))
    assert [chosen for chosen, _ in first.values()] == [chosen for chosen, _ in second.values()]
    assert [chosen for chosen, _ in first.values()] == ["optimized", "native", "optimized"]
    assert first["3"][1] == "another rank keeps its native forward"
    assert "another rank" not in second["3"][1]


def test_ranks_with_other_operators_keep_the_native_forwards(tmp_path: Path) -> None:
    code = """
gates = [torch.nn.ReLU() if RANK == 1 else Gate(False) for _ in range(3)]
r = runner(model=gated(gates), native="any_speed")
r.prepare(tokens(6))
calls_are_right(r)
told(r)
"""
    for (told,) in on_both(OPERATORS + code, tmp_path):
        assert "native forwards are kept: the ranks' models have different ones" in told["notes"]
        assert told["ways"] == {"8": "captured", "4": "captured", "2": "captured"}


def test_a_model_that_fails_on_one_rank_alone_hangs_nobody(tmp_path: Path) -> None:
    printed = on_ranks(
        f"""{MODEL}
class Ends(Exception): pass

class Failing(torch.nn.Module):
    def forward(self, x):
        if RANK == 1:
            raise Ends("here")
        return x

r = runner(model=torch.nn.Sequential(model(), Failing()), front_end="break")
try:
    r.prepare(tokens(6))
    told(r)
except Ends as error:
    print("Ends", error)
""",
        tmp_path / "store",
    )
    assert "Another rank could not prepare this." in printed[0]
    assert printed[1] == "Ends here\n"


@pytest.mark.parametrize("what", ["trace", "capture"])
def test_with_on_error_raise_both_ranks_raise(what: str, tmp_path: Path) -> None:
    options = "{'model': model(breaks=RANK == 1)}" if what == "trace" else "{'compiler': failing(1)}"
    failing = FAILS_AT_FOUR.split("for piece")[0]
    printed = on_ranks(
        f"""{MODEL}{failing}
r = runner(on_error="raise", **{options})
try:
    r.prepare(tokens(6))
except fxpatch.errors.FxPatchError as error:
    print(type(error).__name__, str(error).splitlines()[0])
""",
        tmp_path / "store",
    )
    own = {"trace": "TraceError", "capture": "CaptureFailedError"}
    assert printed[0].strip() == "CaptureFailedError Another rank could not prepare this."
    assert printed[1].startswith(own[what])
    assert "Another rank" not in printed[1]
