"""Graph capture: what it means, not whether there is a class. Asked through the adapters that PiecewiseRunner uses."""

from __future__ import annotations

from typing import Any

import torch

from compile_configs import DeviceProfile, builtin_names, load_profile, parse_profile
from fxpatch.doctor.probe import Broken, NotApplicable, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, in_words, run_all
from fxpatch.doctor.probes.presence import needs_accelerator
from fxpatch.errors import CaptureFailedError
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.graphs import graph_device

_BIG = 1 << 20


def _profile(device: str) -> DeviceProfile:
    """The device's own, or one that names what its graph class would be called."""
    if device in builtin_names():
        return load_profile(device)
    classes = ["torch.accelerator.Graph", f"torch.{device}.{device.upper()}Graph"]
    return parse_profile(
        {
            "device": device,
            "title": device,
            "vendor": "unknown",
            "min_torch": "2.11",
            "compiler": "aot_eager",
            "capture": {"classes": classes, "sizes": [2], "source": "the names that torch and vendors use"},
        }
    )


def _graphs(subject: Subject) -> GraphDevice:
    """The device's graphs.

    Raises:
        NotApplicable: there is no accelerator.
        Broken: it has no graph class that can be built.
    """
    needs_accelerator(subject)
    found = graph_device(subject.device, _profile(subject.device))
    if not found.captures:
        raise Broken(
            f"no graph class can be built: {found.reason}",
            todo="vendor: a class in the manner of torch.cuda.CUDAGraph, named in the device's compile profile; until "
            "then PiecewiseRunner runs its pieces without graphs",
        )
    return found


def _vector(subject: Subject, *values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=subject.device)


def _capture(subject: Subject) -> str:
    graphs = _graphs(subject)

    def computes_nothing() -> None:
        x = _vector(subject, 1, 2)
        captured = graphs.capture(lambda: x.add_(1))
        graphs.synchronize()
        expect(x.tolist(), [1.0, 2.0], "an input that the captured call writes, after the capture,")
        captured.release()

    def replays() -> None:
        x = _vector(subject, 1, 2)
        captured = graphs.capture(lambda: x.add_(1).mul_(2) + 1)
        for want in ([4.0, 6.0], [10.0, 14.0]):
            captured.replay()
            expect(x.tolist(), want, "what a replay writes")
            expect(captured.result.tolist(), [value + 1 for value in want], "what a replay returns")
        captured.release()

    def reads_its_inputs_where_they_were() -> None:
        x, scale = _vector(subject, 1, 2), [3.0]
        captured = graphs.capture(lambda: x * scale[0])
        place = captured.result.data_ptr()
        scale[0] = 100.0
        for values in ([5.0, 7.0], [-1.0, 0.5]):
            x.copy_(torch.tensor(values))
            captured.replay()
            expect(captured.result.tolist(), [3 * value for value in values], "x * 3 after x was written")
        expect(captured.result.data_ptr(), place, "the address of the result")
        captured.release()

    def gives_its_stream_back() -> None:
        x, before = _vector(subject, 1), torch.accelerator.current_stream()
        inside: list[bool] = []

        def body() -> torch.Tensor:
            inside.append(graphs.is_capturing())
            return x + 1

        graphs.capture(body).release()
        expect(inside, [True], "is_current_stream_capturing() inside")
        expect(graphs.is_capturing(), False, "is_current_stream_capturing() afterwards")
        expect(torch.accelerator.current_stream() == before, True, "the current stream as before")

    checks = {
        "capture computes nothing": computes_nothing,
        "replay computes": replays,
        "inputs are read where they were": reads_its_inputs_where_they_were,
        "the stream is given back": gives_its_stream_back,
    }
    return f"{graphs.reason.split(';')[0]}: {run_all(checks)}"


def _host_read(subject: Subject) -> str:
    graphs = _graphs(subject)
    x = _vector(subject, 1, 2)
    try:
        captured = graphs.capture(lambda: x * float(x.sum().item()))
    except CaptureFailedError as error:
        refused = in_words(error.__cause__ or error)
    else:
        captured.release()
        raise Broken(
            "a value is read on the host inside a capture, and nothing is raised: it is garbage, and is baked in"
        )

    def still_works() -> None:
        expect((x + 1).tolist(), [2.0, 3.0], "x + 1 after the failed capture")
        expect(graphs.is_capturing(), False, "is_current_stream_capturing() after the failed capture")

    def captures_again() -> None:
        captured = graphs.capture(lambda: x + 1)
        captured.replay()
        expect(captured.result.tolist(), [2.0, 3.0], "a replay of the next capture")
        captured.release()

    run_all({"the device afterwards": still_works, "the next capture": captures_again})
    return f"refused ({refused}), and the next capture is right"


def _memory(subject: Subject) -> str:
    graphs = _graphs(subject)
    if graphs.memory() is None:
        raise NotApplicable(f"torch.{subject.device} does not count its memory: see the line `memory`")
    x = torch.ones(_BIG, device=subject.device)
    module: Any = torch.get_device_module(subject.device)

    def reserved() -> int:
        module.empty_cache()
        return (graphs.memory() or {})["reserved"]

    def body() -> torch.Tensor:
        return ((x + 1) * 2).sum()

    pool = graphs.pool()
    with graphs.side_stream():
        body()
    before = reserved()
    first = graphs.capture(body, pool)
    one = reserved() - before
    second = graphs.capture(body, pool)
    two = reserved() - before

    def shared() -> None:
        if one <= 0:
            raise Differs(f"a graph with {2 * x.nbytes} bytes of temporaries takes {one} bytes")
        if two >= 2 * one:
            raise Differs(f"one graph takes {one} bytes, and two of one pool {two}: the pool is not shared")

    def kept() -> None:
        first.replay()
        want = float(first.result)
        clutter = [torch.full((_BIG,), 7.0, device=subject.device) for _ in range(4)]
        first.replay()
        expect(float(first.result), want, "a replay after others have allocated")
        expect(all(bool((each == 7).all()) for each in clutter), True, "whether a replay leaves others' memory alone")

    run_all({"one pool": shared, "memory of its own": kept})
    second.release()
    first.release()
    return f"one graph takes {one / _BIG:.1f} MiB, two of one pool {two / _BIG:.1f} MiB"


def _random(subject: Subject) -> str:
    graphs = _graphs(subject)
    if not graphs.registers_generator:
        raise NotApplicable("the device's graphs register no generator: PiecewiseRunner keeps random operators outside")
    x = torch.ones(256, device=subject.device)
    captured = graphs.capture(lambda: torch.rand_like(x))
    seen = []
    for _ in range(2):
        torch.manual_seed(11)
        captured.replay()
        first = captured.result.cpu().tolist()
        captured.replay()
        seen.append((first, captured.result.cpu().tolist()))
    if seen[0][0] == seen[0][1]:
        raise Broken("every replay draws the same random numbers: dropout and sampling repeat themselves")
    expect(seen[1], seen[0], "what two replays draw after torch.manual_seed")
    captured.release()
    return "random numbers are new at every replay, and follow the seed"


_TODO = "give PiecewiseRunner graphs='none' on this device; vendor: torch.cuda's semantics of capture and replay"

PROBES = (
    Probe(
        name="graph-capture",
        stage="graphs",
        title="capture records, replay computes",
        run=_capture,
        why="a class called NPUGraph or MUSAGraph may be there and do something else: run at capture, keep old inputs, "
        "leave its stream current (out-of-tree catalogue A9)",
        todo=_TODO,
        installs=False,
    ),
    Probe(
        name="graph-host-read",
        stage="graphs",
        title="host reads in a capture",
        run=_host_read,
        why="a host read inside a capture that is let through bakes garbage into the graph; one that is refused must "
        "leave the stream usable, since runners fall back to eager",
        todo=_TODO,
        installs=False,
    ),
    Probe(
        name="graph-memory",
        stage="graphs",
        title="graphs share a pool",
        run=_memory,
        why="a runner captures dozens of sizes in one pool; where graphs do not share it, they take a multiple of the "
        "memory, and where others get a graph's memory, results are overwritten silently",
        todo=_TODO,
        installs=False,
    ),
    Probe(
        name="graph-random",
        stage="graphs",
        title="random numbers in graphs",
        run=_random,
        why="a graph that does not advance its generator draws the same numbers at every replay",
        todo=_TODO,
        installs=False,
    ),
)
