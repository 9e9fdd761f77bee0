"""From a checked request to compiled pieces: promoted, traced, split, compiled, or read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from fxpatch.errors import NotCapturableError, TraceError
from fxpatch.native import Decisions, assert_native_absent
from fxpatch.piecewise.agreement import Agreement
from fxpatch.piecewise.arguments import Input
from fxpatch.piecewise.broken_model import BrokenModel
from fxpatch.piecewise.build import Built, build
from fxpatch.piecewise.lint import Rule, is_collective, lint, name_of, reason
from fxpatch.piecewise.options import Options
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.promotion import decided
from fxpatch.piecewise.rules import idle
from fxpatch.piecewise.same_as_eager import as_eager
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.split import Split, split
from fxpatch.piecewise.start import Start
from fxpatch.piecewise.statics import Statics
from fxpatch.piecewise.surroundings import shares_what_is_written
from fxpatch.piecewise.trace import Traced, trace
from fxpatch.piecewise.traced_model import TracedModel
from fxpatch.piecewise.warm_start.artifacts import Artifacts, Warm
from fxpatch.piecewise.warm_start.recipe import Forms
from fxpatch.piecewise.warm_start.request import Request


def compiled(
    options: Options, begun: Start, written: Snapshot, agreement: Agreement, decisions: Decisions | None = None
) -> Prepared:
    """Promotes, traces, splits and compiles.

    Args:
        decisions: of an earlier time, about native fallbacks; None to try.
        written: taken of all that the model might write to, before this.
        agreement: asked whenever the model is traced, before it runs: ranks that cannot trace it run no collective.

    Raises:
        TraceError, CompileError: it cannot be.
        NotCapturableError: with `on_error="raise"`, something would run between graphs that nobody has asked for.
        CaptureFailedError: another rank could not trace it.
    """
    if options.front_end == "break":
        return _broken(options, begun, written, agreement)
    found_rules = lint(begun.device.type, registers_generator=begun.device.registers_generator or not begun.graphs)
    rules = (*begun.rules, *found_rules)

    artifacts = _artifacts(options, begun, agreement) if decisions is None else None
    if artifacts is not None:
        warm = artifacts.load(written)
        # a rank that traces runs the model's collectives: all do, or none
        if agreement.everywhere(warm is not None) and warm is not None:
            return _model(options, begun, warm, None, artifacts)
        if warm is not None:
            artifacts.refuse()

    def before(tensors: Sequence[torch.Tensor]) -> None:
        agreement.require()
        written.add(tensors)

    def traced_now() -> Traced:
        look = (lambda gm: None) if artifacts is None else artifacts.watch.look
        call = (options.model, begun.args, begun.kwargs, options.dynamic, begun.largest, before, look)
        written.restore()
        traced = trace(*call, regions=agreement.alone)  # a rank that has to trace again would run collectives alone
        if traced.regions and not as_eager(options.model, begun.args, begun.kwargs, traced.returned, written):
            written.restore()
            traced = trace(*call, regions=False)
        traced.returned.clear()
        return traced

    notes: list[str] = []
    if decisions is None and options.native != "keep":
        decisions = decided(options, begun, rules, traced_now, agreement, notes)
    with nullcontext() if decisions is None else decisions.apply():
        traced = traced_now()
    if decisions is not None:
        assert_native_absent(traced.gm, decisions)
    leaves_written = _leaves(begun, written)
    if options.on_error == "raise" and begun.graphs:
        _check_capturable(traced.gm, begun.rules, found_rules)
    pieces = split(traced.gm, rules)
    forms = _forms(options, begun, pieces, artifacts)
    if artifacts is not None:
        artifacts.save(traced, pieces, forms, written, leaves_written)
    model = _model(options, begun, Warm(traced, pieces, forms, leaves_written), decisions, artifacts)
    model.notes += [*notes, *idle(options.split, traced.gm)]
    return model


def _check_capturable(gm: torch.fx.GraphModule, asked: Sequence[Rule], found: Sequence[Rule]) -> None:
    """That what cannot be captured is what the caller and the profile have named. Collectives need no naming."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or reason(node, (*asked, is_collective)):
            continue
        why = reason(node, found)
        if why is not None:
            raise NotCapturableError(
                f"{name_of(node)} cannot be in a graph.",
                seen=f"{why}: {node.format_node()}"[:400],
                expected="operations that a device graph can hold, between the operators that were named in split=",
                hint=f"name it: split=[{name_of(node)!r}], take it out of the model, or use on_error='fallback', which "
                "splits here and says so in the report",
            )


def _forms(options: Options, begun: Start, pieces: Split, artifacts: Artifacts | None) -> Forms:
    """What each piece is compiled to: for every size (None), and for single ones."""
    done: dict[str, Built] = {}
    with nullcontext(lambda key: nullcontext()) if artifacts is None else artifacts.compiling() as around:
        return {
            size: build(pieces.pieces, begun.compiler, size, around, done) for size in (None, *options.compile_sizes)
        }


def _model(
    options: Options, begun: Start, made: Warm, decisions: Decisions | None, artifacts: Artifacts | None
) -> TracedModel:
    owned, statics = _memory(options, begun, made.written)
    exact = {size: built for size, built in made.forms.items() if size is not None}
    built = made.forms[None]
    model = TracedModel(made.traced, made.split, built, statics, owned, made.written, decisions, exact)
    model.notes += [] if artifacts is None else artifacts.notes
    for size, static in exact.items():
        seconds = sum(each.seconds for each in static)
        model.notes.append(f"size {size} has compiled forms of its own, made in {seconds:.1f} s")
    return model


def _artifacts(options: Options, begun: Start, agreement: Agreement) -> Artifacts | None:
    """The entry of this request, where there is a cache."""
    if options.cache is None:
        return None
    return Artifacts(options.cache, Request(options, begun, agreement.alone))


def _broken(options: Options, begun: Start, written: Snapshot, agreement: Agreement) -> Prepared:
    options.model(*begun.args, **begun.kwargs)
    agreement.require()  # it runs again: on all ranks, or on none
    leaves_written = _leaves(begun, written)
    owned, statics = _memory(options, begun, leaves_written)
    model = BrokenModel(
        *(options.model, begun.arguments, begun.args, begun.kwargs, begun.leaves, begun.n),
        *(statics, owned, leaves_written),
    )
    if options.cache is not None or options.compile_sizes:
        model.notes.append("front_end='break' compiles nothing: cache= and compile_sizes= have no effect")
    return model


def _leaves(begun: Start, written: Snapshot) -> set[int]:
    """The example's leaves that the model has written to."""
    found = {id(tensor) for tensor in written.written()}
    return {each.leaf for each in begun.arguments.inputs if id(begun.leaves[each.leaf]) in found}


def _memory(options: Options, begun: Start, written: set[int]) -> tuple[list[Input], Statics]:
    """Which inputs are used where the caller has them, and the buffers of the others."""
    inputs = begun.arguments.inputs
    if options.inputs == "copy":
        _check_apart(inputs, written, begun.leaves)
    owned = [each for each in inputs if options.inputs == "static" or (each.leaf in written and not each.dims)]
    copied = [each for each in inputs if each not in owned] if begun.graphs else []
    return owned, Statics(copied, begun.sizes.largest)


def _check_apart(inputs: Sequence[Input], written: set[int], leaves: Sequence[Any]) -> None:
    found = shares_what_is_written(inputs, written, leaves)
    if found is not None:
        raise TraceError(
            "The model writes to an input whose memory another input shares.",
            seen=f"{found[0].name} is written to, and {found[1].name} is in the same storage",
            expected="inputs that are copied to be apart from those that are written to",
            hint="pass one of them only, pass a copy, or take inputs='static'",
        )
