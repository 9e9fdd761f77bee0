"""One size, captured: a flat tuple of calls that replays the whole model, and the memory it works in.

Pieces are walked in order on real inputs. A graph piece is run once to warm up, captured, and replayed right away, so
that what follows it sees real values. A piece between graphs runs as it is, now and on every replay; what it returns
has to be where the next graph reads it, so a result that is not the memory of an argument gets a bridge: the first
result is kept, and later ones are copied into it. A piece of views is evaluated now and never again.

Who keeps what alive is decided by who writes it. What a graph writes on every replay may go as soon as its last reader
has been captured: the pool hands the memory to a later piece, or to another size, and by the time that one writes, the
reader has read; steps hold it weakly. Everything else (inputs, bridges, parameters) is written only when somebody runs:
it is held for as long as the plan. Where that rule is broken, a replay reads another tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpatch.piecewise.build import Built
from fxpatch.piecewise.graph_device import GraphDevice, Pool
from fxpatch.piecewise.lint import unbacked, writes
from fxpatch.piecewise.ranges import in_ranges, name_of_piece
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.split import Piece, Split, Value


@dataclass
class Plan:
    """A captured size.

    Attributes:
        size: how many elements the dynamic dimensions have.
        steps: what a replay calls, in order.
        results: the graph's results: tensors that a replay writes, `Cell`s, and constants.
        releases: gives each graph back.
        kept: what only lives as long as the plan.
        names: of the steps, for a profiler.
    """

    size: int
    steps: tuple[Callable[[], object], ...]
    results: list[Any]
    releases: list[Callable[[], None]] = field(repr=False)
    kept: list[Any] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    _in_ranges: tuple[Callable[[], object], ...] | None = field(default=None, repr=False)

    @property
    def graphs(self) -> int:
        """How many of the steps are replays of graphs."""
        return len(self.releases)

    def in_ranges(self) -> tuple[Callable[[], object], ...]:
        """The steps, each in a range that a profiler sees."""
        if self._in_ranges is None:
            self._in_ranges = in_ranges(self.steps, self.names)
        return self._in_ranges

    def release(self) -> None:
        """Gives the graphs back. The plan cannot be replayed any more."""
        self.steps, self.names, self._in_ranges = (), (), None
        for release in self.releases:
            release()
        self.releases.clear()
        self.kept.clear()
        self.results.clear()


class Cell:
    """A value that is another object at every replay: a number, or a tensor whose size depends on data."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def capture(
    split: Split, built: Sequence[Built], feed: Sequence[Any], size: int, device: GraphDevice, pool: Pool, *, weak: bool
) -> Plan:
    """Captures one size.

    Args:
        split, built: the pieces, and what each was compiled to.
        feed: a value for each placeholder of the graph: static input buffers of this size, sizes, bound tensors.
        size: how many elements the dynamic dimensions have.
        device: what captures; the caller is on its side stream.
        pool: where graphs allocate.
        weak: whether what graphs write may be let go (False holds everything, which needs more memory).

    Raises:
        CaptureFailedError: a graph piece cannot be captured. What was captured before has been released.
    """
    recorder = _Recorder(split, feed, device, pool, weak)
    todo = list(zip(split.pieces, built, strict=True))
    try:
        while todo:
            recorder.piece(*todo[0])
            todo.pop(0)
    except BaseException as error:
        if isinstance(error, Exception):
            _finish(recorder.values, todo, error)
        for release in recorder.releases:
            release()
        raise
    results = [recorder.held(each.number) if isinstance(each, Value) else each for each in split.results]
    for each, result in zip(split.results, results, strict=True):
        if isinstance(each, Value) and isinstance(result, torch.Tensor) and result is not recorder.values[each.number]:
            # A result that the caller still has when the runner is gone keeps the graphs, and they their memory. It is
            # the storage that does, as all views of the result share it; and not the plan, which has the result.
            result.untyped_storage()._fxpatch_graphs = tuple(recorder.releases)  # type: ignore[attr-defined]
    return Plan(size, tuple(recorder.steps), results, recorder.releases, recorder.kept, tuple(recorder.names))


def _finish(values: dict[int, Any], todo: list[tuple[Piece, Built]], error: Exception) -> None:
    """Runs what is left without graphs, for the collectives in it: other ranks, whose captures go well, wait there."""
    try:
        for piece, compiled in todo:
            values.update(
                zip(piece.outputs, compiled.call(*[_now(values[each]) for each in piece.inputs]), strict=True)
            )
    except Exception as another:  # the first one is what failed; this one is told with it
        error.add_note(f"The pieces behind it do not run either: {type(another).__name__}: {another}")


class _Recorder:
    """The values of a walk through the pieces, and what has been made of them."""

    def __init__(self, split: Split, feed: Sequence[Any], device: GraphDevice, pool: Pool, weak: bool) -> None:
        self.device, self.pool, self.weak = device, pool, weak
        self.values: dict[int, Any] = dict(zip(split.feed, feed, strict=True))
        self.written_by_graph: set[int] = set()
        self.steps: list[Callable[[], object]] = []
        self.names: list[str] = []
        self.releases: list[Callable[[], None]] = []
        # by their memory: a parameter may be given other data, which graphs do not know of
        self.kept: list[Any] = [value.detach() for value in feed if isinstance(value, torch.Tensor)]
        self._last: dict[int, int] = {}
        for piece in split.pieces:
            self._last.update(dict.fromkeys(piece.inputs, piece.index))
        self._needed = {each.number for each in split.results if isinstance(each, Value)}

    def held(self, number: int) -> Any:
        """A value as a step may hold it: what graphs write, weakly."""
        value = self.values[number]
        if isinstance(value, torch.Tensor) and number in self.written_by_graph and self.weak:
            return self.device.weak(value)
        return value

    def piece(self, piece: Piece, compiled: Built) -> None:
        """Runs or captures one piece, and makes its step."""
        getattr(self, f"_{piece.kind}")(piece, compiled.call)
        for number in (*piece.inputs, *piece.outputs):
            if self._last.get(number, -1) <= piece.index and number not in self._needed:
                self.values.pop(number, None)

    def _graph(self, piece: Piece, call: Callable[..., Any]) -> None:
        arguments = [_now(self.values[number]) for number in piece.inputs]
        assert not any(
            isinstance(self.values[number], Cell) and not isinstance(value, int)
            for number, value in zip(piece.inputs, arguments, strict=True)
        ), "a graph would keep what is another object at every replay"
        writing = any(map(writes, piece.gm.graph.nodes))
        before = Snapshot([each for each in arguments if isinstance(each, torch.Tensor)] if writing else [])
        call(*arguments)  # warm: whatever is tuned, loaded or allocated once happens now
        before.restore()  # what is added in place is added once
        graph = self.device.capture(lambda: call(*arguments), self.pool)
        before.restore()
        self.releases.append(graph.release)  # and not the graph, which would keep its results
        self.steps.append(graph.replay)
        self.names.append(name_of_piece(piece))
        graph.replay()
        results = list(graph.result)
        sources = self._sources(piece, arguments)
        for number, result in zip(piece.outputs, results, strict=True):
            self.values[number] = result
            source = sources.get(_storage(result)) if isinstance(result, torch.Tensor) else None
            if source is None or source in self.written_by_graph:
                self.written_by_graph.add(number)
        if not self.device.captures:
            self.kept.append(results)

    def _views(self, piece: Piece, call: Callable[..., Any]) -> None:
        arguments = [_now(self.values[number]) for number in piece.inputs]
        results = call(*arguments)
        sources = self._sources(piece, arguments)
        if any(isinstance(each, torch.Tensor) and _storage(each) not in sources for each in results):
            self._split(piece, call)  # one of them made a copy
            return
        for number, result in zip(piece.outputs, results, strict=True):
            self.values[number] = result
            if isinstance(result, torch.Tensor) and sources[_storage(result)] in self.written_by_graph:
                self.written_by_graph.add(number)

    def _split(self, piece: Piece, call: Callable[..., Any]) -> None:
        given = [self.values[number] for number in piece.inputs]
        arguments = list(map(_now, given))
        results = list(call(*arguments))
        sources = self._sources(piece, arguments)
        outputs: list[Any] = []  # for each result: a bridge, a cell, or None where nothing is to be done
        for number, result, node in zip(piece.outputs, results, _output_nodes(piece.gm), strict=True):
            source = sources.get(_storage(result)) if isinstance(result, torch.Tensor) else None
            if not isinstance(result, torch.Tensor) or _open(node):
                outputs.append(Cell(result))
                self.values[number] = outputs[-1]
            elif source is not None and isinstance(self.values[source], Cell):
                outputs.append(result.clone())  # the memory that it is in is not there at the next replay
                self.values[number] = outputs[-1]
                self.kept.append(outputs[-1])
            elif source is not None:
                outputs.append(None)
                self.values[number] = result
                if source in self.written_by_graph:
                    self.written_by_graph.add(number)
            else:
                outputs.append(result)
                self.values[number] = result
                self.kept.append(result)
        held = [self.held(number) for number in piece.inputs]
        self.steps.append(_step(piece.gm, call, held, outputs))
        self.names.append(name_of_piece(piece))

    def _sources(self, piece: Piece, arguments: Sequence[Any]) -> dict[int, int]:
        """Storage -> the number of the input that lives in it."""
        return {
            _storage(value): number
            for number, value in zip(piece.inputs, arguments, strict=True)
            if isinstance(value, torch.Tensor)
        }


def _step(
    gm: torch.fx.GraphModule, call: Callable[..., Any], held: list[Any], outputs: list[Any]
) -> Callable[[], object]:
    """What a replay does for a piece between graphs: as little as its results allow."""
    changing = any(isinstance(each, Cell) for each in held)
    run = (lambda: call(*map(_now, held))) if changing else _bound(gm, call, held)
    if all(each is None for each in outputs):
        return run

    expanded = {
        i: dims for i, each in enumerate(outputs) if isinstance(each, torch.Tensor) and (dims := _expanded(each))
    }
    bridges = [_narrow(each, expanded[i]) if i in expanded else each for i, each in enumerate(outputs)]

    def step() -> None:
        for place, (bridge, result) in enumerate(zip(bridges, run(), strict=True)):
            if isinstance(bridge, Cell):
                bridge.value = result
            elif bridge is not None:
                bridge.copy_(_narrow(result, expanded[place]) if place in expanded else result)

    return step


def _bound(gm: torch.fx.GraphModule, call: Callable[..., Any], held: list[Any]) -> Callable[[], Any]:
    """The piece with its arguments; a piece that is one operator without results is that operator."""
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    places = {node: held[i] for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    if len(nodes) == 1 and nodes[0].op == "call_function" and not next(reversed(gm.graph.nodes)).args[0]:
        target: Any = nodes[0].target
        args, kwargs = torch.fx.node.map_arg((nodes[0].args, nodes[0].kwargs), places.__getitem__)
        if isinstance(target, torch._ops.OpOverloadPacket) and target.overloads() == ["default"]:
            target = target.default  # 0.3 us less than the packet
        return lambda: target(*args, **kwargs)
    return lambda: call(*held)


def _expanded(tensor: torch.Tensor) -> list[int]:
    """The dimensions in which each element stands for many: copy_ refuses to write those."""
    sides = enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    return [dim for dim, (side, stride) in sides if side > 1 and stride == 0]


def _narrow(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _now(value: Any) -> Any:
    return value.value if isinstance(value, Cell) else value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else -id(tensor)


def _output_nodes(gm: torch.fx.GraphModule) -> list[Any]:
    return list(next(reversed(gm.graph.nodes)).args[0])


def _open(node: Any) -> bool:
    """Whether a tensor's size depends on data, so that it cannot be copied to a fixed place."""
    if not isinstance(node, torch.fx.Node):
        return False
    value = node.meta.get("example_value")
    if value is None:
        return bool(node.meta.get("open"))  # read from a file, where there are no fake tensors
    return isinstance(value, torch.Tensor) and any(map(unbacked, (*value.shape, *value.stride())))
