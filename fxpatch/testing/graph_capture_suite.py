"""What code over graphs relies on: the semantics of capture and replay, which are torch.cuda's.

    from fxpatch.testing import GraphCaptureTests

    class TestGraphs(GraphCaptureTests):
        pass

Written so that it holds on CUDA: it asks for nothing that torch.cuda leaves open (what an output holds before the first
replay, what becomes of a tensor whose memory another graph of the pool has taken). Operators are pointwise, so that no
library has to warm up. A test that your device cannot pass is set to None in your class, next to the reason.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxpatch.testing.capture_mistakes import MISTAKES, check_in_new_process
from fxpatch.testing.graph_api import GraphApi

_MIB = 2**20


class GraphCaptureTests:
    """Capture records, replay computes."""

    @pytest.fixture
    def device(self, accelerator: str) -> str:
        """The device type under test."""
        return accelerator

    @pytest.fixture
    def api(self, device: str) -> GraphApi:
        """Its graphs; override it where they have other names."""
        return GraphApi(device)

    @pytest.fixture
    def check_mistake(self, device: str, api: GraphApi, pytestconfig: pytest.Config) -> Callable[[str], None]:
        """Checks one of `MISTAKES`: here, if a failed capture leaves the process whole, as the simulator's does."""
        if pytestconfig.getoption("real_device"):
            return lambda mistake: check_in_new_process(device, mistake)
        return lambda mistake: MISTAKES[mistake](api)

    # -- capture and replay -----------------------------------------------------------------------

    def test_a_capture_computes_nothing(self, api: GraphApi) -> None:
        x, out = api.tensor(1.0, 2.0), api.tensor(0.0, 0.0)
        api.capture(lambda: (x.add_(1), torch.mul(x, 2, out=out)))
        assert x.tolist() == [1, 2]
        assert out.tolist() == [0, 0]

    def test_a_replay_runs_each_launch_once_and_in_order(self, api: GraphApi) -> None:
        x = api.tensor(1.0, 2.0)
        graph, y = api.capture(lambda: x.add_(1).mul_(2) + 1)
        for want in ([4, 6], [10, 14], [22, 30]):
            graph.replay()
            assert x.tolist() == want
            assert y.tolist() == [value + 1 for value in want]

    def test_a_replay_reads_its_inputs_as_they_are_now(self, api: GraphApi) -> None:
        x = api.tensor(1.0, 2.0)
        graph, y = api.capture(lambda: x * 2)
        for values in ([5.0, 7.0], [-1.0, 0.5]):
            x.copy_(torch.tensor(values))
            graph.replay()
            assert y.tolist() == [2 * value for value in values]

    def test_outputs_stay_where_they_are(self, api: GraphApi) -> None:
        x = api.tensor(1.0, 2.0)
        graph, (y, view) = api.capture(lambda: (y := x * 2, y[1:]))
        places = y.data_ptr(), view.data_ptr()
        graph.replay()
        x.fill_(4)
        graph.replay()
        assert (y.data_ptr(), view.data_ptr()) == places
        assert y.tolist() == [8, 8]
        assert view.tolist() == [8]

    def test_a_copy_of_an_output_outlives_the_next_replay(self, api: GraphApi) -> None:
        x = api.tensor(1.0)
        graph, y = api.capture(lambda: x + 1)
        graph.replay()
        kept = y.clone()
        x.fill_(10)
        graph.replay()
        assert kept.tolist() == [2]
        assert y.tolist() == [11]

    def test_values_of_the_host_are_those_of_the_capture(self, api: GraphApi) -> None:
        x, number, scalar = api.tensor(1.0, 2.0), [3.0], torch.tensor(5.0)
        graph, y = api.capture(lambda: x * number[0] + scalar)
        number[0] = 100.0
        scalar.fill_(100)
        graph.replay()
        assert y.tolist() == [8, 11]

    def test_a_graph_is_captured_whole_before_it_is_replayed(self, api: GraphApi) -> None:
        x = api.tensor(1.0)
        first, y = api.capture(lambda: x + 1)
        second, z = api.capture(lambda: y * 10)
        first.replay()
        second.replay()
        assert z.tolist() == [20]

    # -- random numbers ---------------------------------------------------------------------------

    def test_random_numbers_are_new_at_every_replay(self, api: GraphApi) -> None:
        x = torch.ones(256, device=api.device)
        graph, (drawn, dropped) = api.capture(lambda: (torch.rand_like(x), torch.dropout(x, 0.5, True)))
        seen = []
        for _ in range(3):
            graph.replay()
            seen.append((drawn.cpu(), dropped.cpu()))
        assert all(bool(((drawn >= 0) & (drawn < 1)).all()) for drawn, _ in seen)
        assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))

    def test_random_numbers_follow_the_seed(self, api: GraphApi) -> None:
        x = torch.ones(256, device=api.device)
        graph, drawn = api.capture(lambda: torch.rand_like(x))
        seen = []
        for _ in range(2):
            api.module.manual_seed(1234)
            graph.replay()
            first = drawn.cpu()
            graph.replay()
            seen.append((first, drawn.cpu()))
        assert torch.equal(seen[0][0], seen[1][0])
        assert torch.equal(seen[0][1], seen[1][1])

    # -- memory -----------------------------------------------------------------------------------

    def test_graphs_of_one_pool_replay_in_any_order(self, api: GraphApi) -> None:
        """As long as each output is read before the next replay."""
        pool = api.module.graph_pool_handle()
        x = torch.arange(64.0, device=api.device)
        sizes = (8, 4, 2, 1)
        bodies = [functools.partial(lambda n: (x[: 8 * n] + n) * n - n, n) for n in sizes]
        graphs = [api.capture(body, pool=pool) for body in bodies]
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 2, 0, 3, 1)):
            for place in order:
                graph, y = graphs[place]
                n = sizes[place]
                x.copy_(torch.arange(64.0) + place)
                graph.replay()
                assert torch.equal(y.cpu(), (torch.arange(8.0 * n) + place + n) * n - n)

    def test_graphs_of_one_pool_share_its_memory(self, api: GraphApi) -> None:
        x = torch.ones(4 * _MIB, device=api.device)

        def grown(pool: Any) -> tuple[Any, int]:
            gc.collect()
            api.module.empty_cache()
            before = api.module.memory_reserved()
            graph, _ = api.capture(lambda: ((x + 1) * 2).sum(), pool=pool)
            api.module.empty_cache()
            return graph, api.module.memory_reserved() - before

        first, took = grown(api.module.graph_pool_handle())
        second, took_there = grown(first.pool())
        third, took_elsewhere = grown(api.module.graph_pool_handle())
        assert took >= 16 * _MIB
        assert took_there == 0
        assert took_elsewhere >= 16 * _MIB
        assert first.pool() == second.pool() != third.pool()

    def test_what_a_graph_has_allocated_is_its_own(self, api: GraphApi) -> None:
        """Nothing else gets its memory, not even that of results which nobody holds any more."""
        x = torch.arange(1024.0, device=api.device)
        graph, y = api.capture(lambda: ((x + 1) * 2).neg().add(3))
        graph.replay()
        first = y.cpu()
        clutter = [torch.full((1024,), 7.0, device=api.device) for _ in range(64)]
        assert torch.equal(y.cpu(), first)
        dropped, _ = api.capture(lambda: x.add_(1) * 2)
        gc.collect()
        clutter += [torch.full((1024,), 7.0, device=api.device) for _ in range(64)]
        dropped.replay()
        graph.replay()
        assert all(bool((each == 7).all()) for each in clutter)
        assert torch.equal(y.cpu(), -(torch.arange(1024.0) + 2) * 2 + 3)

    def test_pool_handles_tell_pools_apart(self, api: GraphApi) -> None:
        pool = api.module.graph_pool_handle()
        x = api.tensor(1.0)
        graph, _ = api.capture(lambda: x + 1, pool=pool)
        other, _ = api.capture(lambda: x + 1)
        assert api.module.graph_pool_handle() != pool
        assert graph.pool() == pool
        assert other.pool() != pool

    # -- streams ----------------------------------------------------------------------------------

    def test_a_capture_has_its_own_stream_and_gives_it_back(self, api: GraphApi) -> None:
        before = api.module.current_stream()
        x = api.tensor(1.0)

        def body() -> tuple[bool, Any]:
            x.add_(1)
            return api.module.is_current_stream_capturing(), api.module.current_stream()

        for stream in (None, api.other_stream()):
            assert not api.module.is_current_stream_capturing()
            _, (capturing, on) = api.capture(body, stream=stream)
            assert capturing
            assert on == stream if stream is not None else on != before
            assert api.module.current_stream() == before

    def test_a_stream_that_joins_is_captured(self, api: GraphApi) -> None:
        x, y = api.tensor(1.0, 2.0), api.tensor(0.0, 0.0)
        side = api.other_stream()

        def body() -> torch.Tensor:
            x.add_(1)
            here = api.module.current_stream()
            branch = api.other_stream(side) if side == here else side
            branch.wait_stream(here)
            with api.module.stream(branch):
                assert api.module.is_current_stream_capturing()
                torch.mul(x, 10, out=y)
            here.wait_stream(branch)
            return y + 1

        graph, z = api.capture(body)
        assert y.tolist() == [0, 0]
        graph.replay()
        assert z.tolist() == [21, 31]

    def test_a_stream_that_does_not_join_runs_at_once(self, api: GraphApi) -> None:
        x, elsewhere = api.tensor(1.0), api.tensor(1.0)

        def body() -> None:
            x.add_(1)
            with api.module.stream(api.other_stream()):
                assert not api.module.is_current_stream_capturing()
                elsewhere.add_(1)

        graph, _ = api.capture(body)
        api.module.synchronize()
        assert elsewhere.tolist() == [2]
        graph.replay()
        assert elsewhere.tolist() == [2]
        assert x.tolist() == [2]

    def test_a_graph_replays_on_any_stream(self, api: GraphApi) -> None:
        x = api.tensor(1.0)
        graph, _ = api.capture(lambda: x.add_(1))
        stream = api.other_stream()
        stream.wait_stream(api.module.current_stream())
        with api.module.stream(stream):
            graph.replay()
        api.module.current_stream().wait_stream(stream)
        graph.replay()
        assert x.tolist() == [3]

    # -- what is refused --------------------------------------------------------------------------

    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_refused_in_a_capture(self, check_mistake: Callable[[str], None], mistake: str) -> None:
        check_mistake(mistake)

    def test_a_capture_on_the_default_stream_is_refused(self, api: GraphApi) -> None:
        """The caller's stream is the default one here; the context manager takes another, `capture_begin` does not."""
        with pytest.raises(RuntimeError):
            api.Graph().capture_begin()
        assert not api.module.is_current_stream_capturing()

    def test_a_graph_that_was_not_captured_is_refused(self, api: GraphApi) -> None:
        graph = api.Graph()
        with pytest.raises(RuntimeError):
            graph.replay()
        with pytest.raises(RuntimeError):
            graph.pool()

    def test_ending_twice_is_refused(self, api: GraphApi) -> None:
        x, graph = api.tensor(1.0), api.Graph()
        with api.module.stream(api.other_stream()):
            graph.capture_begin()
            x.add_(1)
            graph.capture_end()
            with pytest.raises(RuntimeError):
                graph.capture_end()
        graph.replay()
        assert x.tolist() == [2]

    def test_capturing_twice_is_refused_until_reset(self, api: GraphApi) -> None:
        x = api.tensor(1.0)
        graph, _ = api.capture(lambda: x.add_(1))
        with api.module.stream(api.other_stream()), pytest.raises(RuntimeError):
            graph.capture_begin()
        graph.reset()
        with pytest.raises(RuntimeError):
            graph.replay()
        api.capture(lambda: x.add_(10), graph)
        graph.replay()
        assert x.tolist() == [11]

    def test_an_error_of_the_body_ends_the_capture(self, api: GraphApi) -> None:
        x = api.tensor(1.0)

        def body() -> None:
            x.add_(1)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            api.capture(body)
        assert not api.module.is_current_stream_capturing()
        graph, y = api.capture(lambda: x + 1)
        graph.replay()
        assert x.tolist() == [1]
        assert y.tolist() == [2]

    @pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
    def test_capture_error_modes(self, api: GraphApi, mode: str) -> None:
        x = api.tensor(1.0)
        graph, _ = api.capture(lambda: x.add_(1), capture_error_mode=mode)
        graph.replay()
        assert x.tolist() == [2]

    def test_an_unknown_capture_error_mode_is_refused(self, api: GraphApi) -> None:
        with api.module.stream(api.other_stream()), pytest.raises((RuntimeError, ValueError)):
            api.Graph().capture_begin(capture_error_mode="careless")
        assert not api.module.is_current_stream_capturing()

    # -- graphed callables ------------------------------------------------------------------------

    def test_a_graphed_module_trains_as_an_eager_one(self, api: GraphApi) -> None:
        nets = []
        for _ in range(2):
            torch.manual_seed(0)
            nets.append(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)))
        eager, graphed = (net.to(api.device) for net in nets)
        sample = torch.zeros(5, 4, device=api.device, requires_grad=True)
        graphed = api.module.make_graphed_callables(graphed, (sample,))
        for step in range(3):
            values = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            results = []
            for net in (eager, graphed):
                x = values.to(api.device).requires_grad_()
                y = net(x)
                net.zero_grad(set_to_none=True)
                y.square().sum().backward()
                gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
                results.append((y.detach().clone(), x.grad, gradients))
                torch.optim.SGD(net.parameters(), lr=0.1).step()
            torch.testing.assert_close(results[1], results[0])
            assert results[0][2].keys() == dict(eager.named_parameters()).keys()

    def test_several_functions_are_graphed_in_one_go(self, api: GraphApi) -> None:
        samples = [torch.ones(3, device=api.device, requires_grad=True) for _ in range(2)]
        functions = (lambda x: x * x, lambda x: x.exp() + 1)
        graphed = api.module.make_graphed_callables(functions, ((samples[0],), (samples[1],)))
        x = api.tensor(1.0, 2.0, 3.0).requires_grad_()
        y = graphed[1](graphed[0](x))
        y.sum().backward()
        torch.testing.assert_close(y, (x * x).exp() + 1)
        torch.testing.assert_close(x.grad, (x * x).exp() * 2 * x)
