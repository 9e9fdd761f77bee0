"""Where a stage begins to differ: the layer, and then the operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fxpatch.difference import Difference
from fxpatch.tolerance import Roundings, Tolerance
from fxpatch.verification import captured
from fxpatch.verification.layers import first_wrong_backward, first_wrong_forward
from fxpatch.verification.operators import Operator, Recording, Search, Way
from fxpatch.verification.running import Bench
from fxpatch.verification.stages import Backend, compiled


@dataclass(frozen=True)
class Located:
    """One stage of one model.

    Args:
        bench: of the model.
        name: of the stage.
        backend: its backend of `torch.compile`; None for captured graphs.
        runner: options of the runner, for those.
        dynamic: of `torch.compile`.
        tolerances, roundings: as of `difference.compare`.
        strict: one rounding is allowed for each operator, too.
    """

    bench: Bench
    name: str
    backend: Backend | None
    runner: Mapping[str, Any]
    dynamic: bool | None
    tolerances: Mapping[torch.dtype, Tolerance]
    roundings: Roundings
    strict: bool = False

    def find(self, difference: Difference, *, backward: bool) -> tuple[str, Operator | None, list[str]]:
        """The first wrong layer and operator, and why one of them is not known.

        Args:
            difference: of the model's results or gradients.
            backward: whether the graphs are training graphs.
        """
        trouble: list[str] = []
        layer, operator = "", None
        try:
            if difference.where.startswith("gradient"):
                found = first_wrong_backward(self.bench, self._again, self.tolerances, self.roundings)
            else:
                found = first_wrong_forward(self.bench, self._again, self.tolerances, self.roundings, training=backward)
            layer = "" if found is None else found[0]
        except Exception as error:  # of the compiler, for a graph with more results; the difference is known anyway
            trouble.append(f"the layer was not found: {in_words(error)}")
        try:
            operator = self._operator(layer, backward, difference)
        except Exception as error:
            trouble.append(f"the operator was not found: {in_words(error)}")
        return layer, operator, trouble

    def _again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.backend is None:
            return captured.Captured(self.bench, function, self.runner)
        return compiled(function, self.backend, self.name, self.dynamic).call

    def _part(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        assert self.backend is not None
        return compiled(gm, self.backend, f"{self.name}, a part").call

    def _operator(self, layer: str, backward: bool, difference: Difference) -> Operator:
        recording = Recording()
        self.bench.run(compiled(self.bench.model, recording, "recording", False).call, backward=backward)
        way: Way = self._part
        if self.backend is None:
            device = captured.device_of(self.bench, self.runner.get("profile"))
            way = partial(captured.captured_graph, device=device)
        for recorded in recording.calls:
            search = Search(
                *(recorded, way),
                backward=backward,
                randomness=self.bench.randomness,
                tolerances=self.tolerances,
                strict=self.strict,
                strides=difference.kind == "strides",
            )
            found = search.find(layer)
            if found is not None:
                return found
        raise LookupError(
            "each graph of Dynamo's, compiled on its own, computes what its nodes say; what differs is what tracing "
            "has made a constant, or runs between graphs"
        )


def in_words(error: Exception) -> str:
    """An error in one line: Dynamo's first line says whose backend it was, the second what that said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300] or '-'}"
