"""Native fallbacks, removed where that is proven to be right. The problem: engines choose between `forward_native` and
a device's kernel by flags ("compiling", "graph mode", environment variables), which mix up three questions that each
operator answers differently: can Dynamo trace it, can a graph capture it, is it faster. The flags go stale, and nobody
sees it. The rule: start native, which is safe; try each optimized forward on what it really gets; promote what passes;
say why.

In order, the cheapest refusal first: it computes what native does, with every effect, for each instance; then, once
for instances that are alike (class, settings, shapes of the inputs): Dynamo traces it alone, a throw-away graph of it
replays right, it is not slower."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxpatch.native.agreement import TOLERANCES, Tolerance
from fxpatch.native.decisions import Decision, Decisions
from fxpatch.native.forwards import NATIVE, OPTIMIZED, native
from fxpatch.native.graph_trial import replays, speed
from fxpatch.native.liveness import unread
from fxpatch.native.operators import NativeOperator, find_operators
from fxpatch.native.outcome import written
from fxpatch.native.recording import Call, record
from fxpatch.native.state import State
from fxpatch.native.trial import Capture, Refused, Terms, Trial

SLOWER = 0.95  # time of native over time of optimized: below it, it is slower; what lies between is noise

Example = tuple[tuple[Any, ...], Mapping[str, Any]]


def promote(
    model: nn.Module,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any],
    device: str | torch.device,
    *,
    capture: Capture | None,
    tolerance: Mapping[torch.dtype, Tolerance] | None = None,
    more_examples: Sequence[Example] = (),
    splitting: Callable[[torch.fx.Node], object] | None = None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    slower: bool = False,
    overwrites: bool = False,
) -> Decisions:
    """Tries each operator's optimized forward, and decides.

    The model runs once per example, natively and under no_grad; afterwards it, its buffers, the arguments and the
    random state are as before, except for attributes that forwards create when they first run.

    Args:
        model: on the device, in the mode (`eval()`) in which it will be used.
        example_args, example_kwargs: real inputs, at the smallest size that will be captured.
        device: whose forwards are tried.
        capture: `capture(call)` captures a call of no arguments, and returns an object with `.result`, `.replay()` and
            `.release()`; it may run the call first. What it raises (CaptureFailedError) refuses the operator. None:
            the device has no graphs.
        tolerance: replaces entries of `TOLERANCES`, e.g. `{torch.int8: Tolerance(0, 1, 0)}` for kernels that round
            differently.
        more_examples: `(args, kwargs)` of other sizes: compared too, and what differs in size is traced as dynamic.
        splitting: which nodes of a graph stay outside captures; operators with such a node are not captured.
        compiled: makes of a forward what is timed where replays cannot be (`torch.compile`); None: the forward itself.
        slower: promote also what is slower than native (ratio below `SLOWER`).
        overwrites: promote also what overwrites arguments that the native forward leaves alone, where nobody reads them
            afterwards: tried with the whole model, see `liveness`.

    Raises:
        What the model raises with every operator native.
    """
    operators = find_operators(model, device)
    terms = Terms({**TOLERANCES, **(tolerance or {})}, capture, _synchronizer(device), splitting, compiled)
    alike: dict[Hashable, Decision] = {}
    with torch.no_grad(), _random_state(device):
        examples = [(example_args, example_kwargs), *more_examples]
        recorded = [record(model, operators, args, kwargs) for args, kwargs in examples]
        terms.synchronize()
        with native(operators):
            rows = []
            for op in operators:
                calls = [example[op.name] for example in recorded]
                spare = functools.partial(_spare, model, op, examples) if overwrites else None
                rows.append(_decide(op, calls, terms, alike, slower, spare))
    return Decisions(operators, rows)


def _decide(
    op: NativeOperator,
    examples: list[list[Call]],
    terms: Terms,
    alike: dict[Hashable, Decision],
    slower: bool,
    spare: Callable[[list[Trial]], frozenset[int]] | None,
) -> Decision:
    row = Decision(op.name, op.kind, op.optimized_name, NATIVE, "")
    if op.same_code():
        return replace(row, reason=f"{op.optimized_name} is forward_native")
    calls = [call for example in examples for call in example]
    if not calls:
        return replace(row, reason="never called with the example inputs: nothing to try it on")
    trials = [Trial(op, call, terms) for call in calls]
    alike_as: Hashable = (op.configuration(), tuple(call.saved.signature() for call in calls))  # nothing is added yet
    before = State(op.module)
    try:
        if spare is not None and (ignore := spare(trials)):
            trials, alike_as = [Trial(op, call, terms, ignore) for call in calls], (alike_as, ignore)
        changed = [written(trial.call.saved.fresh().leaves, trial.numbers()) for trial in trials]
        if alike_as not in alike:
            alike[alike_as] = _try_once(trials[0], examples, replace(row, chosen=OPTIMIZED), any(changed), slower)
        shared = alike[alike_as]
        row = replace(row, chosen=shared.chosen, reason=shared.reason, speed=shared.speed, measured=shared.measured)
    except Refused as refusal:
        row = replace(row, reason=str(refusal))
    errors = [trial.error for trial in trials if trial.error is not None]
    if row.chosen == NATIVE:
        before.restore()
    return replace(row, error=functools.reduce(lambda a, b: a | b, errors) if errors else None)


def _spare(model: nn.Module, op: NativeOperator, examples: Sequence[Example], trials: list[Trial]) -> frozenset[int]:
    """The arguments that the optimized forward overwrites, the native one does not, and nobody reads afterwards.

    Raises:
        Refused: they are read.
    """
    overwritten: set[int] = set()
    for trial in trials:
        before = trial.call.saved.fresh().leaves
        overwritten |= written(before, trial.optimized()) - written(before, trial.native())
    numbers = frozenset(overwritten)
    if numbers and not all(unread(model, op, numbers, args, kwargs) for args, kwargs in examples):
        names = trials[0].call.names
        raise Refused(f"overwrites {', '.join(names[n] for n in sorted(numbers))}, which is read afterwards")
    return numbers


def _try_once(trial: Trial, examples: list[list[Call]], row: Decision, writes: bool, slower: bool) -> Decision:
    """The trials that stand for all instances that are alike; a refusal is a decision here: it stands for all too."""
    sizes = [example[0] for example in examples[1:] if example] if examples[0] else []
    try:
        graph = trial.traces(sizes)
        not_captured = replays(trial, graph)
    except Refused as refusal:
        return replace(row, chosen=NATIVE, reason=str(refusal))
    times, measured = speed(trial, replay=not not_captured, writes=writes)
    row = replace(row, speed=times, measured=measured)
    passed = "passed: traced, replayed, equal to native" if not not_captured else "passed: traced, equal to native"
    if not_captured:
        passed += f"; not captured: {not_captured}"
    if times >= SLOWER:
        return replace(row, reason=passed)
    if slower:
        return replace(row, reason=f"{passed}; slower than native, promoted as asked")
    return replace(row, chosen=NATIVE, reason=f"slower than native: {times:.2f}x, promoted from {SLOWER:.2f}x on")


def _synchronizer(device: str | torch.device) -> Callable[[], object]:
    kind = torch.device(device).type
    if kind == "cpu":
        return lambda: None
    synchronize: Callable[[], object] = torch.get_device_module(kind).synchronize
    return synchronize


@contextlib.contextmanager
def _random_state(device: str | torch.device) -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had drawn any, on the host and where the device has a generator."""
    kind = torch.device(device).type
    module: Any = None if kind == "cpu" else torch.get_device_module(kind)
    drawn = torch.get_rng_state()
    on_device = module.get_rng_state() if module is not None and hasattr(module, "get_rng_state") else None
    try:
        yield
    finally:
        torch.set_rng_state(drawn)
        if module is not None and on_device is not None:
            module.set_rng_state(on_device)
