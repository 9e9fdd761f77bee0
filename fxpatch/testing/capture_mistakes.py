"""What must not be done in a capture, one by one. Each function does one such thing and checks that it raises there and
then: a device that lets it pass has recorded something else than was meant.

The problem: after most of them a real device's process is of no more use. torch.cuda's allocator still holds the pool
of a capture that failed (`CUDAGraph::capture_end` gives it up only after the driver has agreed), and its next
`empty_cache()` asserts that there is none. So on hardware each runs in a process of its own (`check_in_new_process`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from compile_configs import builtin_names, load_profile
from fxpatch.testing.graph_api import GraphApi

_TIMEOUT = 180.0  # seconds, most of which are the import of the vendor's package


def _refused(what: Callable[[GraphApi, torch.Tensor], object]) -> Callable[[GraphApi], None]:
    def check(api: GraphApi) -> None:
        x = api.tensor(1.0, 0.0, 3.0)
        with api.doomed_capture():
            x + 1
            with pytest.raises(RuntimeError):
                what(api, x)

    return check


def _event(api: GraphApi, _: torch.Tensor) -> None:
    event = api.module.Event()
    event.record()
    event.synchronize()


def _unjoined(api: GraphApi) -> None:
    """A stream that joined the capture has to be waited for before the end."""
    x, graph = api.tensor(1.0, 2.0), api.Graph()

    def body() -> None:
        x + 1
        side = api.other_stream()
        side.wait_stream(api.module.current_stream())
        with api.module.stream(side):
            x.add_(1)

    with api.module.stream(api.module.current_stream()), pytest.raises(RuntimeError):
        api.capture(body, graph)


def _ended_elsewhere(api: GraphApi) -> None:
    x, graph, side = api.tensor(1.0, 2.0), api.Graph(), api.other_stream()
    with api.module.stream(side):
        graph.capture_begin()
        x.add_(1)
        with api.module.stream(api.other_stream(side)), pytest.raises(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):
            graph.capture_end()


MISTAKES: dict[str, Callable[[GraphApi], None]] = {
    "item": _refused(lambda api, x: x.sum().item()),
    "truth": _refused(lambda api, x: bool(x[0])),
    "tolist": _refused(lambda api, x: x.tolist()),
    "copy to the host": _refused(lambda api, x: x.cpu()),
    "tensor from the host": _refused(lambda api, x: torch.tensor([1.0, 2.0], device=api.device)),
    "copy from the host": _refused(lambda api, x: x.copy_(torch.ones(3))),
    "shape that depends on data": _refused(lambda api, x: x.nonzero()),
    "index with a mask": _refused(lambda api, x: x[x > 0]),
    "comparison on the host": _refused(lambda api, x: torch.equal(x, x)),
    "synchronize the device": _refused(lambda api, x: api.module.synchronize()),
    "synchronize the stream": _refused(lambda api, x: api.module.current_stream().synchronize()),
    "synchronize an event": _refused(_event),
    "capture within a capture": _refused(lambda api, x: api.Graph().capture_begin()),
    "unjoined stream": _unjoined,
    "end on another stream": _ended_elsewhere,
}


def check_in_new_process(device: str, mistake: str) -> None:
    """Checks one mistake on real hardware, in a process that is thrown away; an AssertionError says what it said."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(device, mistake, sender))
    process.start()
    sender.close()
    try:
        said = receiver.recv() if receiver.poll(_TIMEOUT) else f"no answer within {_TIMEOUT} s"
    except EOFError:
        process.join()
        said = f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    assert said == "refused", said


def _child(device: str, mistake: str, sender: Connection) -> None:
    packages: tuple[str, ...] = load_profile(device).packages if device in builtin_names() else ()
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    try:
        MISTAKES[mistake](GraphApi(device))
    except BaseException as error:  # pytest's own outcomes are no Exceptions
        sender.send("".join(traceback.format_exception(error)))
    else:
        sender.send("refused")
