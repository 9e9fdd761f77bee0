"""What runners have done so far, as Prometheus reads it: what a server's `/metrics` returns.

    GET /metrics:  body, content type = metrics.text(), metrics.TEXT_TYPE

Every runner of the process is there, under its name (`runner.name`), as long as it lives. When it is gone its gauges
disappear, and what it has counted is added to the counters of `runner="ended"`: a sum over all runners never falls, and
a process that makes many has no more series for it. Nothing is counted for this module that runners do not count
anyway, so a call costs the same; reading takes copies that no other thread can see half changed.

Formats: https://prometheus.io/docs/instrumenting/exposition_formats/ (text 0.0.4) and
https://prometheus.io/docs/specs/om/open_metrics_spec/ (1.0.0).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fxpatch.errors import OptionError
from fxpatch.piecewise.reasons import Reason

if TYPE_CHECKING:
    from fxpatch.piecewise.runner import PiecewiseRunner

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
ENDED = "ended"
_WAYS = ("captured", "compiled", "original")
_REASONS = {reason.value: reason.name.lower() for reason in Reason}


@dataclass
class Tally:
    """What a runner counts, which outlives it.

    Args:
        name: of the runner.
        counts: calls, by the way they went: "captured", "compiled: <reason>", "original: <reason>".
        prepares: of `prepare()`, by "ok" and "failed".
        seconds: that these took together.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    prepares: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def prepared(self, seconds: float, result: str) -> None:
        """One `prepare()` more."""
        self.prepares[result] += 1
        self.seconds += seconds


_lock = threading.Lock()
_all: list[tuple[weakref.ref[PiecewiseRunner], Tally]] = []
_ended = Tally(ENDED)
_made: Counter[str] = Counter()


def join(runner: PiecewiseRunner, model: object) -> Tally:
    """Where a new runner counts. It is called after its model: "Llama", "Llama-2", ..."""
    kind = _kind(model)
    with _lock:
        taken = {tally.name for _, tally in _living()} | {ENDED}
        name = kind
        while name in taken:
            _made[kind] += 1
            name = f"{kind}-{_made[kind] + 1}"
        tally = Tally(name)
        _all.append((weakref.ref(runner), tally))
        return tally


def rename(tally: Tally, name: str) -> None:
    """Calls a runner something else.

    Raises:
        OptionError: another one that lives is called that, or it is `"ended"`.
    """
    with _lock:
        taken = {each.name for _, each in _living() if each is not tally} | {ENDED}
        if type(name) is not str or not name or name in taken:
            raise OptionError(
                f"A runner cannot be called {name!r}.",
                seen=f"taken are {', '.join(sorted(taken))}",
                expected="a string that is no other runner's name",
                hint="give each runner a name of its own: metrics are told apart by it",
            )
        tally.name = name


def text() -> str:
    """All runners in Prometheus' text format, for the content type `TEXT_TYPE`."""
    return "".join(family.text() for family in families())


def openmetrics() -> str:
    """All runners in the OpenMetrics format, for the content type `OPENMETRICS_TYPE`."""
    return "".join(family.openmetrics() for family in families()) + "# EOF\n"


@dataclass
class Family:
    """One metric.

    Args:
        name: without the suffix `_total` or `_info`.
        kind: "counter", "gauge" or "info".
        help: one sentence.
        unit: the last word of the name, where that is a unit.
        samples: labels and value.
    """

    name: str
    kind: str
    help: str
    unit: str = ""
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float, **labels: str) -> None:
        """A sample."""
        self.samples.append((labels, value))

    def text(self) -> str:
        """As Prometheus' text format has it."""
        kind = "gauge" if self.kind == "info" else self.kind
        about = self.help.replace("\\", r"\\").replace("\n", r"\n")
        head = f"# HELP {self._sample} {about}\n# TYPE {self._sample} {kind}\n"
        return head + "".join(self._lines()) if self.samples else ""

    def openmetrics(self) -> str:
        """As OpenMetrics has it."""
        unit = f"# UNIT {self.name} {self.unit}\n" if self.unit else ""
        head = f"# TYPE {self.name} {self.kind}\n{unit}# HELP {self.name} {_escaped(self.help)}\n"
        return head + "".join(self._lines()) if self.samples else ""

    @property
    def _sample(self) -> str:
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")

    def _lines(self) -> Iterator[str]:
        for labels, value in self.samples:
            told = ",".join(f'{name}="{_escaped(label)}"' for name, label in labels.items())
            yield f"{self._sample}{{{told}}} {value:.17g}\n"


def families() -> tuple[Family, ...]:
    """Every metric with its samples, now."""
    calls = Family("fxpatch_piecewise_calls", "counter", "Calls of a runner, by the way they went.")
    downs = Family("fxpatch_piecewise_step_downs", "counter", "Calls that were not replayed, by the reason.")
    events = Family("fxpatch_piecewise_events", "counter", "What else a runner counts.")
    prepares = Family("fxpatch_piecewise_prepares", "counter", "Preparations of a runner, by their result.")
    seconds = Family("fxpatch_piecewise_prepare_seconds", "counter", "Time spent in prepare().", "seconds")
    info = Family("fxpatch_piecewise_runner", "info", "What a runner is made for.")
    prepared = Family("fxpatch_piecewise_prepared", "gauge", "1 where calls can be replayed or run compiled pieces.")
    pieces = Family("fxpatch_piecewise_pieces", "gauge", "Pieces of the model, by their kind.")
    graphs = Family("fxpatch_piecewise_size_graphs", "gauge", "Device graphs of a size; 0 where it is not captured.")
    pool = Family(
        "fxpatch_piecewise_pool_bytes",
        "gauge",
        "Bytes by which the device's reserved memory grew while sizes were captured.",
        "bytes",
    )
    for runner, tally in _now():
        for key, count in dict(tally.counts).items():
            way, _, reason = key.partition(": ")
            if way not in _WAYS:
                events.add(count, runner=tally.name, event=key)
                continue
            short = _REASONS.get(reason, reason)
            calls.add(count, runner=tally.name, outcome=way, reason=short)
            if reason:
                downs.add(count, runner=tally.name, outcome=way, reason=short)
        for result, count in dict(tally.prepares).items():
            prepares.add(count, runner=tally.name, result=result)
        seconds.add(tally.seconds, runner=tally.name)
        if runner is None:
            continue
        made = runner._made
        device, compiler = ("", "") if made.start is None else (made.start.device.type, str(made.start.compiler))
        info.add(1, runner=tally.name, model=_kind(runner.model), device=device, compiler=compiler)
        prepared.add(made.prepared is not None, runner=tally.name)
        rows = () if made.prepared is None else made.prepared.rows
        for kind, count in Counter(piece.kind for piece in rows).items():
            pieces.add(count, runner=tally.name, kind=kind)
        for row in dict(made.rows).values():
            graphs.add(row.graphs, runner=tally.name, size=str(row.size))
        if made.pool_bytes is not None:
            pool.add(made.pool_bytes, runner=tally.name)
    return calls, downs, events, prepares, seconds, info, prepared, pieces, graphs, pool


def _now() -> list[tuple[PiecewiseRunner | None, Tally]]:
    """The runners that live, and one tally of those that do not."""
    with _lock:
        living: list[tuple[PiecewiseRunner | None, Tally]] = [*_living()]
        if _ended.counts or _ended.prepares:
            copy = Tally(ENDED, Counter(_ended.counts), Counter(_ended.prepares), _ended.seconds)
            living.append((None, copy))
        return living


def _living() -> list[tuple[PiecewiseRunner, Tally]]:
    """Those that live; the others are added to `_ended`. The caller has the lock."""
    found = [(reference(), reference, tally) for reference, tally in _all]
    for runner, _, tally in found:
        if runner is None:
            _ended.counts.update(tally.counts)
            _ended.prepares.update(tally.prepares)
            _ended.seconds += tally.seconds
    _all[:] = [(reference, tally) for runner, reference, tally in found if runner is not None]
    return [(runner, tally) for runner, _, tally in found if runner is not None]


def _kind(model: object) -> str:
    """A class's or a function's name."""
    return str(getattr(model, "__name__", type(model).__name__))


def _escaped(label: str) -> str:
    label = label.encode("utf-8", "replace").decode()  # half a character in one name, and nobody could read the page
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
