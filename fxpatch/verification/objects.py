"""What a module's attributes hold that `native.state.State` does not put back: objects (a cache with its layers), and
lists and dicts that are changed in place. Only what has changed is written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxpatch.piecewise.bits import same_bits

_DEPTH = 6  # module.cache.layers[0].keys, and one more; not all that a trainer holds
_OTHERS = frozenset({"_parameters", "_buffers", "_modules"})


class Objects:
    """The objects, containers and tensors behind a module's attributes, as they are when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._seen: set[int] = set()
        for owner in module.modules():
            for name, value in vars(owner).items():
                if name not in _OTHERS and "_hooks" not in name:  # verify() adds hooks of its own, and takes them back
                    self._walk(value, _DEPTH)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that there were."""
        return [tensor for tensor, _ in self._tensors]

    def restore(self) -> None:
        """Puts everything back."""
        for listed, items in self._lists:
            if len(listed) != len(items) or any(one is not other for one, other in zip(listed, items, strict=True)):
                listed[:] = items
        for live, before in self._dicts:
            if list(live) != list(before) or any(live[name] is not value for name, value in before.items()):
                live.clear()
                live.update(before)
        with torch.no_grad():
            for tensor, value in self._tensors:
                if same_bits(tensor, value) is False:
                    tensor.copy_(value)

    def _walk(self, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._seen or isinstance(value, (nn.Module, nn.Parameter, type, str, bytes)):
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.detach().clone()))
            return
        inside: list[Any] = []
        if isinstance(value, list):
            self._lists.append((value, list(value)))
            inside += value
        elif isinstance(value, tuple):
            inside += value
        elif isinstance(value, dict):
            self._dicts.append((value, dict(value)))
            inside += value.values()
        elif not callable(value) and isinstance(getattr(value, "__dict__", None), dict):
            held = vars(value)
            self._dicts.append((held, dict(held)))
            inside += held.values()
        for each in inside:
            self._walk(each, depth - 1)
