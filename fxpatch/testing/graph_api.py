"""The graphs of a device, under the names that torch.cuda gave them and vendors keep: `torch.<device>.graph`, `Stream`,
`graph_pool_handle`, `make_graphed_callables`. The class has a name of each vendor's own (`MUSAGraph`, `NPUGraph`): the
device's compile profile says which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compile_configs import builtin_names, load_profile
from fxpatch.errors import VendorModuleError


class GraphApi:
    """What captures and replays on one device.

    Args:
        device: the device type.

    Attributes:
        module: `torch.<device>`.
        Graph: its graph class.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.Graph: Any = _graph_class(device, self.module)

    def capture(self, body: Callable[[], Any], graph: Any = None, **options: Any) -> tuple[Any, Any]:
        """Captures `body()`; returns the graph and what `body` returned. The options are `torch.cuda.graph`'s."""
        graph = self.Graph() if graph is None else graph
        with self.module.graph(graph, **options):
            result = body()
        return graph, result

    def tensor(self, *values: float) -> torch.Tensor:
        """A new tensor of floats on the device."""
        return torch.tensor(values, device=self.device)

    def other_stream(self, *taken: Any) -> Any:
        """A stream that is neither current nor among `taken`: CUDA's streams come from a pool and come round again."""
        taken = (self.module.current_stream(), *taken)
        while (stream := self.module.Stream()) in taken:
            pass
        return stream

    @contextlib.contextmanager
    def doomed_capture(self) -> Iterator[None]:
        """A capture in which something is refused: ending it may raise as well, and may leave its stream current."""
        graph = self.Graph()
        with self.module.stream(self.module.current_stream()), contextlib.suppress(RuntimeError):
            with self.module.graph(graph):
                yield


def _graph_class(device: str, module: Any) -> Any:
    names = load_profile(device).capture.classes if device in builtin_names() else ()
    prefix = f"torch.{device}."
    wanted = [name.removeprefix(prefix) for name in names if name.startswith(prefix)] or [f"{device.upper()}Graph"]
    for name in wanted:
        if hasattr(module, name):
            return getattr(module, name)
    raise VendorModuleError(
        f"Device {device!r} has no graphs to test.",
        seen=f"no {' and no '.join(prefix + name for name in wanted)}",
        expected="a graph class in the manner of torch.cuda.CUDAGraph",
        hint="import the vendor's package first; or override the fixture `api` with a GraphApi of your own",
    )
