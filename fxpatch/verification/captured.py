"""The last stage: a `PiecewiseRunner` with graphs of the device. A replay that reads memory of an earlier call is right
as long as that call was the same, so each replay that counts comes behind one with other values, in the same memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from compile_configs import builtin_names, load_profile
from fxpatch.native.copies import Saved
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.graphs import graph_device
from fxpatch.piecewise.runner import PiecewiseRunner
from fxpatch.verification.running import Bench

_VARIED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDICES = (torch.int32, torch.int64)


class CannotCaptureError(Exception):
    """The stage cannot run here; `str()` says why."""


def device_of(bench: Bench, profile: Any) -> GraphDevice:
    """The device that captures.

    Raises:
        CannotCaptureError: it captures no graphs.
    """
    tensors = bench.example.call().tensors.values()
    where = next((each.device for each in tensors if each.device.type != "cpu"), None)
    if where is None:
        raise CannotCaptureError("no argument is on an accelerator, and the CPU captures no graphs")
    if profile is None and where.type not in builtin_names():
        raise CannotCaptureError(f"there is no compile profile for {where.type}: pass runner={{'profile': ...}}")
    device = graph_device(where, profile or load_profile(where.type))
    if not device.captures:
        raise CannotCaptureError(device.reason)
    return device


def dynamic_of(bench: Bench) -> dict[str, int]:
    """A guess at which arguments have their rows in dimension 0: the first tensor, and all that are as long.

    Raises:
        CannotCaptureError: none of them can be.
    """
    call = bench.example.call()
    function = getattr(bench.model, "forward", bench.model)
    bound = inspect.signature(function).bind(*call.args, **call.kwargs).arguments
    rows = {name: each.shape[0] for name, each in bound.items() if isinstance(each, torch.Tensor) and each.dim()}
    n = next(iter(rows.values()), 0)
    if n < 2:
        raise CannotCaptureError("no argument has two rows or more: pass runner={'dynamic': {parameter: dimension}}")
    return {name: 0 for name, each in rows.items() if each == n}


class Captured:
    """A function in the place of the model: prepared with other values (where that can be), and replayed from then on.

    Args:
        bench: whose model is put back between replays.
        function: the model, or something with its signature.
        options: for `PiecewiseRunner`.
    """

    def __init__(self, bench: Bench, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._bench = bench
        call = bench.example.call()
        self._args, self._kwargs = call.args, call.kwargs  # where graphs find what is used in place
        self._tensors = list(call.tensors.values())
        given: dict[str, Any] = {"native": "keep", "progress": False, **options}
        given.setdefault("dynamic", dynamic_of(bench))
        given.setdefault("sizes", [_rows(given["dynamic"], bench)])
        values = [each.detach().clone() for each in self._tensors]
        for varied in (True, False):  # a graph that never reads a call's values would have these ones otherwise
            bench.restore()
            self._fill(values)
            if varied:
                vary(self._tensors)
            self.runner = PiecewiseRunner(function, **given)
            self.runner.prepare(*self._args, **self._kwargs)
            if any(each.way == "captured" for each in self.runner.report.sizes):
                return

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replays with other values first.

        Raises:
            CannotCaptureError: it was not replayed, but run in another way.
        """
        given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        self._fill(given)
        vary(self._tensors)
        self.runner(*self._args, **self._kwargs)
        self._bench.restore()
        self._fill(given)
        before = self.runner.counts["captured"]
        result = self.runner(*self._args, **self._kwargs)
        if self.runner.counts["captured"] == before:
            ways = ", ".join(way for way in self.runner.counts if way != "captured")
            notes = "; ".join(self.runner.report.notes)
            raise CannotCaptureError(f"the runner does not replay this model: {ways}; {notes}")
        for mine, theirs in zip(self._tensors, given, strict=True):
            put(theirs, mine)
        return result

    def _fill(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self._tensors, values, strict=True):
                put(mine, theirs)


def captured_graph(gm: GraphModule, device: GraphDevice) -> Callable[..., Any]:
    """A graph of Dynamo's captured as it is, and replayed behind a replay with other values: for the bisection."""

    def call(*inputs: Any) -> Any:
        static = Saved(list(inputs)).fresh().leaves
        tensors = [each for each in static if isinstance(each, torch.Tensor)]
        given = [each for each in inputs if isinstance(each, torch.Tensor)]
        values = [each.detach().clone() for each in given]

        def fill() -> None:
            for mine, value in zip(tensors, values, strict=True):
                put(mine, value)

        with device.side_stream():
            gm(*static)
            fill()
            graph = device.capture(lambda: gm(*static), device.pool())
            vary(tensors)
            graph.replay()
            fill()
            graph.replay()
            result = pytree.tree_map_only(torch.Tensor, torch.clone, graph.result)
            for mine, theirs in zip(tensors, given, strict=True):
                put(theirs, mine)
            device.synchronize()
            graph.release()
        return result

    return call


def put(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copies values into a tensor of their shape; where it is expanded, and each element stands for many, once."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def vary(tensors: Sequence[torch.Tensor]) -> None:
    """Other values from the same range: floating tensors back to front, and less of them. Integers all become the
    smallest that is there and no sentinel (negative): indices in another order may point nowhere, this one does not."""
    with torch.no_grad():
        for each in tensors:
            if each.dtype in _VARIED:
                put(each, each.flip(tuple(range(each.ndim))) * 0.5)
            elif each.dtype in _INDICES and bool((each >= 0).any()):
                put(each, torch.where(each >= 0, each[each >= 0].min(), each))


def _rows(dynamic: Mapping[str, Any], bench: Bench) -> int:
    call = bench.example.call()
    function = getattr(bench.model, "forward", bench.model)
    bound = inspect.signature(function).bind(*call.args, **call.kwargs).arguments
    for name, dims in dynamic.items():
        dim = dims if isinstance(dims, int) else next(iter(dims))
        for leaf in pytree.tree_leaves(bound.get(name)):
            if isinstance(leaf, torch.Tensor):
                return int(leaf.shape[dim])
    raise CannotCaptureError(f"no tensor in {', '.join(dynamic)}: pass runner={{'dynamic': {{parameter: dimension}}}}")
