"""Warm start across processes, with Inductor: nothing is traced or compiled in the second one, its results are the
same, and what is damaged or written at the same time by two does no harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MODEL = """
import json, sys, warnings
import torch
sys.path.insert(0, "piecewise")
from piecewise_models import WIDTH, ops, runner_of

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH)

    def forward(self, x):
        out = torch.empty_like(x)
        ops.out(x, self.norm(x), out)
        return x + self.linear(out).relu() * x.shape[0]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(4))
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x):
        self.seen.add_(1)
        for layer in self.layers:
            x = layer(x)
        return x, self.seen * 2, x.shape[0]

def start(cache, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, twin = Model(), Model()
    runner = runner_of(model, compiler=options.pop("compiler", "inductor"), cache=cache, on_error="raise", **options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        runner.prepare(torch.randn(5, WIDTH))
    for n in (1, 2, 3, 5, 8, 4, 9):
        x = torch.randn(n, WIDTH)
        with torch.no_grad():
            for one, other in zip(runner(x), twin(x), strict=True):
                torch.testing.assert_close(one, other)
    torch.testing.assert_close(model.seen, twin.seen)
    counters = {name: dict(found) for name, found in torch._dynamo.utils.counters.items()}
    print(json.dumps({
        "counters": counters, "notes": runner.report.notes,
        "warnings": [str(each.message) for each in warned if "saved" in str(each.message)],
    }))
"""

FORBID = """
import torch._dynamo.convert_frame, torch._inductor.compile_fx, torch._inductor.graph, torch._functorch.aot_autograd
def forbidden(*args, **kwargs):
    raise AssertionError("traced or compiled")
torch.compile = forbidden
torch._dynamo.convert_frame._compile = forbidden
torch._inductor.standalone_compile = forbidden
torch._inductor.compile_fx.compile_fx = forbidden
torch._inductor.graph.GraphLowering.__init__ = forbidden
torch._inductor.cpp_builder.CppBuilder.build = forbidden
torch._functorch.aot_autograd.create_aot_state = forbidden
"""


Start = Callable[..., dict[str, Any]]


def starting(cache: Path, options: str = "", before: str = "") -> dict[str, Any]:
    """Prepares and checks the model in a new process, and says how that went."""
    (told,) = starting_in_turn([cache], cache.parent / "inductor", options, before)
    return told


def starting_in_turn(caches: list[Path], inductor: Path, options: str = "", before: str = "") -> list[dict[str, Any]]:
    """The same for several caches, in one process.

    Args:
        caches: the runner's.
        inductor: Inductor's own.
        options: more of the runner's, as source.
        before: source to run first.
    """
    starts = "\n".join(f"start({str(cache)!r}{options and ', ' + options})" for cache in caches)
    env = {**os.environ, "FXPATCH_AUTOLOAD": "0", "TORCHINDUCTOR_CACHE_DIR": str(inductor)}
    root = Path(__file__).resolve().parent.parent
    code = f"{MODEL}\n{before}\n{starts}"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(caches) :]]


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cache that a first process has filled, and how that went."""
    cache = tmp_path_factory.mktemp("cold") / "cache"
    return cache, starting(cache, "compile_sizes=[4]")


@pytest.fixture
def start(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> Start:
    """`start(before)`: a process after the first one; each test has a copy of the cache in `tmp_path`."""
    shutil.copytree(cold[0], tmp_path / "cache")
    return lambda before="": starting(tmp_path / "cache", "compile_sizes=[4]", before)


def test_a_second_process_neither_traces_nor_compiles(cold: tuple[Path, dict[str, Any]], start: Start) -> None:
    first = cold[1]
    assert any("saved to" in note for note in first["notes"])
    assert first["counters"]["stats"]["unique_graphs"] == 1
    warm = start(FORBID)
    assert any("not traced, not compiled" in note for note in warm["notes"])
    assert not warm["warnings"]
    assert "stats" not in warm["counters"], "Dynamo has run"
    assert "aot_autograd" not in warm["counters"], "AOTAutograd has run"
    assert set(warm["counters"]["inductor"]) <= {"fxgraph_cache_hit", "extern_calls"}, "Inductor has compiled"
    assert start(FORBID)["notes"] == warm["notes"], "loading has changed the entry"


def test_damaged_files_of_the_compiler_are_not_loaded(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    damaged = {".so": 64, ".py": 10, "aotautograd": 10, "fxgraph": 10}
    for suffix, cut in damaged.items():
        copy = shutil.copytree(cold[0], tmp_path / suffix)
        file = next(path for path in copy.rglob("*") if path.is_file() and suffix in str(path.relative_to(copy)))
        file.write_bytes(file.read_bytes()[:-cut])
    inductor = cold[0].parent / "inductor"  # it has what is compiled again
    for again in starting_in_turn([tmp_path / suffix for suffix in damaged], inductor, "compile_sizes=[4]"):
        assert any("is damaged" in words and "is another" in words for words in again["warnings"]), again
        assert again["counters"]["stats"]["unique_graphs"] == 1
        assert any("saved to" in note for note in again["notes"])


def test_two_processes_that_write_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: starting(tmp_path / "cache"), range(2)))
    assert not any(each["warnings"] for each in both)
    assert any("saved to" in note for note in both[0]["notes"])
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    warm = starting(tmp_path / "cache", before=FORBID)
    assert any("not traced, not compiled" in note for note in warm["notes"])
    assert not warm["warnings"]
