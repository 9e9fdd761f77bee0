"""Splitting operators of every kind, random models made of them, and what equal means: shared by the runner's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.piecewise.runner import PiecewiseRunner

WIDTH = 4
LIBRARY = torch.library.Library("piecewise_tests", "DEF")
faults: dict[int, Callable[[torch.Tensor], None]] = {}  # what `fallible` does at a place


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "PrivateUse1"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"piecewise_tests::{name}", fake, lib=LIBRARY)


def _store(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes as a kernel from a library does: nobody counts it."""
    memory = torch.empty(0, dtype=cache.dtype, device=cache.device)
    with torch.inference_mode(False):
        memory.set_(cache.untyped_storage(), cache.storage_offset(), cache.size(), cache.stride())
        memory[slots] = rows


def _out_kernel(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(q * k)


def _fallible(x: torch.Tensor, place: int) -> torch.Tensor:
    if place in faults:
        faults[place](x)
    return x * 1.5


_define("out(Tensor q, Tensor k, Tensor(a!) out) -> ()", _out_kernel, lambda q, k, out: None)
_define("functional(Tensor q) -> Tensor", lambda q: q * 2, torch.empty_like)
_define(
    "pair(Tensor q) -> (Tensor, Tensor)", lambda q: (q + 1, q * 3), lambda q: (torch.empty_like(q), torch.empty_like(q))
)
_define(
    "expanded(Tensor q) -> Tensor",
    lambda q: q[:, :1].clone().expand(q.shape[0], WIDTH),
    lambda q: q.new_empty(q.shape[0], 1).expand(q.shape[0], WIDTH),
)
_define("store(Tensor rows, Tensor(a!) cache, Tensor slots) -> ()", _store, lambda rows, cache, slots: None)
_define("fallible(Tensor x, int place) -> Tensor", _fallible, lambda x, place: torch.empty_like(x))

ops = torch.ops.piecewise_tests
SPLIT = tuple(f"piecewise_tests::{name}" for name in ("out", "functional", "pair", "expanded", "store", "fallible"))


def runner_of(model: Callable[..., Any], **options: Any) -> PiecewiseRunner:
    """A runner with this file's splitting operators, three sizes and the eager compiler, unless otherwise said."""
    defaults = {"dynamic": {"x": 0}, "split": SPLIT, "sizes": [2, 4, 8], "compiler": "eager", "graphs": "recorder"}
    return PiecewiseRunner(model, **{**defaults, **options})


def assert_same(found: Any, expected: Any) -> None:
    """The same structure, types, shapes, dtypes, and numbers up to the order of a sum."""
    found_leaves, found_spec = pytree.tree_flatten(found)
    leaves, spec = pytree.tree_flatten(expected)
    assert found_spec == spec
    for one, other in zip(found_leaves, leaves, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
        elif isinstance(other, float):
            assert type(one) is float
            assert abs(one - other) <= 1e-4 * max(1.0, abs(other))
        else:
            assert type(one) is type(other)
            assert one == other


def check(runner: PiecewiseRunner, model: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], ns: Any) -> None:
    """Each call equals the model's, also in what it writes to its arguments."""
    for n in ns:
        given = make(n)
        twin = copy.deepcopy(given)
        with torch.no_grad():
            expected = model(*twin)
        assert_same(runner(*given), expected)
        assert_same(given, twin)


@contextmanager
def fault(place: int, act: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """`fallible(x, place)` does `act(x)` first."""
    faults[place] = act
    try:
        yield
    finally:
        del faults[place]


# -- random models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One operation: a key of `ROWWISE` or `MIXING`, and numbers that pick among the values there are."""

    kind: str
    first: int
    second: int


class RandomModel(torch.nn.Module):
    """Steps over a growing list of values, all [n, WIDTH], of which the first is x.

    Args:
        steps: what is done.
        picks: which values are returned, besides the last.
        returns: how: a key of `RETURNS`.
    """

    def __init__(self, steps: tuple[Step, ...], picks: tuple[int, ...], returns: str) -> None:
        super().__init__()
        self.steps, self.picks, self.returns = steps, picks, returns
        with torch.random.fork_rng():
            torch.manual_seed(len(steps))
            self.one = torch.nn.Linear(WIDTH, WIDTH)
            self.other = torch.nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight  # tied
        self.register_buffer("state", torch.zeros(WIDTH))

    def extra_repr(self) -> str:
        return f"{self.steps}, {self.picks}, {self.returns!r}"

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> Any:
        values = [x]
        for step in self.steps:
            a, b = values[step.first % len(values)], values[step.second % len(values)]
            value = {**ROWWISE, **MIXING}[step.kind](self, a, b, cache)
            if value is not None:
                values.append(value)
        picked = [values[pick % len(values)] for pick in self.picks]
        return RETURNS[self.returns](x, cache, values[-1], picked)


def _out(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(a)
    ops.out(a, b, result)
    return result.tanh()


def _views(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    left, right = a.chunk(2, dim=-1)
    return torch.cat([right, b.view(-1, 2, 2).transpose(1, 2)[:, 0], left], -1)[:, :WIDTH]


def _pair(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    first, second = ops.pair(a)
    return (first - second + b).tanh()


def _counted(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    m.state.add_(1)
    return a + m.state.sin()


def _cached(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    cache.mul_(0.5).add_(a[:1].sum(0))
    return b + cache.sum(0)


def _in_place(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> None:
    a.mul_(0.5).sub_(1)


def _in_place_through_a_view(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> None:
    a[:, 1:3] += 1


def _on_the_host(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return b * a[:1].tanh().sum().item()


def _selected(m: Any, a: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return b + a.flatten()[a.flatten() > 0].tanh().sum() * 0.01


ROWWISE: dict[str, Callable[..., torch.Tensor | None]] = {
    "add": lambda m, a, b, cache: (a + b).tanh(),
    "multiply": lambda m, a, b, cache: a.tanh() * b,
    "one": lambda m, a, b, cache: m.one(a),
    "other": lambda m, a, b, cache: m.other(a).relu(),
    "softmax": lambda m, a, b, cache: a.softmax(-1),
    "running sum": lambda m, a, b, cache: a.tanh().cumsum(0).sin(),
    "views": _views,
    "out": _out,
    "functional": lambda m, a, b, cache: ops.functional(a).tanh(),
    "functional, kept": lambda m, a, b, cache: ops.functional(a),
    "expanded": lambda m, a, b, cache: ops.expanded(a).sin() + b,
    "pair": _pair,
    "counted": _counted,
    "cached": _cached,
    "in place": _in_place,
    "in place through a view": _in_place_through_a_view,
    "on the host": _on_the_host,
}
MIXING: dict[str, Callable[..., torch.Tensor | None]] = {  # a row more changes the others
    "mean": lambda m, a, b, cache: b - a.mean(0),
    "size": lambda m, a, b, cache: b / (1 + a.shape[0]),
    "flipped": lambda m, a, b, cache: a.flip(0),
    "selected": _selected,
}
RETURNS: dict[str, Callable[..., Any]] = {
    "one": lambda x, cache, last, picked: last,
    "tuple": lambda x, cache, last, picked: (last, *picked),
    "dict": lambda x, cache, last, picked: {"last": last, "all": [picked, (x, None)], "n": x.shape[0], "cache": cache},
    "parts": lambda x, cache, last, picked: (last[:, 1:], last.t(), last.shape, x.shape[0] * 2 + 1, 3, "text"),
    "numbers": lambda x, cache, last, picked: {
        "half": x.shape[0] / 2,
        "first": last[:1].tanh().sum().item(),
        "y": last,
    },
}
