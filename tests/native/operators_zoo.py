"""Operators of every kind that promotion has to tell apart, each with a native and an optimized forward. The optimized
forward of all is called `forward_musa` and `forward_cpu`, so that the same classes serve on both devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Operator(nn.Module):
    """`forward` dispatches, as engines have it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_musa(*args, **kwargs)

    def forward_cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_musa(*args, **kwargs)


class Good(Operator):
    """RMSNorm: many kernels natively, one optimized."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        for _ in range(40):  # far slower than the fused one, whatever the machine is doing
            y = y * 1.0 + 0.0
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class Wrong(Good):
    """Silently wrong by 10 %."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6) * 1.1


class Untraceable(Good):
    """Asks for something that Dynamo does not follow."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward_musa(x)


class Waiting(Good):
    """Reads a value on the host: traced, and impossible in a capture."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_musa(x) + 0.0 * x.sum().item()


class Raising(Good):
    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel for this shape\nand more words")


class Slower(Good):
    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        for _ in range(200):
            y = y * 1.0 + 0.0
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class Overwriting(Good):
    """Right, and in the memory of its input."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(super().forward_musa(x))


class OverwritingQuietly(Good):
    """Right, and leaves something else in its input."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward_musa(x)
        x.mul_(2)
        return y


class Delegating(Good):
    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_native(x)


class FallingBackWhileTracing(Good):
    """The usual flag: native where somebody traces."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_native(x) if torch.compiler.is_compiling() else super().forward_musa(x)


class Lazy(Good):
    """Creates a submodule when it first runs, which Dynamo could not."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "fused"):
            self.fused = nn.RMSNorm(x.shape[-1], 1e-6, device=x.device)
            self.fused.weight = self.weight
        return self.fused(x)


class LazyAndWrong(Lazy):
    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_musa(x) + 1


class Remembering(Good):
    """Right once: returns the first result for ever."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "first"):
            self.first = super().forward_musa(x)
        return self.first.clone()


class Cached(Good):
    """Writes the same thing into a buffer in both forwards."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("steps", torch.zeros(1))

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return super().forward_native(x) + self.steps

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return super().forward_musa(x) + self.steps


class CachedOtherwise(Cached):
    """The result is right, what it leaves in the buffer is not."""

    def forward_musa(self, x: torch.Tensor) -> torch.Tensor:
        return Good.forward_musa(self, x) + self.steps.add_(1) + 0.0 * self.steps.add_(1)


class Counting(Good):
    """Something else than tensors in the result: right natively, wrong in the optimized forward."""

    def forward_native(self, x: torch.Tensor) -> Any:
        return {"y": super().forward_native(x), "rows": x.shape[0]}

    def forward_musa(self, x: torch.Tensor) -> Any:
        return {"y": super().forward_musa(x), "rows": x.shape[0] + 1}


class Model(nn.Module):
    """Operators one after the other."""

    def __init__(self, *classes: type[Good], size: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(size) for kind in classes)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        for layer in self.layers:
            y = layer(x + 0.25)
            x = y["y"] if isinstance(y, dict) else y
        return x


class SimulatedCapture:
    """`capture` over the device's own graphs; counts those that have not been released."""

    def __init__(self, device: str) -> None:
        self.device, self.made, self.open = device, 0, 0

    def __call__(self, call: Any) -> Any:
        module = torch.get_device_module(self.device)
        graph = module.MUSAGraph()
        with module.graph(graph):
            result = call()
        self.made += 1
        self.open += 1
        return _Captured(self, graph, result)


class _Captured:
    def __init__(self, owner: SimulatedCapture, graph: Any, result: Any) -> None:
        self._owner, self._graph, self.result = owner, graph, result

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        self._owner.open -= 1
        self._graph.reset()


def frozen(model: nn.Module) -> dict[str, Any]:
    """All that a restored model has to have kept: attributes by identity, tensors by value."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in {**module.__dict__, **module._buffers, **module._parameters}.items():
            seen[f"{name}.{key}"] = value.clone() if isinstance(value, torch.Tensor) else id(value)
        seen[f"{name}:keys"] = list(module.__dict__) + list(module._modules) + list(module._buffers)
    return seen


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two results of `frozen` are equal."""
    return before.keys() == after.keys() and all(
        torch.equal(a, after[key]) if isinstance(a, torch.Tensor) else a == after[key] for key, a in before.items()
    )
