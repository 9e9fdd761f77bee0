"""`PiecewiseRunner`: a model as pieces, compiled once each, captured per size, replayed.

    runner = fxpatch.PiecewiseRunner(model, dynamic={"x": 0}, split=["mylib::attention"])
    print(runner.prepare(x=example))
    y = runner(x=tokens)

A call takes the fastest way that is right for it, and counts why where that is not the first: a captured size, the
compiled pieces without graphs, the original function. `on_error="raise"` makes a failure to prepare an error instead.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from compile_configs import DeviceProfile
from fxpatch.errors import BudgetError, BusyError, CaptureFailedError, FxPatchError, NotPreparedError
from fxpatch.piecewise.buckets import Buckets, buckets
from fxpatch.piecewise.build import Compiler
from fxpatch.piecewise.capture_failure import interrupted
from fxpatch.piecewise.graph_device import frozen_gc
from fxpatch.piecewise.padding import padding_changes
from fxpatch.piecewise.prepare import Agreement, Options, Start, compiled, disagreement, plain, start
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.reasons import Reason
from fxpatch.piecewise.report import Report, SizeRow
from fxpatch.piecewise.snapshot import Snapshot


class PiecewiseRunner:
    """Runs a model as captured pieces. For inference: it computes without gradients.

    Args:
        model: an `nn.Module` or function of tensors.
        dynamic: parameter name -> its dimension(s) whose size n changes from call to call.
        split: what runs between the graphs, besides what the device's profile and the lint say (`split.rules_of`).
        sizes: sizes to capture: a list, `Buckets`, or `"auto"` for the profile's, pruned to the device's graph budget.
        compiler: of the graph pieces; None for the profile's.
        inputs: `"copy"` into static buffers; `"static"`: calls bring the tensors of `prepare()`, or their first n rows.
        graphs: `"device"`; `"recorder"`: run again and copied, where the device has none, to test what is built on it;
            `"none"`: compiled pieces only.
        front_end: `"trace"` splits an FX graph; `"break"` calls the model under capture, and breaks where its code is
            marked with `eager_on_graph`: for what Dynamo cannot trace.
        native: `"promote"` tries the `forward_<device>` of modules that have a `forward_native`, and traces those that
            hold and are faster; `"any_speed"`: those that hold; `"keep"` traces the model as it is.
        on_error: `"fallback"` to a slower way, counted; `"raise"`.
        agree: takes whether this rank succeeded, returns whether all did: a MIN all-reduce. All ranks call it alike.
        profile: compile profile; None for the one of the example's device.
        clone_outputs: results are the caller's to keep; otherwise they are valid until the next call.
        weak: False holds all that graphs write: more memory, for comparison.
        progress: called with (done, of how many, size) before each capture and at the end.
        compile_sizes: sizes for which each piece is compiled once more, with every size a constant; for calls, and
            captures, of exactly that many elements.
        cache: a directory to keep what is compiled in, for the next process (`artifacts`); nobody else may be able to
            write to it. None: nothing is kept.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        dynamic: Mapping[str, int | Sequence[int]],
        split: Iterable[Any] = (),
        sizes: Sequence[int] | Buckets | str = "auto",
        compiler: str | Compiler | None = None,
        inputs: str = "copy",
        graphs: str = "device",
        front_end: str = "trace",
        native: str = "promote",
        on_error: str = "fallback",
        agree: Callable[[bool], bool] | None = None,
        profile: DeviceProfile | None = None,
        clone_outputs: bool = False,
        weak: bool = True,
        progress: Callable[[int, int, int], None] | None = None,
        compile_sizes: Sequence[int] = (),
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.options = Options(
            *(model, dict(dynamic), tuple(split), sizes, compiler, inputs, graphs, front_end, native, on_error),
            *(profile, tuple(compile_sizes), cache),
        )
        self.model = model
        self.counts: Counter[str] = Counter()
        self._together = agree is not None
        self._agree = agree or (lambda ok: ok)
        self._clone, self._weak = clone_outputs, weak
        self._progress = progress or (lambda done, of, size: None)
        self._busy = threading.Lock()
        self._reset("prepare() has not been called")

    def _reset(self, state: str) -> None:
        self.state = state
        self._start: Start | None = None
        self._prepared: Prepared | None = None
        self._sizes: Buckets | None = None
        self._rows: dict[int, SizeRow] = {}
        self._why: dict[int, Reason] = {}
        self._padding: str | None = None
        self._notes: list[str] = []

    # -- preparing ---------------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, **kwargs: Any) -> Report:
        """Traces, splits, compiles and captures, with an example call of at least two elements.

        What the model writes to while it is prepared is put back.

        Raises:
            InputError, SplitError, SizesError: the request makes no sense, whatever `on_error` says.
            TraceError, CompileError, CaptureFailedError: with `on_error="raise"`.
        """
        with self._alone():
            self.release_graphs()
            self._reset("being prepared")
            try:
                with torch.inference_mode(False), torch.no_grad():
                    begun = start(self.options, *plain(args, kwargs))
                    written = Snapshot([*begun.tensors, *_buffers(self.model)])
                    try:
                        self._prepare(begun, written)
                    finally:
                        written.restore()
            except BaseException as error:
                self.release_graphs()
                self._reset(f"prepare() has failed with {type(error).__name__}")
                raise
        return self.report

    def _prepare(self, begun: Start, written: Snapshot) -> None:
        failure: FxPatchError | None = None
        agreement = Agreement(self._agree, alone=not self._together)
        try:
            self._prepared = compiled(self.options, begun, written, agreement)
        except FxPatchError as error:
            failure = error
        written.restore()
        self._start = begun
        if not agreement.close(failure is None):
            self._prepared = None
            self.state = "not prepared: calls go to the original function"
            self._notes.append(str(failure or disagreement()).replace("\n", " "))
            if self.options.on_error == "raise":
                raise failure or disagreement()
            return
        assert self._prepared is not None
        self._padding = padding_changes(self._prepared, begun.leaves, begun.n, written)
        if not self._agree(self._padding is None) and self._padding is None:
            self._padding = "on another rank padding changes the results"
        if self._padding:
            self._notes.append(f"only exact sizes are replayed: {self._padding}")
        self.state = "prepared"
        try:
            self._sizes = buckets(
                begun.sizes,
                profile_sizes=begun.profile.capture.sizes,
                budget=begun.profile.capture.budget if begun.graphs and begun.device.captures else None,
                pieces=self._prepared.graph_pieces,
            )
        except BudgetError as error:
            if self.options.on_error == "raise":
                raise
            self._sizes = begun.sizes
            self._why = dict.fromkeys(self._sizes.sizes, Reason.BUDGET)
            self._notes.append(str(error).replace("\n", " "))
            return
        self._capture(begun, written)

    def _capture(self, begun: Start, written: Snapshot) -> None:
        """Every size, largest first. One that fails is left out, on all ranks alike, and its reason kept."""
        assert self._prepared is not None
        assert self._sizes is not None
        if not begun.graphs:
            self._why = dict.fromkeys(self._sizes.sizes, Reason.NO_DEVICE_GRAPH)
            self._notes.append(f"no graphs: {begun.device.reason}")
            return
        pool = begun.device.pool()
        sizes = sorted(self._sizes.sizes, reverse=True)
        with frozen_gc(), begun.device.side_stream():
            for done, size in enumerate(sizes):
                self._progress(done, len(sizes), size)
                written.restore()
                before = time.perf_counter()
                failure: CaptureFailedError | None = None
                try:
                    self._prepared.capture(size, begun.leaves, begun.n, begun.device, pool, weak=self._weak)
                except CaptureFailedError as error:
                    failure = error
                except Exception as error:  # of an operator between graphs, of a warm-up, for want of memory
                    failure = interrupted(begun.device.type, size, error)
                if self._agree(failure is None):
                    plan = self._prepared.captured[size].plan
                    self._rows[size] = SizeRow(size, "captured", plan.graphs, time.perf_counter() - before, "")
                    continue
                if failure is not None and self._demoted(begun, written, size, failure):
                    self._prepared.release()
                    self._rows.clear()
                    self._capture(begun, written)
                    return
                self._leave_out(size, failure)
                if self.options.on_error == "raise":
                    raise failure or disagreement()
        self._progress(len(sizes), len(sizes), 0)
        begun.device.synchronize()

    def _demoted(self, begun: Start, written: Snapshot, size: int, failure: CaptureFailedError) -> bool:
        """Whether one of the promoted operators was to blame: it has its native forward again, and the model is traced
        anew. Not where ranks decide together: they would have to find the same one at the same time."""
        assert self._prepared is not None
        decisions = self._prepared.decisions
        if decisions is None or not decisions.promoted or self._together or failure.out_of_graphs:
            return False

        without = replace(self.options, native="keep", cache=None)

        def failing(names: set[str]) -> bool:
            written.restore()
            with decisions.apply(names):
                tried = compiled(without, begun, written, Agreement(self._agree))
                try:
                    tried.capture(size, begun.leaves, begun.n, begun.device, begun.device.pool(), weak=self._weak)
                except CaptureFailedError:
                    return True
                tried.release()
                return False

        found = decisions.bisect(failing, f"the capture of size {size}")
        if not found.culprits:
            return False
        written.restore()
        self._prepared = compiled(self.options, begun, written, Agreement(self._agree), decisions)
        return True

    def _leave_out(self, size: int, failure: CaptureFailedError | None) -> None:
        assert self._prepared is not None
        kept = self._prepared.captured.pop(size, None)
        if kept is not None:
            kept.plan.release()
        if failure is None:
            self._why[size] = Reason.RANKS_DISAGREE
        else:
            self._why[size] = Reason.BUDGET if failure.out_of_graphs else Reason.CAPTURE_FAILED
        words = self._why[size].value if failure is None else str(failure).replace("\n", " ")
        self._rows[size] = SizeRow(size, "compiled", 0, 0.0, words)

    # -- calling -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's results for one call.

        Raises:
            NotPreparedError: `prepare()` has not been called.
            InputError: the call is not in the form of the example.
            BusyError: another thread is in this runner.
        """
        with self._alone():
            if self._start is None:
                raise NotPreparedError(
                    "This runner has not been prepared.",
                    seen=self.state,
                    expected="prepare(...) with an example call",
                    hint="call runner.prepare(**example) once, before serving",
                )
            leaves = self._start.arguments.leaves(args, kwargs)
            n = self._start.arguments.size(leaves)
            with torch.no_grad():
                returned = self._run(leaves, n, args, kwargs)
            return _cloned(returned) if self._clone else returned

    def _run(self, leaves: list[Any], n: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        prepared = self._prepared
        if prepared is None or self._start is None:
            return self._original(Reason.NOT_TRACED, args, kwargs)
        if n == 0:
            return self._original(Reason.EMPTY, args, kwargs)
        if n > self._start.largest:
            return self._original(Reason.OVER_LARGEST, args, kwargs)
        if self._start.device.is_capturing():
            return self._original(Reason.CAPTURING, args, kwargs)
        assert self._sizes is not None
        size = self._sizes.of(n)
        reason = Reason.OVER_LARGEST if size is None else self._why.get(size)
        if size is not None and reason is None:
            if n != size and self._padding:
                reason = Reason.PADDING
            elif self.options.inputs == "static" and n != size:
                reason = Reason.NOT_A_SIZE
            elif size not in prepared.captured:
                reason = Reason.RELEASED
            elif prepared.moved(leaves):
                reason = Reason.MOVED_INPUT
            else:
                self.counts["captured"] += 1
                return prepared.replay(size, leaves, n)
        if n < 2 and self._padding:
            return self._original(Reason.PADDING, args, kwargs)
        assert reason is not None
        self.counts[f"compiled: {reason.value}"] += 1
        return prepared.flow(leaves, n)

    def _original(self, reason: Reason, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.counts[f"original: {reason.value}"] += 1
        return self.model(*args, **kwargs)

    # -- what a server needs besides ---------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What has been made of the model, and which way calls have gone so far."""
        begun = self._start
        made = [] if self._prepared is None else self._prepared.notes
        return Report(
            state=self.state,
            device="" if begun is None else f"{begun.device.type} ({begun.device.reason})",
            compiler="" if begun is None else str(begun.compiler),
            pieces=() if self._prepared is None else self._prepared.rows,
            operators=()
            if self._prepared is None or self._prepared.decisions is None
            else tuple(self._prepared.decisions),
            sizes=tuple(self._rows.values()),
            calls=tuple(self.counts.items()),
            notes=tuple(filter(None, [*made, *self._notes, self._sizes.reason if self._sizes is not None else ""])),
        )

    def check_parameters(self) -> list[str]:
        """The parameters and buffers that graphs read at an address where the model has them no more: weights that were
        replaced instead of copied into. `recapture()` mends it."""
        if self._prepared is None:
            return []
        now = _named_tensors(self.model)
        found = []
        for name in self._prepared.names:
            current = now.get(name)
            if current is None or current.data_ptr() != self._prepared.pointers[name]:
                found.append(name)
        return found

    def release(self) -> None:
        """Gives graphs and their memory back, for a server that sleeps, and with it the results of earlier calls; calls
        run the compiled pieces until `recapture()`."""
        with self._alone():
            self.release_graphs()
            if self._prepared is not None:
                self.state = "released: calls run the compiled pieces; recapture() captures again"

    def release_graphs(self) -> None:
        """`release`, inside of a call that holds the runner."""
        if self._prepared is not None:
            self._prepared.release()
        self._rows.clear()
        self._why.clear()

    def recapture(self) -> Report:
        """Captures all sizes again, with the parameters that the model has now; nothing is traced or compiled.

        Raises:
            NotPreparedError: nothing has been prepared.
            InputError: a parameter has another dtype, device or shape now, or is no longer shared.
        """
        with self._alone():
            if self._prepared is None or self._start is None:
                raise NotPreparedError(
                    "There is nothing to capture again.",
                    seen=self.state,
                    expected="a runner that prepare() has been called on",
                    hint="call prepare(**example)",
                )
            self._prepared.rebind(_named_tensors(self.model))
            self.release_graphs()
            with torch.inference_mode(False), torch.no_grad():
                written = Snapshot([*self._start.tensors, *_buffers(self.model), *self._prepared.bound])
                try:
                    self.state = "prepared"
                    self._capture(self._start, written)
                finally:
                    written.restore()
        return self.report

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise BusyError(
                "This runner is in use.",
                seen="a call while another thread is in it",
                expected="one call at a time: its graphs work in the same memory",
                hint="give each thread a runner of its own, or a lock around this one",
            )
        try:
            yield
        finally:
            self._busy.release()


def _buffers(model: Any) -> list[torch.Tensor]:
    return list(model.buffers()) if isinstance(model, torch.nn.Module) else []


def _named_tensors(model: Any) -> dict[str, torch.Tensor]:
    if not isinstance(model, torch.nn.Module):
        return {}
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _cloned(returned: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, returned)
