"""Devices whose graphs are wrong, one way each. Collected by test_suites_can_fail.py only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxpatch.testing import GraphCaptureTests
from fxpatch.testing.graph_api import GraphApi


class Changed:
    """`torch.<device>` with some names replaced."""

    def __init__(self, module: Any, **changes: Any) -> None:
        self._module = module
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Broken(GraphCaptureTests):
    """Without the tests of what is refused, which have a class of their own."""

    test_refused_in_a_capture = None

    @pytest.fixture
    def api(self, device: str) -> GraphApi:
        api = GraphApi(device)
        self.damage(api)
        return api

    def damage(self, api: GraphApi) -> None:
        raise NotImplementedError


class TestRunsWhileItCaptures(Broken):
    test_refused_in_a_capture = GraphCaptureTests.test_refused_in_a_capture

    def damage(self, api: GraphApi) -> None:
        class Graph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None: ...
            def capture_end(self) -> None: ...
            def replay(self) -> None: ...
            def reset(self) -> None: ...
            def pool(self) -> tuple[int, int]:
                return (1, 0)

        @contextlib.contextmanager
        def graph(graph: Graph, **options: Any) -> Iterator[None]:
            yield

        api.Graph, api.module = Graph, Changed(api.module, graph=graph)


class TestRunsAtTheEndOfTheCapture(Broken):
    def damage(self, api: GraphApi) -> None:
        class Graph(api.Graph):  # type: ignore[name-defined]
            def capture_end(self) -> None:
                super().capture_end()
                self.replay()

        api.Graph = Graph


class TestReplaysNothing(Broken):
    def damage(self, api: GraphApi) -> None:
        class Graph(api.Graph):  # type: ignore[name-defined]
            def replay(self) -> None: ...

        api.Graph = Graph


class TestReplaysOnce(Broken):
    def damage(self, api: GraphApi) -> None:
        class Graph(api.Graph):  # type: ignore[name-defined]
            done = False

            def replay(self) -> None:
                if not self.done:
                    super().replay()
                self.done = True

        api.Graph = Graph


class TestDrawsTheSameNumbers(Broken):
    def damage(self, api: GraphApi) -> None:
        class Graph(api.Graph):  # type: ignore[name-defined]
            def replay(self) -> None:
                torch.manual_seed(0)
                super().replay()

        api.Graph = Graph


class TestIgnoresThePool(Broken):
    def damage(self, api: GraphApi) -> None:
        class Graph(api.Graph):  # type: ignore[name-defined]
            def capture_begin(self, pool: Any = None, **options: Any) -> None:
                super().capture_begin(None, **options)

        api.Graph = Graph


class TestGraphsWithoutGradients(Broken):
    def damage(self, api: GraphApi) -> None:
        def make_graphed_callables(callables: Any, sample_args: Any) -> Any:
            one = lambda function: lambda x: function(x.detach()) + x.detach().requires_grad_().sum() * 0  # noqa: E731
            if isinstance(callables, tuple):
                return tuple(map(one, callables))
            callables.forward = one(callables.forward)
            return callables

        api.module = Changed(api.module, make_graphed_callables=make_graphed_callables)


class TestRefusesModes(Broken):
    def damage(self, api: GraphApi) -> None:
        class Graph(api.Graph):  # type: ignore[name-defined]
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                if capture_error_mode != "global":
                    raise RuntimeError("not supported")
                super().capture_begin(pool)

        api.Graph = Graph
