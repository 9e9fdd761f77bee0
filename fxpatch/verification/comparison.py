"""One input through all stages: what differs from eager, whether that is rounding, and where it begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fxpatch.difference import Difference
from fxpatch.piecewise.roundings import roundings
from fxpatch.tolerance import Roundings, Tolerance
from fxpatch.verification import captured
from fxpatch.verification.beliefs import Believed, Lie
from fxpatch.verification.locating import Located, in_words
from fxpatch.verification.nodes import line_of, operator_name, shapes_of
from fxpatch.verification.operators import Operator
from fxpatch.verification.outcome import Outcome, outcome_of
from fxpatch.verification.reference import NoReferenceError, has_halves, is_rounding, moved, reference_outcome
from fxpatch.verification.report import Row, State
from fxpatch.verification.running import Bench, eagerly
from fxpatch.verification.stages import CAPTURED, CODEGEN, INTERPRETER, Backend, Compiled, backends, compiled

_LATER = "its first call agrees, and its second does not: it keeps something from call to call"
_TOO_FAR = "so many roundings could explain it, but it is much further from float64 than eager is"


@dataclass(frozen=True)
class Request:
    """What was asked for; see `verify`."""

    stages: tuple[str, ...]
    backends: Mapping[str, Backend | str]
    reference: str | None
    runner: Mapping[str, Any]
    dynamic: bool | None
    locate: bool
    tolerances: Mapping[torch.dtype, Tolerance]


@dataclass
class _Eager:
    """What everybody is compared with, in one direction.

    Args:
        outcome: of the first run.
        unstable: how the second one, with the same random numbers, differs.
        random: how one with other random numbers differs.
        empty: there is nothing to compare.
        roundings: on the longest way, as far as Dynamo's graphs tell.
        reference: the third result, once it is there; a text where it cannot be.
    """

    outcome: Outcome
    unstable: Difference | None
    random: Difference | None
    empty: bool
    roundings: Roundings = 1
    reference: Outcome | str | None = None


class Comparison:
    """All stages of a model; what is compiled for one input is used for the next.

    Args:
        model: a module or function.
        request: what was asked for.
    """

    def __init__(self, model: Callable[..., Any], request: Request) -> None:
        self.model, self.request = model, request
        self.backends = backends(request.backends)
        names = [*(each for each in request.stages if each != CAPTURED), *request.backends]
        self.names = (*names, *([CAPTURED] if CAPTURED in request.stages else []))
        self._compiled: dict[tuple[str, bool], Compiled] = {}

    def rows(self, bench: Bench, number: int, *, backward: bool, notes: dict[str, None]) -> list[Row]:
        """Every stage for one input and direction.

        Args:
            number: of the input.
            notes: filled.
        """
        row = partial(Row, direction="backward" if backward else "forward", example=number)
        begin = time.perf_counter()
        eager = self._eager(bench, backward)
        rows = [self._own(row, eager, time.perf_counter() - begin, notes)]
        if self.request.reference in ("cpu", "float64"):
            rows.append(self._against_reference(row, bench, eager, backward))
        lies, fakes = self._fakes(row, bench, backward)
        rows.append(fakes)
        unsafe = next((lie for lie in lies if lie.unsafe), None)
        for name in self.names:
            if name not in (INTERPRETER, CODEGEN) and unsafe is not None:
                why = f"not run: {operator_name(unsafe.node)} {unsafe.what}"
                rows.append(row(stage=name, state=State.UNSAFE, reason=why))
            elif name == CAPTURED and backward:
                why = "device graphs compute without gradients"
                rows.append(row(stage=name, state=State.CANNOT_RUN, reason=why))
            else:
                rows.append(self._stage(row, bench, name, eager, backward))
        return rows

    # -- eager --------------------------------------------------------------------------------------------------------

    def _eager(self, bench: Bench, backward: bool) -> _Eager:
        model = eagerly(self.model)
        first = bench.run(model, backward=backward)
        drew = bench.randomness.drawn()
        again = bench.run(model, backward=backward)
        unstable = again.difference(first, self.request.tolerances)
        random = None
        if drew and unstable is None:
            other = bench.run(model, backward=backward, other_numbers=True)
            random = other.difference(first, self.request.tolerances)
        bench.restore()
        before = outcome_of(None, bench.example.call(), bench.held.now(), None)
        return _Eager(first, unstable, random, first.says_nothing(before))

    def _own(self, row: Callable[..., Row], eager: _Eager, seconds: float, notes: dict[str, None]) -> Row:
        if eager.random is not None:
            notes[
                "the model draws random numbers: every run gets the same ones, as far as it draws in the same order"
            ] = None
        if eager.unstable is None and eager.empty:
            why = "it returns nothing that can be compared, and writes to nothing that it holds or is given"
            return row(stage="eager twice", state=State.UNDECIDED, reason=why, seconds=seconds)
        if eager.unstable is None:
            return row(stage="eager twice", state=State.AGREES, seconds=seconds)
        why = "eager disagrees with itself, with the same arguments, state and random numbers: no compiler is to blame"
        return row(stage="eager twice", state=State.UNDECIDED, reason=why, seconds=seconds, difference=eager.unstable)

    def _against_reference(self, row: Callable[..., Row], bench: Bench, eager: _Eager, backward: bool) -> Row:
        begin = time.perf_counter()
        stage = f"eager, {self.request.reference}"
        found = self._reference(bench, eager, backward)
        seconds = time.perf_counter() - begin
        if isinstance(found, str):
            return row(stage=stage, state=State.CANNOT_RUN, reason=found, seconds=seconds)
        difference = moved(eager.outcome).difference(
            moved(found, eager.outcome), self.request.tolerances, self._longest(bench, backward), strides=False
        )
        if difference is None:
            return row(stage=stage, state=State.AGREES, seconds=seconds)
        if eager.random is not None:
            why = "the CPU draws other random numbers"
            return row(stage=stage, state=State.UNDECIDED, reason=why, seconds=seconds, difference=difference)
        why = "eager itself is wrong on this device, or too imprecise for the table"
        return row(stage=stage, state=State.DIFFERS, reason=why, seconds=seconds, difference=difference)

    def _reference(self, bench: Bench, eager: _Eager, backward: bool) -> Outcome | str:
        if eager.reference is None:
            kind = "cpu" if self.request.reference == "cpu" else "float64"
            try:
                eager.reference = reference_outcome(bench, kind, backward=backward)
            except NoReferenceError as error:
                eager.reference = str(error)
        return eager.reference

    def _longest(self, bench: Bench, backward: bool) -> Roundings:
        made = self._compiled.get(("fakes", backward))
        return roundings(made.graphs, backward=backward) if made is not None else 1

    # -- what tracing believes ----------------------------------------------------------------------------------------

    def _fakes(self, row: Callable[..., Row], bench: Bench, backward: bool) -> tuple[list[Lie], Row]:
        begin = time.perf_counter()
        believed = Believed()
        made = self._compiled["fakes", backward] = compiled(self.model, believed, "fakes", self.request.dynamic)
        report = partial(row, stage="fakes", graphs=0)
        try:
            bench.run(made.call, backward=backward)
        except Exception as error:
            reason = in_words(error)
            return [], report(state=State.FAILED, reason=reason, seconds=time.perf_counter() - begin)
        seconds = time.perf_counter() - begin
        if not made.graphs:
            return [], report(state=State.CANNOT_RUN, reason="Dynamo traces nothing of this model", seconds=seconds)
        if not believed.lies:
            return [], report(state=State.AGREES, seconds=seconds, graphs=len(made.graphs))
        lie = believed.lies[0]
        where = Operator(lie.node.name, operator_name(lie.node), line_of(lie.node), shapes_of(lie.node), lie.what)
        why = f"{len(believed.lies)} operators are not what tracing believes"
        return believed.lies, report(
            state=State.DIFFERS, reason=why, seconds=seconds, graphs=len(made.graphs), operator=where
        )

    # -- a stage ------------------------------------------------------------------------------------------------------

    def _stage(self, row: Callable[..., Row], bench: Bench, name: str, eager: _Eager, backward: bool) -> Row:
        begin = time.perf_counter()
        found = self._compared(partial(row, stage=name), bench, name, eager, backward)
        return replace(found, seconds=time.perf_counter() - begin)

    def _compared(self, row: Callable[..., Row], bench: Bench, name: str, eager: _Eager, backward: bool) -> Row:
        graphs: Callable[[], int] = lambda: 0  # noqa: E731
        try:
            if name == CAPTURED:
                call: Callable[..., Any] = captured.Captured(bench, self.model, self._runner(bench))
            else:
                made = self._made(name, backward)
                call, graphs = made.call, lambda: len(made.graphs)
            seen = bench.run(call, backward=backward)
            again = bench.run(call, backward=backward) if name != CAPTURED else seen
        except captured.CannotCaptureError as error:
            return row(state=State.CANNOT_RUN, reason=str(error))
        except Exception as error:
            if eager.unstable is not None:
                return row(state=State.UNDECIDED, reason=in_words(error))
            return row(state=State.FAILED, reason=in_words(error), graphs=graphs())
        if name != CAPTURED and not graphs():
            return row(state=State.CANNOT_RUN, reason="Dynamo traces nothing of this model, so nothing was compiled")
        longest = self._longest(bench, backward)
        strides = name != CAPTURED  # a padded result is a narrow one
        difference = seen.difference(eager.outcome, self.request.tolerances, longest, strides)
        later = too_far = False
        if difference is None:
            seen = again
            difference = seen.difference(eager.outcome, self.request.tolerances, longest, strides)
            later = difference is not None
        if difference is None:
            difference = self._too_far(bench, seen, eager, backward)
            too_far = difference is not None
        if difference is None:
            return row(state=State.AGREES, graphs=graphs())
        report = partial(row, graphs=graphs(), difference=difference)
        if eager.unstable is not None:
            return report(state=State.UNDECIDED, reason="eager disagrees with itself too")
        if eager.random is not None:
            why = "the model draws random numbers, and this stage in another order: eager with others differs as well"
            return report(state=State.UNDECIDED, reason=why)
        why = _LATER if later else _TOO_FAR if too_far else ""
        if self.request.reference is not None and difference.kind == "numbers" and not too_far:
            third = self._reference(bench, eager, backward)
            if isinstance(third, str):
                why = "; ".join(filter(None, (why, f"no reference decides whether this is rounding: {third}")))
            elif is_rounding(seen, eager.outcome, third):
                kind = "the CPU" if self.request.reference == "cpu" else "float64"
                return row(state=State.AGREES, graphs=graphs(), reason=f"rounding only: as near to {kind} as eager is")
        if not self.request.locate or later or difference.kind == "memory":
            return report(state=State.DIFFERS, reason=why)
        where = Located(
            *(bench, name, self.backends.get(name), self.request.runner, self.request.dynamic),
            *(self.request.tolerances, 1 if too_far else longest, too_far),
        )
        layer, operator, trouble = where.find(difference, backward=backward)
        return report(
            state=State.DIFFERS, reason="; ".join(filter(None, (why, *trouble))), layer=layer, operator=operator
        )

    def _too_far(self, bench: Bench, seen: Outcome, eager: _Eager, backward: bool) -> Difference | None:
        """Over a deep model the table has to allow half types tens of percent. So float64 is asked as soon as they
        differ by more than one rounding: what is much further from it than eager is wrong."""
        if self.request.reference not in ("auto", "float64") or eager.unstable is not None or eager.random is not None:
            return None
        if not has_halves(seen):
            return None
        difference = seen.difference(eager.outcome, self.request.tolerances, strides=False)
        if difference is None or difference.kind != "numbers":
            return None
        third = self._reference(bench, eager, backward)
        if isinstance(third, str) or is_rounding(seen, eager.outcome, third, halves=True):
            return None
        return difference

    def _made(self, name: str, backward: bool) -> Compiled:
        key = (name, backward)
        if key not in self._compiled:
            self._compiled[key] = compiled(self.model, self.backends[name], name, self.request.dynamic)
        return self._compiled[key]

    def _runner(self, bench: Bench) -> dict[str, Any]:
        captured.device_of(bench, self.request.runner.get("profile"))
        return dict(self.request.runner)
