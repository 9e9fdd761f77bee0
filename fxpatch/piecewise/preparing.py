"""What `prepare()` does: the request is checked, the model traced and compiled, padding tried, and every size captured.

A size that fails is left out, on all ranks alike, and its reason kept; where a promoted operator is to blame for that,
it has its native forward again. What the model writes to in all this is put back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fxpatch.errors import BudgetError, CaptureFailedError, FxPatchError
from fxpatch.piecewise.agreement import Agreement, disagreement
from fxpatch.piecewise.buckets import buckets
from fxpatch.piecewise.capture_failure import interrupted
from fxpatch.piecewise.graph_device import frozen_gc
from fxpatch.piecewise.made import Made
from fxpatch.piecewise.options import Options
from fxpatch.piecewise.padding import padding_changes
from fxpatch.piecewise.prepare import compiled
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.progress import Progress, Step, shown
from fxpatch.piecewise.ranges import range_of
from fxpatch.piecewise.reasons import Reason
from fxpatch.piecewise.report import SizeRow
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.start import Start, plain, start
from fxpatch.piecewise.surroundings import autocast_of


def prepare(options: Options, made: Made, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Fills `made`.

    Raises:
        FxPatchError: as of `PiecewiseRunner.prepare`; `made` is then of no use, and its graphs are to be released.
    """
    with torch.inference_mode(False), torch.no_grad():
        made.start = start(options, *plain(args, kwargs))
        made.autocast = autocast_of(made.start.device.type)
        written = Snapshot([*made.start.tensors, *_buffers(options.model)])
        try:
            _Preparing(options, made, made.start, written).all()
        finally:
            written.written()  # some kernels write without counting, and it may have failed before anybody looked
            written.restore()


def recapture(options: Options, made: Made, named: Mapping[str, torch.Tensor]) -> None:
    """Captures all sizes again, with other tensors for the bound ones.

    Args:
        named: by their names in the model.

    Raises:
        InputError: they are not in the form of those that the model was prepared with.
    """
    assert made.start is not None
    assert made.prepared is not None
    made.prepared.rebind(named)
    made.release_graphs()
    with torch.inference_mode(False), torch.no_grad():
        written = Snapshot([*made.start.tensors, *_buffers(options.model), *made.prepared.bound])
        try:
            made.state = "prepared"
            _Preparing(options, made, made.start, written).capture(made.prepared)
        finally:
            written.restore()


class _Preparing:
    """One `prepare()`.

    Args:
        written: taken of all that the model might write to.
    """

    def __init__(self, options: Options, made: Made, begun: Start, written: Snapshot) -> None:
        self.options, self.made, self.begun, self.written = options, made, begun, written
        self.agree: Callable[[bool], bool] = options.agree or (lambda ok: ok)
        self.raises = options.on_error == "raise"

    def all(self) -> None:
        made, begun = self.made, self.begun
        failure: FxPatchError | None = None
        prepared: Prepared | None = None
        agreement = self.agreement()
        try:
            prepared = compiled(self.options, begun, self.written, agreement)
        except FxPatchError as error:
            failure = error
        except Exception:  # of the model itself; the other ranks wait for an answer
            agreement.close(False)
            raise
        self.written.restore()
        if not agreement.close(failure is None) or prepared is None:
            made.state = "not prepared: calls go to the original function"
            made.notes.append(str(failure or disagreement()).replace("\n", " "))
            if self.raises:
                raise failure or disagreement()
            return
        made.prepared = prepared
        made.padding = padding_changes(prepared, begun.leaves, begun.n, self.written)
        if not self.agree(made.padding is None) and made.padding is None:
            made.padding = "on another rank padding changes the results"
        if made.padding:
            made.notes.append(f"only exact sizes are replayed: {made.padding}")
        made.state = "prepared"
        try:
            made.sizes = buckets(
                begun.sizes,
                profile_sizes=begun.profile.capture.sizes,
                budget=begun.profile.capture.budget if begun.graphs and begun.device.captures else None,
                pieces=prepared.graph_pieces,
            )
        except BudgetError as error:
            if self.raises:
                raise
            made.sizes = begun.sizes
            made.why = dict.fromkeys(made.sizes.sizes, Reason.BUDGET)
            made.notes.append(str(error).replace("\n", " "))
            return
        self.capture(prepared)

    def capture(self, prepared: Prepared) -> None:
        """Every size, largest first."""
        made, device = self.made, self.begun.device
        assert made.sizes is not None
        if not self.begun.graphs:
            made.why = dict.fromkeys(made.sizes.sizes, Reason.NO_DEVICE_GRAPH)
            made.notes.append(f"no graphs: {device.reason}")
            return
        before = (device.memory() or {}).get("reserved")
        with shown(self.options.progress) as show:
            while (again := self._pass(prepared, show)) is not None:
                prepared = made.prepared = again
        device.synchronize()
        after = (device.memory() or {}).get("reserved")
        made.pool_bytes = None if before is None or after is None else max(after - before, 0)

    def _pass(self, prepared: Prepared, show: Progress) -> Prepared | None:
        """Captures all sizes; the model with an operator less promoted where one of those has failed."""
        made, device = self.made, self.begun.device
        assert made.sizes is not None
        pool, sizes = device.pool(), sorted(made.sizes.sizes, reverse=True)

        def step(done: int, size: int) -> None:
            reserved = (device.memory() or {}).get("reserved")
            show(Step(done, len(sizes), size, prepared.graph_pieces, reserved))

        with frozen_gc(), device.side_stream():
            for done, size in enumerate(sizes):
                step(done, size)
                self.written.restore()
                before = time.perf_counter()
                failure: CaptureFailedError | None = None
                try:
                    self._capture(prepared, size, pool)
                except CaptureFailedError as error:
                    failure = error
                except Exception as error:  # of an operator between graphs, of a warm-up, for want of memory
                    failure = interrupted(device.type, size, error)
                if self.agree(failure is None):
                    plan = prepared.captured[size].plan
                    made.rows[size] = SizeRow(size, "captured", plan.graphs, time.perf_counter() - before, "")
                    continue
                again = None if failure is None else self._demoted(prepared, size, failure)
                if again is not None:
                    made.release_graphs()
                    return again
                self._leave_out(prepared, size, failure)
                if self.raises:
                    raise failure or disagreement()
        step(len(sizes), 0)
        return None

    def _capture(self, prepared: Prepared, size: int, pool: Any) -> None:
        begun = self.begun
        with range_of(f"capture size={size}"):
            prepared.capture(size, begun.leaves, begun.n, begun.device, pool, weak=self.options.weak)

    def _demoted(self, prepared: Prepared, size: int, failure: CaptureFailedError) -> Prepared | None:
        """The model traced anew, if one of the promoted operators was to blame and has its native forward again. Not
        where ranks decide together: they would have to find the same one at the same time."""
        decisions = prepared.decisions
        if decisions is None or not decisions.promoted or self.options.agree is not None or failure.out_of_graphs:
            return None
        without = replace(self.options, native="keep", cache=None)

        def failing(names: set[str]) -> bool:
            self.written.restore()
            with decisions.apply(names):
                tried = compiled(without, self.begun, self.written, self.agreement())
                try:
                    self._capture(tried, size, self.begun.device.pool())
                except Exception:  # in a warm-up nothing makes a CaptureFailedError of it
                    return True
                tried.release()
                return False

        if not decisions.bisect(failing, f"the capture of size {size}").culprits:
            return None
        self.written.restore()
        return compiled(self.options, self.begun, self.written, self.agreement(), decisions)

    def _leave_out(self, prepared: Prepared, size: int, failure: CaptureFailedError | None) -> None:
        kept = prepared.captured.pop(size, None)
        if kept is not None:
            kept.plan.release()
        if failure is None:
            why = Reason.RANKS_DISAGREE
        else:
            why = Reason.BUDGET if failure.out_of_graphs else Reason.CAPTURE_FAILED
        words = why.value if failure is None else str(failure).replace("\n", " ")
        self.made.why[size] = why
        self.made.rows[size] = SizeRow(size, "compiled", 0, 0.0, words)

    def agreement(self) -> Agreement:
        return Agreement(self.agree, alone=self.options.agree is None)


def _buffers(model: Any) -> list[torch.Tensor]:
    return list(model.buffers()) if isinstance(model, torch.nn.Module) else []
