"""The audit finds each deliberately wrong fake kernel by its own rule, and nothing at the right ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_kernels.audit import (
    RULES,
    ImportFailedError,
    NoSuchOperatorsError,
    Report,
    UnknownNamespaceError,
    WorkerFailedError,
    as_json,
    audit,
)

OPERATORS = """
import math
import torch
from torch.fx.node import has_side_effect
import audited_runtime

torch.utils.rename_privateuse1_backend("audited")
torch._register_device_module("audited", audited_runtime)
lib = torch.library.Library("audited", "DEF")


def op(schema, fake=None):
    lib.define(schema)
    if fake is not None:
        lib.impl(schema.partition("(")[0], fake, "Meta")


def ok_add(x, other, alpha=1.0):
    return x.new_empty(x.shape)


def ok_halves(x, dim=-1):
    torch._check(x.size(dim) % 2 == 0, lambda: "x cannot be halved")
    shape = list(x.shape)
    shape[dim] = shape[dim] // 2
    return x.new_empty(shape), x.new_empty(shape)


def ok_picky(x, weight, layout="BSH", *, scale=None, group=0):
    if x.dim() != 3:
        raise RuntimeError("x must have 3 dimensions")
    if weight.dtype != torch.int8:
        raise RuntimeError("weight must be int8")
    if weight.dim() != 2 or weight.size(0) != x.size(2):
        raise RuntimeError("weight does not fit x")
    if layout == "TND":
        if scale is None or scale.dim() != 1:
            raise RuntimeError("with TND, scale must have 1 dimension")
    return x.new_empty(x.size(0), x.size(1), weight.size(1))


def ok_same_default(x, *, dst_type=1):
    return x.new_empty(x.shape, dtype={1: torch.int8, None: torch.int8}[dst_type])


op("ok_add(Tensor x, Tensor other, float alpha=1.0) -> Tensor", ok_add)
op("ok_halves(Tensor x, int dim=-1) -> (Tensor, Tensor)", ok_halves)
op("ok_picky(Tensor x, Tensor weight, str layout='BSH', *, Tensor? scale=None, int group=0) -> Tensor", ok_picky)
op("ok_same_default(Tensor x, *, int? dst_type=None) -> Tensor", ok_same_default)
op("ok_inplace_(Tensor(a!) x) -> Tensor(a!)", lambda x: x)
op("ok_declared(Tensor x, Tensor(a!) out) -> ()")
op("ok_renamed(Tensor x1, Tensor x2) -> Tensor", lambda x2, y: x2.new_empty(x2.shape))

op("no_fake(Tensor x) -> Tensor")
op("no_fake_backward(Tensor grad) -> Tensor")
op("hides(Tensor x, Tensor out) -> ()", lambda x, out: None)
op("renamed_(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
op("kept(Tensor x) -> ()", lambda x: None)
has_side_effect(torch.ops.audited.kept.default)
op("cache(Tensor x, Tensor k_cache) -> Tensor", lambda x, k_cache: x.new_empty(x.shape))
op("cache_v2(Tensor x, Tensor(a!) k_cache) -> Tensor", lambda x, k_cache: x.new_empty(x.shape))
op("alias(Tensor x) -> Tensor", lambda x: x)
op("fresh_(Tensor(a!) x) -> Tensor(a!)", lambda x: x.new_empty(x.shape))
op("missing_default(Tensor x, int dim=-1, *, bool flag=False) -> Tensor", lambda x, dim, *, flag: x.new_empty(x.shape))


def differing_default(x, *, keep=True):
    return x.new_empty(x.shape if keep else x.shape[:-1])


op("differing_default(Tensor x, *, bool keep=False) -> Tensor", differing_default)
op("refused(Tensor x, *, Tensor? bias=None) -> Tensor", lambda x: x.new_empty(x.shape))
op("too_many(Tensor x) -> Tensor", lambda x, cmd: x.new_empty(x.shape))
op("swapped(Tensor cos, Tensor sin) -> Tensor", lambda sin, cos: cos.new_empty(cos.shape))


def undefined(x):
    torch._check(x.dim() > 0, lambda: f"not {nobody_defines_this}")
    return x.new_empty(x.shape)


op("undefined(Tensor x) -> Tensor", undefined)
op("internal(Tensor x) -> Tensor", lambda x: torch.empty_like([0]))
op("count(Tensor x) -> Tensor", lambda x: (x.new_empty(x.shape), x.new_empty(x.shape)))
op("void_count(Tensor(a!) x) -> ()", lambda x: x)
lib.define("kind(Tensor x) -> (Tensor, Tensor[])")
torch.library.register_fake("audited::kind", lambda x: (x.new_empty(x.shape), x.new_empty(x.shape)), lib=lib)
op("constant(Tensor x) -> (Tensor, int)", lambda x: (x.new_empty(x.shape), 0))
op("floats(Tensor x) -> Tensor", lambda x: x.new_empty(math.floor(x.size(-1) / 2)))


def surplus(x):
    return x.new_empty(x.shape) if x.size(-1) > 100 else x.new_empty(*x.shape)


op("surplus(Tensor x) -> Tensor", surplus)
op("specialises(Tensor x) -> Tensor", lambda x: x.new_empty(int(math.ceil(x.size(-1) / 32))))


def not_symbolic(x):
    if not isinstance(x.size(-1), int):
        raise TypeError("a size must be an int")
    return x.new_empty(x.shape)


op("not_symbolic(Tensor x) -> Tensor", not_symbolic)
op("strides(Tensor x) -> Tensor", lambda x: torch.empty_like(x))
op("promotes(Tensor x, Tensor gamma) -> Tensor", lambda x, gamma: x.new_empty(x.shape + (2,), dtype=gamma.dtype))
op("reads(Tensor x) -> Tensor", lambda x: x.new_empty(int(x.sum().item())))
op("asks(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape) if audited_runtime.soc_version() < 260 else x.clone())


def meta_only(x):
    if x.device.type != "meta":
        raise RuntimeError("only on meta")
    return x.new_empty(x.shape)


lib.define("meta_only(Tensor x) -> Tensor")
torch.library.register_fake("audited::meta_only", meta_only, lib=lib)


def never(x):
    raise ValueError("only on Sundays")


op("never(Tensor x) -> Tensor", never)
op("trained(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
torch.library.register_autograd("audited::trained", lambda ctx, grad: torch.ops.audited.no_fake_backward(grad), lib=lib)
op("trained_well(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
torch.library.register_autograd(
    "audited::trained_well", lambda ctx, grad: torch.ops.audited.ok_add(grad, grad), lib=lib
)
"""

RUNTIME = """
def is_available():
    return False

def _lazy_init():
    pass

def soc_version():
    _lazy_init()
    return 0
"""

EXPECTED = {
    "no_fake": {"missing-fake"},
    "no_fake_backward": {"missing-fake-backward"},
    "hides": {"hidden-mutation"},
    "renamed_": {"hidden-mutation"},
    "kept": {"undeclared-effect"},
    "cache": {"suspected-mutation"},
    "alias": {"undeclared-alias"},
    "fresh_": {"dropped-alias"},
    "missing_default": {"missing-default"},
    "differing_default": {"differing-default"},
    "refused": {"refused-argument"},
    "too_many": {"refused-argument", "not-probed"},
    "swapped": {"swapped-arguments"},
    "undefined": {"undefined-name"},
    "internal": {"python-error", "not-probed"},
    "count": {"result-count", "not-probed"},
    "void_count": {"result-count", "not-probed"},
    "kind": {"result-kind", "not-probed"},
    "constant": {"constant-result"},
    "floats": {"float-size"},
    "surplus": {"surplus-guard"},
    "specialises": {"specialised-size"},
    "not_symbolic": {"dynamic-shapes-fail"},
    "strides": {"permuted-strides"},
    "promotes": {"mixed-dtype"},
    "reads": {"reads-data", "not-probed"},
    "asks": {"touches-hardware"},
    "meta_only": {"fake-tensor-fails", "dynamic-shapes-fail"},
    "never": {"not-probed"},
    "trained": {"backward-fails"},
}
"""Operator -> the rules that find it; every other operator of the namespace is right."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("audited")
    (directory / "audited_operators.py").write_text(OPERATORS)
    (directory / "audited_runtime.py").write_text(RUNTIME)
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))


@pytest.fixture(scope="module")
def report(directory: Path) -> Report:
    return audit("audited", imports=["audited_operators"], jobs=1)


def test_each_rule_finds_its_operator_and_nothing_else(report: Report) -> None:
    found: dict[str, set[str]] = {}
    for finding in report.findings:
        found.setdefault(finding.operator.removeprefix("audited::"), set()).add(finding.rule)
    assert found == EXPECTED


def test_right_operators_were_really_called(report: Report) -> None:
    right = {name: state for name, state in report.states.items() if name.startswith("audited::ok_")}
    assert right.pop("audited::ok_declared") == "no kernel of its own"
    assert set(right.values()) == {"probed"}
    assert len(right) == 6


def test_every_rule_is_shown_to_fire_but_those_that_end_the_process() -> None:
    assert set(RULES) - set().union(*EXPECTED.values()) == {"crash", "hang"}


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("missing_default", "`dim` has no default; the schema says dim=-1"),
        (
            "differing_default",
            "`keep` has the default True; the schema says keep=False: (16, 64) torch.float16 instead of (16,)",
        ),
        (
            "refused",
            "`bias` is a keyword of the schema; the kernel has none: fails whenever it differs from the default",
        ),
        ("too_many", "the kernel requires `cmd`, which the schema does not have"),
        ("swapped", "argument 0 is `cos` in the schema and `sin` here; `cos` stands at 1"),
        ("undefined", "reads `nobody_defines_this`, which is not defined"),
        ("count", "returns 2 results; the schema has 1"),
        ("void_count", "returns 1 results; the schema has 0"),
        ("kind", "result 1 is Tensor; the schema says Tensor[]"),
        ("floats", "size 0 of result 0 is FloorToInt(IntTrueDiv(n64, 2)) (FloorToInt, IntTrueDiv)"),
        ("surplus", "n64 <= 100 is assumed; n64=128 and n64=192 are accepted with the same formula"),
        ("specialises", "size 0 of result 0 is traced as the constant 2; with other inputs it is 1, 3, 4, 6, 10, 32"),
        ("strides", "result 0 keeps those of `x`. Only the kernel can tell whether it does so too"),
        ("promotes", "result 0 takes the dtype of `gamma` (torch.float32), not of `x`"),
        ("asks", "initialises the device: calls audited_runtime.soc_version, audited_runtime._lazy_init"),
        ("trained", "audited::no_fake_backward has no fake kernel"),
        ("never", "ValueError: only on Sundays"),
        ("cache", "cache_v2 declares that it writes k_cache"),
        ("alias", "result 0 shares the storage of `x`"),
    ],
)
def test_messages(report: Report, operator: str, part: str) -> None:
    messages = [finding.message for finding in report.findings if finding.operator == f"audited::{operator}"]
    assert any(part in message for message in messages), messages


def test_a_finding_says_where_and_how_to_see_it(report: Report, directory: Path) -> None:
    (strides,) = (f for f in report.findings if f.operator == "audited::strides")
    assert strides.file == "audited_operators.py"
    source = (directory / "audited_operators.py").read_text().splitlines()
    assert source[strides.line - 1].startswith('op("strides(')
    assert strides.evidence == (
        "torch.ops.audited.strides(torch.empty((64, 16), dtype=torch.float16, device='meta').permute(1, 0))"
    )
    assert strides.confidence == "only the kernel can tell"


@pytest.mark.slow
def test_the_answer_is_the_same_with_another_number_of_workers(directory: Path, report: Report) -> None:
    assert as_json(audit("audited", imports=["audited_operators"], jobs=2)) == as_json(report)


FATAL = """
import ctypes, os, time
import torch

lib = torch.library.Library("fatal", "DEF")


def op(schema, fake):
    lib.define(schema)
    lib.impl(schema.partition("(")[0], fake, "Meta")


def dies_symbolically(x):
    if isinstance(x.size(0), torch.SymInt):
        os.abort()
    return torch.empty_like(x)


op("dies(Tensor x) -> Tensor", lambda x: ctypes.string_at(0))
op("dies_symbolically(Tensor x) -> Tensor", dies_symbolically)
op("hangs(Tensor x) -> Tensor", lambda x: time.sleep(1000))
op("leaves(Tensor x) -> Tensor", lambda x: os._exit(3))
op("lives(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
"""


@pytest.mark.slow
def test_an_operator_that_ends_or_stops_its_process_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fatal_operators.py").write_text(FATAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = audit("fatal", imports=["fatal_operators"], limit_s=4.0, jobs=2)
    found = {(f.operator.removeprefix("fatal::"), f.rule): f.message for f in report.findings}
    assert set(found) == {
        ("dies", "crash"),
        ("dies_symbolically", "crash"),
        ("dies_symbolically", "permuted-strides"),  # found after the crash, by another process
        ("hangs", "hang"),
        ("leaves", "crash"),
    }
    assert "signal SIGSEGV in the stage: search for accepted calls" in found["dies", "crash"]
    assert "signal SIGABRT in the stage: symbolic sizes 0" in found["dies_symbolically", "crash"]
    assert "exit status 3" in found["leaves", "crash"]
    assert found["hangs", "hang"] == "no answer within 4 s in the stage: search for accepted calls"
    assert report.states == {
        "fatal::dies": "crash",
        "fatal::dies_symbolically": "probed",
        "fatal::hangs": "hang",
        "fatal::leaves": "crash",
        "fatal::lives": "probed",
    }


def test_unknown_namespace() -> None:
    with pytest.raises(UnknownNamespaceError) as error:
        audit("nobody")
    text = str(error.value)
    assert "there is no operator namespace 'nobody'" in text
    assert "aten, " in text
    assert "add --import PACKAGE" in text


@pytest.mark.slow
def test_what_else_can_go_wrong_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    with pytest.raises(ImportFailedError, match=r"cannot import 'no_such_vendor'(.|\n)*ModuleNotFoundError"):
        audit("npu", imports=["no_such_vendor"])
    with pytest.raises(
        NoSuchOperatorsError, match=r"no operator of audited matches 'rms\*'(.|\n)*alias(.|\n)*quote the pattern"
    ):
        audit("audited", imports=["audited_operators"], operators="rms*")
    (tmp_path / "dying_vendor.py").write_text("print('no driver', flush=True); import os; os._exit(7)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkerFailedError, match="exit status 7; its last output: no driver"):
        audit("npu", imports=["dying_vendor"])
