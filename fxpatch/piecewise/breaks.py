"""The run-time front end: code that Dynamo cannot trace runs between captures, wherever it is called.

    @fxpatch.eager_on_graph
    def attention(q, k, v, lengths): ...

Nothing is traced. To capture a size the model is called as it is, under capture; a function marked like this ends the
capture, runs on the real values of what was captured so far, and the next capture begins. What it returns is where
later graphs read it: a tensor that is no argument's memory gets a bridge, as in `plan`. What it returns besides tensors
has become part of the Python that was captured around it: every replay compares it, and a replay in which it is another
raises, instead of computing with the old one.

Everything that passes a break is held strongly: without a graph of values nobody knows what a capture rewrites.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import BreakChangedError
from fxpatch.piecewise.graph_device import GraphDevice, Opened, Pool
from fxpatch.piecewise.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")
_recording: ContextVar[_Recording | None] = ContextVar("fxpatch_recording", default=None)


def eager_on_graph(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function runs between the graphs of a `PiecewiseRunner(front_end="break")`, at every replay too.
    Outside of one it is what it was.

    Args:
        function: may read values on the host and do what it likes; takes and returns tensors, and what stays the same.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        recording = _recording.get()
        return function(*args, **kwargs) if recording is None else recording.interrupt(function, args, kwargs)

    return run


def record(
    call: Callable[[], Sequence[Any]], size: int, device: GraphDevice, pool: Pool, kept: Sequence[torch.Tensor]
) -> Plan:
    """Captures what `call` launches, except for what is marked.

    Args:
        call: the model on static inputs; returns its results.
        size: how many elements the dynamic dimensions have.
        device: what captures; the caller is on its side stream, and has warmed `call` up there.
        pool: where graphs allocate.
        kept: the static inputs.

    Raises:
        CaptureFailedError: a part cannot be captured. What was captured before has been released.
    """
    recording = _Recording(device, pool)
    token = _recording.set(recording)
    try:
        results = recording.run(call)
    except BaseException:
        for release in recording.releases:
            release()
        raise
    finally:
        _recording.reset(token)
    kept_too = [*kept, *recording.kept]
    return Plan(size, tuple(recording.steps), list(results), recording.releases, kept_too, tuple(recording.names))


class _Recording:
    """The steps of one size while they are made."""

    def __init__(self, device: GraphDevice, pool: Pool) -> None:
        self.device, self.pool = device, pool
        self.steps: list[Callable[[], object]] = []
        self.names: list[str] = []
        self.releases: list[Callable[[], None]] = []
        self.kept: list[Any] = []
        self._open: Opened | None = None

    def run(self, call: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        self._open = self.device.open(self.pool)
        try:
            results = call()
        except BaseException as error:
            if self._open is not None:
                self._open.abandon(error)
            raise
        self._close()
        self.kept.append(results)
        return results

    def interrupt(self, function: Callable[..., R], args: Sequence[Any], kwargs: dict[str, Any]) -> R:
        """Ends the capture, runs `function` on real values, and begins the next one."""
        self._close()
        token = _recording.set(None)  # a marked function may call another
        try:
            result = function(*args, **kwargs)
        finally:
            _recording.reset(token)
        self.steps.append(_again(function, args, kwargs, result))
        self.names.append(f"break: {function.__qualname__}")
        self.kept.append((args, kwargs, result))
        self._open = self.device.open(self.pool)
        return result

    def _close(self) -> None:
        opened, self._open = self._open, None
        assert opened is not None
        graph = opened.close()
        self.releases.append(graph.release)
        self.steps.append(graph.replay)
        self.names.append(f"graph {len(self.releases) - 1}")
        graph.replay()  # so that what follows sees real values


def _again(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], first: Any) -> Callable[[], None]:
    """Runs a break again, and puts its results where they were the first time."""
    given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
    leaves, spec = pytree.tree_flatten(first)
    bridged = [isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given for leaf in leaves]

    def again() -> None:
        results, form = pytree.tree_flatten(function(*args, **kwargs))
        if form != spec:
            raise _changed(function, f"results in the form {form}", f"{spec}")
        for kept, new, bridge in zip(leaves, results, bridged, strict=True):
            if bridge:
                if kept.shape != new.shape:
                    raise _changed(function, f"a result of shape {list(new.shape)}", f"{list(kept.shape)}")
                kept.copy_(new)
            elif not isinstance(kept, torch.Tensor) and (type(new) is not type(kept) or new != kept):
                raise _changed(function, repr(new), repr(kept))

    return again


def _changed(function: Callable[..., Any], seen: str, expected: str) -> BreakChangedError:
    return BreakChangedError(
        f"{function.__qualname__} returned something else than when it was captured.",
        seen=seen,
        expected=f"{expected}: what follows it was captured with that",
        hint="return tensors of fixed shapes, and keep decisions that change within the function",
    )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
