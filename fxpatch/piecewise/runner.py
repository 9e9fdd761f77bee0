"""`PiecewiseRunner`: a model as pieces, compiled once each, captured per size, replayed.

    runner = fxpatch.PiecewiseRunner(model, dynamic={"x": 0}, split=["mylib::attention"])
    print(runner.prepare(x=example))
    y = runner(x=tokens)

A call takes the fastest way that is right for it, and counts why where that is not the first: a captured size, the
compiled pieces without graphs, the original function. `on_error="raise"` makes a failure to prepare an error instead.

What prepares (`preparing`, and all that it needs of Dynamo) is imported when something is prepared.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compile_configs import DeviceProfile
from fxpatch.errors import BusyError, NotPreparedError
from fxpatch.piecewise import metrics, structured
from fxpatch.piecewise.buckets import Buckets
from fxpatch.piecewise.ladder import Ladder
from fxpatch.piecewise.made import Made
from fxpatch.piecewise.options import Options
from fxpatch.piecewise.progress import Progress
from fxpatch.piecewise.reasons import Reason
from fxpatch.piecewise.report import Report

if TYPE_CHECKING:
    from fxpatch.piecewise.build import Compiler

Run = Callable[[list[Any], int, tuple[Any, ...], Mapping[str, Any]], Any]


class PiecewiseRunner:
    """Runs a model as captured pieces. For inference: it computes without gradients.

    Args:
        model: an `nn.Module` or function of tensors.
        dynamic: parameter name -> its dimension(s) whose size n changes from call to call.
        split: what runs between the graphs, besides what the device's profile and the lint say (`rules.rules_of`).
        sizes: sizes to capture: a list, `Buckets`, or `"auto"` for the profile's, pruned to the device's graph budget.
        compiler: of the graph pieces; None for the profile's.
        inputs: `"copy"` into static buffers; `"static"`: calls bring the tensors of `prepare()`, or their first n rows.
        graphs: `"device"`; `"recorder"`: run again and copied, where the device has none, to test what is built on it;
            `"none"`: compiled pieces only.
        front_end: `"trace"` splits an FX graph; `"break"` calls the model under capture, and breaks where its code is
            marked with `eager_on_graph`: for what Dynamo cannot trace.
        native: `"promote"` tries the `forward_<device>` of modules that have a `forward_native`, and traces those that
            hold and are faster; `"any_speed"`: those that hold; `"keep"` traces the model as it is.
        on_error: `"fallback"` to a slower way, counted; `"raise"`, also for what only the lint keeps out of graphs.
        agree: takes whether this rank succeeded, returns whether all did: a MIN all-reduce. All ranks call it alike.
        profile: compile profile; None for the one of the example's device.
        clone_outputs: results are the caller's to keep; otherwise they are valid until the next call.
        weak: False holds all that graphs write: more memory, for comparison.
        progress: True for a bar on stderr, None for one where that is a terminal, False for none, or a function of a
            `progress.Step`, called before each capture and at the end.
        compile_sizes: sizes for which each piece is compiled once more, with every size a constant; for calls, and
            captures, of exactly that many elements.
        cache: a directory to keep what is compiled in, for the next process (`artifacts`); nobody else may be able to
            write to it. None: nothing is kept.
        shadow: the first calls, that many, also run eagerly, and are compared (`shadow`): where they differ, the call
            returns eager's results, and its size takes a slower way. Later calls cost what they cost without.
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
        progress: Progress | bool | None = None,
        compile_sizes: Sequence[int] = (),
        cache: str | os.PathLike[str] | None = None,
        shadow: int = 0,
    ) -> None:
        self.options = Options(
            *(model, dict(dynamic), tuple(split), sizes, compiler, inputs, graphs, front_end, native, on_error, agree),
            *(profile, clone_outputs, weak, progress, tuple(compile_sizes), cache, shadow),
        )
        self.model = model
        self._tally = metrics.join(self, model)
        self.counts: Counter[str] = self._tally.counts
        self._busy = threading.Lock()
        self._begin("prepare() has not been called")

    def prepare(self, *args: Any, **kwargs: Any) -> Report:
        """Traces, splits, compiles and captures, with an example call of at least two elements.

        What the model writes to while it is prepared is put back.

        Args:
            args, kwargs: the example call, as the model is called; its sizes in the dynamic dimensions are any n of at
                least 2.

        Raises:
            InputError, SplitError, SizesError: the request makes no sense, whatever `on_error` says.
            TraceError, CompileError, CaptureFailedError: with `on_error="raise"`.
        """
        from fxpatch.piecewise import preparing

        with self._alone():
            self._made.release_graphs()
            self._begin("being prepared")
            begun = time.perf_counter()
            try:
                preparing.prepare(self.options, self._made, args, kwargs)
            except BaseException as error:
                self._made.release_graphs()
                self._begin(f"prepare() has failed with {type(error).__name__}")
                self._tally.prepared(time.perf_counter() - begun, "failed")
                raise
            self._tally.prepared(time.perf_counter() - begun, "ok")
            self._tell(time.perf_counter() - begun)
            self._shadow()
        return self.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's results for one call.

        Raises:
            NotPreparedError: `prepare()` has not been called.
            InputError: the call is not in the form of the example.
            BusyError: another thread is in this runner.
        """
        with self._alone():
            begun = self._made.start
            if begun is None:
                raise NotPreparedError(
                    "This runner has not been prepared.",
                    seen=self.state,
                    expected="prepare(...) with an example call",
                    hint="call runner.prepare(**example) once, before serving",
                )
            leaves = begun.arguments.leaves(args, kwargs)
            n = begun.arguments.size(leaves)
            with torch.no_grad():
                returned = self._run(leaves, n, args, kwargs)
            return _cloned(returned) if self.options.clone_outputs else returned

    def _begin(self, state: str) -> None:
        """Nothing has been made of the model, for the reason given."""
        self._made = Made(state)
        self._ladder = Ladder(self.options, self._made, self._tally)
        self._unshadowed()

    def _unshadowed(self) -> None:
        self._run: Run = self._ladder.run

    def _shadow(self) -> None:
        """Has the next calls compared with eager, where that was asked for and they do not run eagerly anyway."""
        if self.options.shadow and self._made.prepared is not None:
            from fxpatch.piecewise.shadow import Shadow

            self._run = Shadow(self._ladder, self.options.shadow, self._unshadowed)

    def _tell(self, seconds: float) -> None:
        made = self._made.prepared
        structured.prepared(self.name, self.report, () if made is None else made.pieces, seconds)

    # -- what a server needs besides ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it is called in metrics, traces and the log: after its model, until it is set.

        Raises:
            OptionError: when set to the name of another runner.
        """
        return self._tally.name

    @name.setter
    def name(self, name: str) -> None:
        metrics.rename(self._tally, name)

    @property
    def state(self) -> str:
        """Whether it is prepared, in words."""
        return self._made.state

    @property
    def report(self) -> Report:
        """What has been made of the model, and which way calls have gone so far."""
        begun = self._made.start
        return self._made.report("" if begun is None else str(begun.compiler), tuple(dict(self.counts).items()))

    def check_parameters(self) -> list[str]:
        """The parameters and buffers that graphs read at an address where the model has them no more: weights that were
        replaced instead of copied into. `recapture()` mends it."""
        prepared = self._made.prepared
        if prepared is None:
            return []
        now = _named_tensors(self.model)
        found = []
        for name in prepared.names:
            current = now.get(name)
            if current is None or current.data_ptr() != prepared.pointers[name]:
                found.append(name)
        return found

    def release(self) -> None:
        """Gives graphs and their memory back, for a server that sleeps, and with it the results of earlier calls; calls
        run the compiled pieces until `recapture()`."""
        with self._alone():
            self._made.release_graphs()
            if self._made.prepared is not None:
                self._made.state = "released: calls run the compiled pieces; recapture() captures again"

    def recapture(self) -> Report:
        """Captures all sizes again, with the parameters that the model has now; nothing is traced or compiled.

        Raises:
            NotPreparedError: nothing has been prepared.
            InputError: a parameter has another dtype, device or shape now, or is no longer shared.
        """
        with self._alone():
            if self._made.prepared is None:
                raise NotPreparedError(
                    "There is nothing to capture again.",
                    seen=self.state,
                    expected="a runner that prepare() has been called on",
                    hint="call prepare(**example)",
                )
            from fxpatch.piecewise import preparing

            begun = time.perf_counter()
            self._made.why.clear()  # what has been found out about calls with other parameters
            self._made.beyond = Reason.OVER_LARGEST
            preparing.recapture(self.options, self._made, _named_tensors(self.model))
            self._tell(time.perf_counter() - begun)
            self._shadow()
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


def _named_tensors(model: Any) -> dict[str, torch.Tensor]:
    if not isinstance(model, torch.nn.Module):
        return {}
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _cloned(returned: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, returned)
