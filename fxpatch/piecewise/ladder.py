"""Which way a call takes: a captured size, the compiled pieces without graphs, or the original function.

The fastest one that is right for this call. Each step down is counted with its reason, and the first of its kind is
told (`structured`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fxpatch.piecewise import structured
from fxpatch.piecewise.buckets import LEAST
from fxpatch.piecewise.ranges import profiled, range_of
from fxpatch.piecewise.reasons import Reason
from fxpatch.piecewise.surroundings import autocast_of, shares_what_is_written

if TYPE_CHECKING:
    from fxpatch.piecewise.made import Made
    from fxpatch.piecewise.metrics import Tally
    from fxpatch.piecewise.options import Options
    from fxpatch.piecewise.prepared import Prepared

_OF_THIS_RANK = (Reason.MOVED_INPUT, Reason.RELEASED)  # other ranks may replay where these hold here


class Ladder:
    """Runs calls by what has been made of a model.

    Args:
        options: of the runner.
        made: by its last `prepare()`; read anew by each call.
        tally: where calls are counted.
    """

    def __init__(self, options: Options, made: Made, tally: Tally) -> None:
        self.options, self.made = options, made
        self.model, self.counts = options.model, tally.counts
        self._tally = tally

    def run(self, leaves: list[Any], n: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's results for one call; without gradients.

        Args:
            leaves: the call's tensors and values, in the order of the example.
            n: its size in the dynamic dimensions.
            args, kwargs: the same call, for the original function.
        """
        made, prepared, begun = self.made, self.made.prepared, self.made.start
        if prepared is None or begun is None:
            return self._original(Reason.NOT_TRACED, args, kwargs)
        if n == 0:
            return self._original(Reason.EMPTY, args, kwargs)
        if n > begun.largest:
            return self._original(Reason.OVER_LARGEST, args, kwargs)
        if begun.device.is_capturing():
            return self._original(Reason.CAPTURING, args, kwargs)
        if autocast_of(begun.device.type) is not made.autocast:
            return self._original(Reason.AUTOCAST, args, kwargs)
        if self.options.inputs == "copy" and shares_what_is_written(begun.arguments.inputs, prepared.written, leaves):
            return self._original(Reason.SHARED_INPUTS, args, kwargs)
        assert made.sizes is not None
        size = made.sizes.of(n)
        reason = made.beyond if size is None else made.why.get(size)
        if size is not None and reason is None:
            reason = self._not_replayed(prepared, leaves, n, size)
            if reason is None:
                self.counts["captured"] += 1
                return prepared.replay(size, leaves, n)
        if n < LEAST and made.padding:
            return self._original(Reason.PADDING, args, kwargs)
        assert reason is not None
        if reason is Reason.PIECES_DIFFER:
            return self._original(reason, args, kwargs)
        self._count("compiled", reason)
        if size is not None and self.options.agree is not None and reason in _OF_THIS_RANK:
            return prepared.flow(leaves, n, size)  # as many rows as the other ranks replay, for the collectives
        return prepared.flow(leaves, n, max(n, LEAST))

    def _not_replayed(self, prepared: Prepared, leaves: list[Any], n: int, size: int) -> Reason | None:
        """Why a call does not take the graphs of its size."""
        if n != size and self.made.padding:
            return Reason.PADDING
        if n != size and self.options.inputs == "static":
            return Reason.NOT_A_SIZE
        if size not in prepared.captured:
            return Reason.RELEASED
        return Reason.MOVED_INPUT if prepared.moved(leaves) else None

    def _original(self, reason: Reason, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._count("original", reason)
        with range_of(f"original: {reason.value}") if profiled() else nullcontext():
            return self.model(*args, **kwargs)

    def _count(self, way: str, reason: Reason) -> None:
        key = f"{way}: {reason.value}"
        self.counts[key] += 1
        if self.counts[key] == 1:
            structured.stepped_down(self._tally.name, way, reason.value)
