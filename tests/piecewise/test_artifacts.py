"""Warm start: what is saved is used without a trace, gives the same results, and is refused where it is not to be
trusted or would be wrong. With the eager compiler; `test_artifacts_inductor` starts processes and compiles."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from piecewise_models import SPLIT, WIDTH, assert_same, check, runner_of
from test_runner_properties import models

from fxpatch.errors import FxPatchWarning, SizesError
from fxpatch.piecewise import prepare
from fxpatch.piecewise.of_n import OfN
from fxpatch.piecewise.runner import PiecewiseRunner
from fxpatch.piecewise.warm_start import cache_files, graph_json

SOURCE = """
import os
import torch

SCALE = 2.0
TABLE = {"shift": 1}


def helper(x):
    # HELPER
    return x * SCALE


class Settings:
    kind = "relu"

    def __init__(self):
        self.eps = 0.5


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)
        self.settings = Settings()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        if os.environ.get("FXPATCH_TEST_SWITCH"):
            x = -x
        y = helper(self.linear(x)) + TABLE["shift"]
        y = torch.ops.piecewise_tests.functional(y)
        self.seen.add_(1)
        y = getattr(torch, self.settings.kind)(y) + self.settings.eps
        return {"y": y, "n": x.shape[0] * 2 + 1, "x": x, "kind": (self.settings.kind, None)}
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Callable[..., types.ModuleType]]:
    """`module(old=new)`: SOURCE with replacements, imported anew under one name."""
    path = tmp_path / "warm_model.py"

    def load(*changes: tuple[str, str]) -> types.ModuleType:
        text = SOURCE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("warm_model", path)
        assert spec is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules["warm_model"] = found
        exec(compile(text, str(path), "exec"), vars(found))
        return found

    yield load
    sys.modules.pop("warm_model", None)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the model of SOURCE."""
    path = tmp_path_factory.mktemp("saved") / "cache"
    sys.modules["warm_model"] = found = types.ModuleType("warm_model")
    found.__file__ = str(path.parent / "warm_model.py")
    exec(compile(SOURCE, found.__file__, "exec"), vars(found))
    try:
        assert "saved to" in notes(prepared(found.Model(), path))
    finally:
        del sys.modules["warm_model"]
    return path


@pytest.fixture
def saved(saved_once: Path, cache: Path) -> Path:
    """A copy of it, of this test's own."""
    shutil.copytree(saved_once, cache)
    return cache


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a warm start has traced or compiled")

        monkeypatch.setattr(torch, "compile", refuse)
        monkeypatch.setattr(prepare, "build", refuse)

    return forbid


def prepared(model: Any, cache: Path | str, **options: Any) -> PiecewiseRunner:
    runner = runner_of(model, cache=cache, on_error="raise", **options)
    runner.prepare(torch.randn(5, WIDTH))
    return runner


def make(n: int) -> tuple[torch.Tensor]:
    return (torch.randn(n, WIDTH),)


def notes(runner: PiecewiseRunner) -> str:
    return "\n".join(runner.report.notes)


def record_of(cache: Path) -> Path:
    (path,) = cache.glob("*.json")
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a record so that its own sum is right."""
    record = json.loads(path.read_bytes().partition(b"\n")[2])
    change(record)
    body = json.dumps(record).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def test_the_second_prepare_does_not_trace(module: Any, cache: Path, no_trace: Any) -> None:
    first = prepared(module().Model(), cache)
    assert "saved to" in notes(first)
    no_trace()
    model = module().Model()
    second = prepared(model, cache)
    assert "not traced, not compiled" in notes(second)
    assert [row.kind for row in second.report.pieces] == [row.kind for row in first.report.pieces]
    assert [row.reasons for row in second.report.pieces] == [row.reasons for row in first.report.pieces]
    check(second, copy.deepcopy(model), make, range(1, 11))
    assert float(model.seen[0]) == 10.0, "prepare() has left something in the buffer"
    assert second.counts["captured"] == 8


@given(model=models(mixing=False))
@settings(max_examples=max(5, settings.default.max_examples // 40))
def test_random_models_are_the_same_after_a_warm_start(tmp_path_factory: Any, model: torch.nn.Module) -> None:
    cache = tmp_path_factory.mktemp("cache")
    example = (torch.randn(5, WIDTH), torch.randn(3, WIDTH))
    cold = runner_of(model, cache=cache)
    cold.prepare(*copy.deepcopy(example))
    if "not prepared" in cold.state:
        return
    assert "saved to" in notes(cold), notes(cold)
    twin = copy.deepcopy(model)
    warm = runner_of(twin, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", None)
        warm.prepare(*copy.deepcopy(example))
    assert "not traced, not compiled" in notes(warm), notes(warm)
    assert ("only exact" in notes(warm)) == ("only exact" in notes(cold))
    state = copy.deepcopy(model)
    for n in (1, 2, 3, 7, 8, 9):
        given = (torch.randn(n, WIDTH), torch.randn(3, WIDTH))
        others = copy.deepcopy(given)
        with torch.no_grad():
            expected = state(*others)
        assert_same(warm(*given), expected)
        assert_same(given, others)
        assert_same(dict(twin.named_buffers()), dict(state.named_buffers()))


CHANGES = {
    "a helper": (("return x * SCALE", "return x * SCALE * 3"), "helper has changed"),
    "a method": (("x.shape[0] * 2 + 1", "x.shape[0] * 3 + 1"), "Model.forward has changed"),
    "a global": (("SCALE = 2.0", "SCALE = 4.0"), "SCALE"),
    "an entry of a dict": (('"shift": 1', '"shift": 2'), "TABLE"),
    "an attribute of a config": (("self.eps = 0.5", "self.eps = 0.25"), "settings.eps"),
    "an attribute of a config's class": (('kind = "relu"', 'kind = "tanh"'), "['kind'] is str 'tanh'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_stale_is_reported_and_made_anew(name: str, module: Any, saved: Path) -> None:
    change, words = CHANGES[name]
    model = module(change).Model()
    with pytest.warns(FxPatchWarning, match="it is stale") as warned:
        runner = prepared(model, saved)
    assert words in str(warned[0].message)
    assert "saved to" in notes(runner)
    check(runner, copy.deepcopy(model), make, (1, 5, 8))
    assert "not traced" in notes(prepared(module(change).Model(), saved))


FIRST, SECOND = object(), object()


class Choosing(torch.nn.Module):
    """What it computes depends on which object, operator or method it holds."""

    def __init__(self, which: Any, operator: Any = torch.relu) -> None:
        super().__init__()
        self.which, self.operator = which, operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.piecewise_tests.functional(x + 1 if self.which is FIRST else x - 1)
        return self.operator(y)


class _Callable:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Choosing(FIRST), lambda: Choosing(SECOND)),
        (lambda: Choosing(None, torch.relu), lambda: Choosing(None, torch.tanh)),
        (lambda: Choosing(None, torch.Tensor.relu), lambda: Choosing(None, torch.Tensor.tanh)),
        (lambda: Choosing(None, torch.ops.aten.relu), lambda: Choosing(None, torch.ops.aten.tanh)),
        (lambda: Choosing(None, torch.ops.aten.relu.default), lambda: Choosing(None, torch.ops.aten.tanh.default)),
        (lambda: Choosing(None, torch.nn.ReLU()), lambda: Choosing(None, torch.nn.Tanh())),
        (lambda: Choosing(None, _Callable(2)), lambda: Choosing(None, _Callable(3))),
    ],
    ids=["object", "function", "method", "packet", "overload", "module", "callable"],
)
def test_a_model_that_holds_something_else_is_not_taken_for_the_same(one: Any, other: Any, cache: Path) -> None:
    assert "saved to" in notes(prepared(one(), cache))
    model = other()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxPatchWarning)  # stale, or another key: both are right
        runner = prepared(model, cache)
    assert "not traced" not in notes(runner)
    check(runner, model, make, (2, 5))
    assert "not traced" in notes(prepared(other(), cache))


def test_a_comment_and_a_line_more_are_no_change(module: Any, saved: Path, no_trace: Any) -> None:
    no_trace()
    assert "not traced" in notes(prepared(module(("# HELPER", "# another comment\n\n")).Model(), saved))


def test_an_environment_variable_that_the_model_reads(
    module: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXPATCH_TEST_SWITCH", "1")
    model = module().Model()
    with pytest.warns(FxPatchWarning, match="FXPATCH_TEST_SWITCH is '1', and was None"):
        runner = prepared(model, saved)
    check(runner, copy.deepcopy(model), make, (3, 4))


def test_another_fake_kernel_is_stale(cache: Path) -> None:
    def library(fake: Callable[..., Any]) -> torch.library.Library:
        found = torch.library.Library("warm_tests", "FRAGMENT")
        found.define("twice(Tensor x) -> Tensor")
        found.impl("twice", lambda x: x * 2, "CPU")
        torch.library.register_fake("warm_tests::twice", fake, lib=found)
        return found

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.warm_tests.twice(x).relu()

    held = library(lambda x: torch.empty_like(x))
    try:
        prepared(Model(), cache)
        assert "not traced" in notes(prepared(Model(), cache))
    finally:
        held._destroy()
    held = library(lambda x: x.new_empty(x.shape))
    try:
        with pytest.warns(FxPatchWarning, match="warm_tests::twice or its fake kernel has changed"):
            prepared(Model(), cache)
    finally:
        held._destroy()


@pytest.mark.parametrize(
    "other",
    [
        lambda m: m.Model().double(),
        lambda m: m.Model().eval(),
        lambda m: torch.nn.Sequential(m.Model()),
        lambda m: _with(m.Model(), "factor", 3),
        lambda m: _hooked(m.Model()),
    ],
    ids=["dtype", "mode", "module", "attribute", "hook"],
)
def test_another_request_has_another_key(other: Any, module: Any, cache: Path) -> None:
    code = module()
    prepared(code.Model(), cache)
    model = other(code)
    x = next(model.parameters()).new_ones(5, WIDTH)
    name = "input" if isinstance(model, torch.nn.Sequential) else "x"
    runner = runner_of(model, cache=cache, dynamic={name: 0}, on_error="raise")
    runner.prepare(x)
    assert "saved to" in notes(runner)
    assert len(list(cache.glob("*.json"))) == 2
    assert_same(runner(x), model(x))


def test_options_that_change_what_is_made_are_in_the_key(module: Any, cache: Path) -> None:
    code = module()
    for number, options in enumerate(
        [{}, {"split": ()}, {"inputs": "static"}, {"graphs": "none"}, {"sizes": [2, 32]}, {"compile_sizes": [4]}], 1
    ):
        runner = runner_of(code.Model(), cache=cache, **options)
        runner.prepare(torch.randn(20, WIDTH))
        assert len(list(cache.glob("*.json"))) == number, options


def test_the_dtype_of_autocast_is_in_the_key(module: Any, cache: Path) -> None:
    code = module()
    for number, dtype in enumerate((None, torch.bfloat16, torch.float16), 1):
        model = code.Model().to("musa")
        with torch.autocast("musa", dtype=dtype, enabled=dtype is not None):
            runner = runner_of(model, cache=cache, graphs="none")
            runner.prepare(torch.randn(20, WIDTH).to("musa"))
            x = torch.randn(3, WIDTH).to("musa")
            assert_same(runner(x), model(x))
        assert len(list(cache.glob("*.json"))) == number, dtype


def _with(model: Any, name: str, value: Any) -> Any:
    setattr(model, name, value)
    return model


def _hooked(model: Any) -> Any:
    model.linear.register_forward_hook(lambda module, args, out: out * 2)
    return model


# -- what is not trusted -----------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "one bit": (_flip, "damaged"),
    "another key": (lambda path: rewrite(path, lambda record: record.update(key="0" * 40)), "of another key"),
    "no key": (lambda path: rewrite(path, lambda record: record.pop("key")), "of another key"),
    "no recipe": (lambda path: rewrite(path, lambda record: record.pop("recipe")), "cannot be loaded: KeyError"),
    "no entry": (lambda path: rewrite(path, lambda record: record.update(entry=f"{record['key']}.0")), "is missing"),
    "an entry above": (lambda path: rewrite(path, lambda record: record.update(entry="../..")), "is no entry of it"),
    "group may write": (lambda path: path.chmod(0o620), "can be written by others"),
    "others may write": (lambda path: path.chmod(0o602), "can be written by others"),
    "a link": (_link, "symbolic link|Too many levels"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "is no file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path, 0o600)), "is no file"),
    "the directory": (lambda path: path.parent.chmod(0o770), "is not used: cache can be written by others"),
    "above the directory": (lambda path: path.parent.parent.chmod(0o777), "where it is, can be written by others"),
    "an added file": (lambda path: (_entry(path) / "new.py").write_text("1/0"), "new.py is new"),
    "a writable entry": (lambda path: _entry(path).chmod(0o777), "can be written by others"),
}


def _entry(path: Path) -> Path:
    return path.parent / json.loads(path.read_bytes().partition(b"\n")[2])["entry"]


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_to_be_trusted_is_reported_and_made_anew(name: str, module: Any, saved: Path) -> None:
    damage, words = DAMAGES[name]
    damage(record_of(saved))
    model = module().Model()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        runner = prepared(model, saved)
    assert re.search(words, str(warned[0].message))
    assert warned[0].category is FxPatchWarning
    assert "not traced" not in notes(runner)
    check(runner, copy.deepcopy(model), make, (1, 5, 8))


def test_a_file_of_another_user(module: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat
    monkeypatch.setattr(cache_files.os, "fstat", lambda fd: _of_another_user(real(fd)))
    with pytest.warns(FxPatchWarning, match="belongs to user"):
        prepared(module().Model(), saved)


def test_a_directory_of_another_user_is_not_written_to(
    module: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.warns(FxPatchWarning, match="the cache .* is not used"):
        runner = prepared(module().Model(), cache)
    assert list(cache.iterdir()) == []
    assert runner.state == "prepared"


def _of_another_user(found: os.stat_result) -> Any:
    return os.stat_result((*found[:4], found.st_uid + 1, *found[5:10]))


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe["feed"].append(["bound", "no such parameter"]),
        lambda recipe: recipe["feed"][0].__setitem__(1, "no such parameter"),
        lambda recipe: recipe.update(spec="[1, {}]"),
        lambda recipe: recipe["pieces"].pop(),
        lambda recipe: recipe["pieces"][0].__setitem__(0, "release"),
        lambda recipe: next(iter(recipe["graphs"].values()))[-2].__setitem__(2, ["op", "no", "such", "op"]),
        lambda recipe: next(iter(recipe["graphs"].values()))[-2].__setitem__(2, ["function", "os", "system"]),
    ],
)
def test_a_load_that_fails_leaves_nothing_half_done(change: Any, module: Any, saved: Path) -> None:
    rewrite(record_of(saved), lambda record: change(record["recipe"]))
    model = module().Model()
    with pytest.warns(FxPatchWarning, match="cannot be loaded"):
        runner = prepared(model, saved)
    assert "saved to" in notes(runner)
    check(runner, copy.deepcopy(model), make, (1, 5, 8))


def test_a_graph_from_a_file_calls_nothing_but_operators() -> None:
    for target in (["function", "os", "system"], ["function", "builtins", "eval"], ["function", "subprocess", "run"]):
        with pytest.raises(ValueError, match="no function of a graph"):
            graph_json.read([["call_function", "x", target, {"tuple": ["echo"]}, {"dict": []}]])
    with pytest.raises(ValueError, match="no operation"):
        graph_json.read([["call_module", "x", "y", {"tuple": []}, {"dict": []}]])


@pytest.mark.parametrize(
    "text", ["__import__('os')", "n.real", "(lambda: 1)()", "[n]", "eval(n)", "n if n else 1", "''"]
)
def test_a_size_from_a_file_is_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match="more than arithmetic"):
        OfN.read("int", text)
    assert OfN.read("int", "max(2, 3*n // 4) - 1")(8) == 5


# -- what is not saved -------------------------------------------------------------------------------------------------


def test_a_tensor_without_a_name_is_not_saved(cache: Path) -> None:
    offset = torch.ones(WIDTH)
    runner = prepared(lambda x: x + offset, cache)
    assert "not saved for a warm start: it uses a tensor of shape [4] that is neither a parameter" in notes(runner)
    assert list(cache.iterdir()) == []


def test_other_compilers_are_not_saved(module: Any, cache: Path) -> None:
    runner = prepared(module().Model(), cache, compiler="aot_eager")
    assert "compiler 'aot_eager' leaves nothing that can be saved" in notes(runner)


def test_a_function_without_tensors_of_its_own_is_saved(cache: Path, no_trace: Any) -> None:
    prepared(_function, cache)
    no_trace()
    runner = prepared(_function, cache)
    check(runner, _function, make, (1, 2, 5))


def _function(x: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return x * scale, torch.ops.piecewise_tests.functional(x)


def test_a_constant_argument_is_in_the_key(cache: Path) -> None:
    for number, scale in enumerate((2.0, 3.0), 1):
        runner = runner_of(_function, cache=cache)
        runner.prepare(torch.randn(5, WIDTH), scale)
        x = torch.randn(4, WIDTH)
        assert_same(runner(x, scale), _function(x, scale))
        assert len(list(cache.glob("*.json"))) == number


def test_without_a_cache_nothing_is_written(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    runner_of(module().Model()).prepare(torch.randn(5, WIDTH))
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "warm_model.py"}


def test_a_rank_that_has_to_trace_makes_all_trace(module: Any, saved: Path) -> None:
    answers = iter([False])
    runner = prepared(module().Model(), saved, agree=lambda ok: next(answers, ok))
    assert "another rank has to trace" in notes(runner)
    assert runner.state == "prepared"


def test_what_others_replaced_is_removed_when_nobody_can_be_reading_it(module: Any, cache: Path) -> None:
    prepared(module().Model(), cache)
    key = record_of(cache).stem
    old, recent = cache / f"{key}.old", cache / f"{key}.recent"
    for path in (old, recent):
        path.mkdir()
    os.utime(old, (0, 0))
    record_of(cache).unlink()
    prepared(module().Model(), cache)
    assert not old.exists()
    assert recent.exists()


# -- sizes compiled for themselves -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Compiling:
    """A compiler that counts: (dynamic or the size, calls)."""

    made: list[Any] = dataclasses.field(default_factory=list)
    ran: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes = [each.shape[0] for each in inputs if isinstance(each, torch.Tensor) and each.dim() == 2]
        which = next((None if isinstance(size, torch.SymInt) else size for size in sizes if size != WIDTH), "none")
        self.made.append(which)
        assert which is None or not any(isinstance(each, torch.SymInt) for each in inputs)

        def run(*args: Any) -> Any:
            self.ran.append(which)
            return gm(*args)

        return run


class Layers(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.ops.piecewise_tests.functional(layer(x)).tanh()
        return x


@pytest.mark.parametrize("graphs", ["recorder", "none"])
def test_compile_sizes_are_compiled_once_per_distinct_piece_and_used_at_exactly_that_size(graphs: str) -> None:
    compiler, model = Compiling(), Layers(5)
    runner = runner_of(model, compiler=compiler, compile_sizes=[8], graphs=graphs, sizes=[2, 6, 8])
    report = runner.prepare(torch.randn(6, WIDTH))
    assert compiler.made.count(8) == compiler.made.count(None) == 3  # first, between, last
    assert any("size 8 has compiled forms of its own" in note for note in report.notes)
    check(runner, model, make, range(1, 12))
    compiler.ran.clear()
    runner(torch.randn(8, WIDTH))
    assert set(compiler.ran) == {8}
    compiler.ran.clear()
    runner(torch.randn(6, WIDTH))
    assert set(compiler.ran) == {None}


@pytest.mark.parametrize("sizes", [[1], [0], [-2], [4, 4], [2.5], ["8"], [True]])
def test_compile_sizes_that_make_no_sense(sizes: Any) -> None:
    with pytest.raises(SizesError, match="cannot be compiled for"):
        runner_of(Layers(1), compile_sizes=sizes)


def test_compile_sizes_with_the_eager_compiler_and_a_cache(cache: Path, no_trace: Any) -> None:
    prepared(Layers(2), cache, compile_sizes=[4])
    no_trace()
    model = Layers(2)
    check(prepared(model, cache, compile_sizes=[4]), model, make, range(1, 10))


assert SPLIT  # registers the operators


def test_hooks_on_all_modules_are_not_cached(cache: Path) -> None:
    assert "saved to" in notes(prepared(Choosing(None, torch.nn.ReLU()), cache))
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, result: result * 2 if isinstance(module, torch.nn.ReLU) else None
    )
    try:
        model = Choosing(None, torch.nn.ReLU())
        runner = prepared(model, cache)
        assert "there are hooks on all modules of this process" in notes(runner)
        check(runner, model, make, (2, 5))
    finally:
        hook.remove()


def test_a_forward_of_torchs_own_that_was_replaced_is_another_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "saved to" in notes(prepared(Choosing(None, torch.nn.ReLU()), cache))
    original = torch.nn.ReLU.forward
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, x: original(self, x) * 2)
    model = Choosing(None, torch.nn.ReLU())
    runner = prepared(model, cache)
    assert "not traced" not in notes(runner)
    check(runner, model, make, (2, 5))
